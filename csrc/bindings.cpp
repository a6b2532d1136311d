// adamezo_kernels._native: addresses and sizes in, exceptions out. It knows no tensors; whoever
// calls it has checked them. Every kernel call releases the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#if defined(ADAMEZO_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace adamezo {
namespace {

// A table of segments in host memory: rows of eight int64, as in adamezo/segment.h.
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
            uint32_t direction) {
  const std::vector<uint32_t> directions{direction};
  run(kernels_named(isa).sample, job_over(table, seed, offset, directions), threads);
}

void perturb(const std::string& isa, int threads, const Table& table, uint64_t seed,
             uint64_t offset, uint32_t direction, double scale) {
  const DefaultFloatingPoint guard;
  const std::vector<uint32_t> directions{direction};
  Job job = job_over(table, seed, offset, directions);
  job.scale = float(scale);
  run(kernels_named(isa).perturb, job, threads);
}

void check_length(const char* name, size_t got, size_t expected) {
  if (got != expected)
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(got) +
                                " coefficients for " + std::to_string(expected) + " directions");
}

void update(const std::string& isa, int threads, const Table& table, uint64_t seed, uint64_t offset,
            const std::vector<uint32_t>& directions, const std::vector<double>& first,
            const std::optional<std::vector<double>>& second, double restore, double minus_lr,
            double eps, double decay) {
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
  run(kernels_named(isa).update, job, threads);
}

void moment(const std::string& isa, int threads, const Table& table, uint64_t seed, uint64_t offset,
            const std::vector<uint32_t>& directions, const std::vector<double>& coefficients,
            bool squared) {
  check_length("coefficients", coefficients.size(), directions.size());
  const DefaultFloatingPoint guard;
  const auto narrowed = narrow(coefficients);
  Job job = job_over(table, seed, offset, directions);
  job.first = narrowed.data();
  job.second = squared ? narrowed.data() : nullptr;
  run(kernels_named(isa).moment, job, threads);
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
  m.def("sample", &sample, isa, threads, table, seed, offset, py::arg("direction"), unlocked);
  m.def("perturb", &perturb, isa, threads, table, seed, offset, py::arg("direction"),
        py::arg("scale"), unlocked);
  m.def("update", &update, isa, threads, table, seed, offset, py::arg("directions"),
        py::arg("first"), py::arg("second"), py::arg("restore"), py::arg("minus_lr"),
        py::arg("eps"), py::arg("decay"), unlocked);
  m.def("moment", &moment, isa, threads, table, seed, offset, py::arg("directions"),
        py::arg("coefficients"), py::arg("squared"), unlocked);

  m.def("philox", &philox, "Philox4x32 as published: the four output words.", py::arg("counter"),
        py::arg("key"), py::arg("rounds") = kPhiloxRounds);
  m.def("instruction_sets", &instruction_sets, "What this machine can run, the fastest first.");
  m.def("build_report", &build_report);
#if defined(ADAMEZO_WITH_CUDA)
  m.def("cuda_report", &cuda_report);
#endif
}

}  // namespace adamezo
