// adamezo_kernels._native: addresses and sizes in, exceptions out. It knows no tensors; whoever
// calls it has checked them. Every kernel call releases the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/launch.h"
#if defined(ADAMEZO_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace adamezo {
namespace {

// A table of segments in host memory: rows of ten int64, as in adamezo/segment.h.
struct Table {
  uint64_t address;
  int64_t segments;
  int64_t elements;
  int type;
};

PhiloxKey key_of(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }

Job job_over(const Table& table, uint64_t seed, uint64_t offset,
             const std::vector<uint32_t>& directions) {
  Job job{};
  job.segments = reinterpret_cast<const Segment*>(table.address);
  job.segment_count = table.segments;
  job.elements = table.elements;
  job.type = ElementType(table.type);
  job.key = key_of(seed);
  job.offset = offset;
  job.directions = directions.data();
  job.horizon = int64_t(directions.size());
  return job;
}

// Scalars arrive as float64 and are rounded here, once. Callers hold a DefaultFloatingPoint: where
// subnormals are flushed the rounding would flush too.
std::vector<float> narrow(const std::vector<double>& values) {
  return std::vector<float>(values.begin(), values.end());
}

void sample(const std::string& isa, int threads, const Table& table, uint64_t seed, uint64_t offset,
            int distribution, uint32_t direction) {
  const std::vector<uint32_t> directions{direction};
  const Kernels& kernels = kernels_of(isa, Distribution(distribution));
  run(kernels.sample, job_over(table, seed, offset, directions), threads);
}

void perturb(const std::string& isa, int threads, const Table& table, uint64_t seed,
             uint64_t offset, int distribution, uint32_t direction, double scale, int rounding) {
  const DefaultFloatingPoint guard;
  const std::vector<uint32_t> directions{direction};
  Job job = job_over(table, seed, offset, directions);
  job.scale = float(scale);
  job.rounding = Rounding(rounding);
  run(kernels_of(isa, Distribution(distribution)).perturb, job, threads);
}

void check_length(const char* name, size_t got, size_t expected) {
  if (got != expected)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(got) +
                                " coefficients for " + std::to_string(expected) + " directions");
}

void update(const std::string& isa, int threads, const Table& table, uint64_t seed, uint64_t offset,
            int distribution, const std::vector<uint32_t>& directions,
            const std::vector<double>& first, const std::optional<std::vector<double>>& second,
            double restore, double minus_lr, double eps, double decay, int rounding) {
  if (directions.empty()) throw std::invalid_argument("an update needs at least one direction");
  check_length("first", first.size(), directions.size());
  if (second) check_length("second", second->size(), directions.size());
  const DefaultFloatingPoint guard;
  const auto first_narrow = narrow(first);
  const auto second_narrow = second ? narrow(*second) : std::vector<float>();
  Job job = job_over(table, seed, offset, directions);
  job.first = first_narrow.data();
  job.second = second ? second_narrow.data() : nullptr;
  job.scale = float(restore);
  job.minus_lr = float(minus_lr);
  job.eps = float(eps);
  job.decay = float(decay);
  job.rounding = Rounding(rounding);
  run(kernels_of(isa, Distribution(distribution)).update, job, threads);
}

void moment(const std::string& isa, int threads, const Table& table, uint64_t seed, uint64_t offset,
            int distribution, const std::vector<uint32_t>& directions,
            const std::vector<double>& coefficients, bool squared) {
  check_length("coefficients", coefficients.size(), directions.size());
  const DefaultFloatingPoint guard;
  const auto narrowed = narrow(coefficients);
  Job job = job_over(table, seed, offset, directions);
  job.first = narrowed.data();
  job.second = squared ? narrowed.data() : nullptr;
  run(kernels_of(isa, Distribution(distribution)).moment, job, threads);
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint64_t seed, int rounds) {
  philox4x32(counter.data(), key_of(seed), rounds);
  return counter;
}

py::dict build_report() {
  py::dict report;
  report["version"] = ADAMEZO_VERSION;
  report["compiler"] = ADAMEZO_BUILD_COMPILER;
  report["cuda"] = ADAMEZO_BUILD_CUDA;
  return report;
}

// --- CUDA: what has to lie in a device's memory lies in tensors, of which addresses arrive here
// ----

// Writes a job's directions and coefficients for the kernels: three rows of 32-bit words.
void cuda_directions(uint64_t address, const std::vector<uint32_t>& directions,
                     const std::optional<std::vector<double>>& first,
                     const std::optional<std::vector<double>>& second) {
  const DefaultFloatingPoint guard;
  const size_t horizon = directions.size();
  auto* row = reinterpret_cast<uint32_t*>(address);
  std::copy(directions.begin(), directions.end(), row);
  for (const auto* coefficients : {&first, &second}) {
    row += horizon;
    if (*coefficients) check_length("coefficients", (*coefficients)->size(), horizon);
    for (size_t k = 0; k < horizon; ++k)
      row[k] = float_to_bits(*coefficients ? float((**coefficients)[k]) : 0.0f);
  }
}

// A job over a table and directions in a device's memory, or in the host's for cuda_on_host.
struct CudaJob {
  Operation operation;
  Distribution distribution;
  Job job;
  HighWords highs;
};

CudaJob cuda_job(int operation, int distribution, const Table& table, uint64_t seed,
                 uint64_t offset, uint64_t directions, int64_t horizon, bool with_second,
                 double scale, double minus_lr, double eps, double decay, int rounding,
                 const HighWords& highs) {
  const DefaultFloatingPoint guard;
  Job job = job_over(table, seed, offset, {});
  job.directions = reinterpret_cast<const uint32_t*>(directions);
  job.horizon = horizon;
  job.first = reinterpret_cast<const float*>(job.directions + horizon);
  job.second = with_second ? job.first + horizon : nullptr;
  job.scale = float(scale);
  job.minus_lr = float(minus_lr);
  job.eps = float(eps);
  job.decay = float(decay);
  job.rounding = Rounding(rounding);
  return {Operation(operation), Distribution(distribution), job, highs};
}

#if defined(ADAMEZO_WITH_CUDA)
py::dict cuda_report() {
  const CudaStatus status = cuda_status();
  py::dict report;
  report["runtime_version"] = status.runtime_version;
  report["driver_version"] = status.driver_version;
  report["devices"] = status.devices;
  report["error"] = status.error;
  return report;
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of adamezo. Use adamezo_kernels, which checks its arguments.";
  py::class_<Table>(m, "Table")
      .def(py::init([](uint64_t address, int64_t segments, int64_t elements, int type) {
             return Table{address, segments, elements, type};
           }),
           py::arg("address"), py::arg("segments"), py::arg("elements"), py::arg("type"));

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  const auto isa = py::arg("isa");
  const auto threads = py::arg("threads");
  const auto table = py::arg("table");
  const auto seed = py::arg("seed");
  const auto offset = py::arg("offset");
  const auto distribution = py::arg("distribution");
  m.def("sample", &sample, isa, threads, table, seed, offset, distribution, py::arg("direction"),
        unlocked);
  m.def("perturb", &perturb, isa, threads, table, seed, offset, distribution, py::arg("direction"),
        py::arg("scale"), py::arg("rounding"), unlocked);
  m.def("update", &update, isa, threads, table, seed, offset, distribution, py::arg("directions"),
        py::arg("first"), py::arg("second"), py::arg("restore"), py::arg("minus_lr"),
        py::arg("eps"), py::arg("decay"), py::arg("rounding"), unlocked);
  m.def("moment", &moment, isa, threads, table, seed, offset, distribution, py::arg("directions"),
        py::arg("coefficients"), py::arg("squared"), unlocked);

  m.def("philox", &philox, "Philox4x32 as published: the four output words.", py::arg("counter"),
        py::arg("key"), py::arg("rounds") = kPhiloxRounds);
  m.def("instruction_sets", &instruction_sets, "What this machine can run, the fastest first.");
  m.def("build_report", &build_report);

  m.def("cuda_directions", &cuda_directions, py::arg("address"), py::arg("directions"),
        py::arg("first"), py::arg("second"));
  py::class_<CudaJob>(m, "CudaJob")
      .def(py::init(&cuda_job), py::kw_only(), py::arg("operation"), distribution, table, seed,
           offset, py::arg("directions"), py::arg("horizon"), py::arg("with_second"),
           py::arg("scale"), py::arg("minus_lr"), py::arg("eps"), py::arg("decay"),
           py::arg("rounding"), py::arg("highs"));
  m.def(
      "cuda_on_host",
      [](const CudaJob& job, int64_t blocks, int threads) {
        const DefaultFloatingPoint guard;
        cuda_on_host(job.operation, job.distribution, job.job, job.highs, blocks, threads);
      },
      "The kernels' bodies on the host, thread by thread, for tests.", py::arg("job"),
      py::arg("blocks"), py::arg("threads"), unlocked);
#if defined(ADAMEZO_WITH_CUDA)
  m.def("cuda_report", &cuda_report);
  m.def(
      "cuda_launch",
      [](const CudaJob& job, int device, uint64_t stream) {
        cuda_launch(job.operation, job.distribution, job.job, job.highs, device, stream);
      },
      py::arg("job"), py::arg("device"), py::arg("stream"), unlocked);
  m.def(
      "cuda_check_sqrt",
      [](uint64_t count, int device, uint64_t stream) {
        cuda_check_sqrt(reinterpret_cast<uint64_t*>(count), device, stream);
      },
      py::arg("count"), py::arg("device"), py::arg("stream"), unlocked);
#endif
}

}  // namespace adamezo
