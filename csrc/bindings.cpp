// The module adamezo_kernels._native. It takes addresses and sizes instead of tensors, which its
// callers have checked, and throws exceptions. Every kernel call releases the interpreter lock.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "adamezo/flipout.h"
#include "adamezo/low_rank.h"
#include "cpu/dispatch.h"
#include "cuda/launch.h"
#if defined(ADAMEZO_WITH_CUDA)
#include "cuda/device.h"
#endif

namespace py = pybind11;

namespace adamezo {
namespace {

PhiloxKey key_of(uint64_t seed) { return {uint32_t(seed), uint32_t(seed >> 32)}; }

// The table (rows of thirteen int64, as in adamezo/segment.h) and the words of
// adamezo_kernels/terms.py are in the memory of the host or device that runs the kernel.
Job make_job(int operation, int distribution, int64_t rank, uint64_t table, int64_t segments,
             int64_t elements, int type, uint64_t seed, uint64_t offset, uint64_t words,
             int64_t horizon, bool with_second, int rule, int buffer_type, double scale, double eps,
             int rounding, int64_t carried) {
  if (horizon < 1) throw std::invalid_argument("a job needs at least one direction");
  const bool flipout = Distribution(distribution) == Distribution::kFlipout;
  if (rank < 1 || rank > (flipout ? kLargestGroup : kLargestRank))
    throw std::invalid_argument("the rank is out of range");
  if (rule != kMoments && !with_rule(rule, [](auto) {}))
    throw std::invalid_argument("no such rule: is the compiled module older than its Python side?");
  if (carried < 0 || carried > kMostCarried)
    throw std::invalid_argument("a launch carries up to " + std::to_string(kMostCarried) +
                                " words, got " + std::to_string(carried));
  // Where subnormals are flushed to zero, rounding a scalar to float32 would flush it too.
  const DefaultFloatingPoint guard;
  Job job{};
  static_cast<Words&>(job) = words_at(reinterpret_cast<const uint32_t*>(words), horizon);
  if (!with_second) job.second = nullptr;
  if (rule == kMoments) job.numbers = nullptr;
  job.operation = Operation(operation);
  job.distribution = Distribution(distribution);
  job.rank = rank;
  job.row_scale = float(1.0 / std::sqrt(double(rank)));
  job.segments = reinterpret_cast<const Segment*>(table);
  job.segment_count = segments;
  job.elements = elements;
  job.type = ElementType(type);
  job.key = key_of(seed);
  job.offset = offset;
  job.horizon = horizon;
  job.carried = carried;
  job.rule = rule;
  job.buffer_type = ElementType(buffer_type);
  job.scale = float(scale);
  job.eps = float(eps);
  job.rounding = Rounding(rounding);
  return job;
}

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, uint64_t seed, int rounds) {
  philox4x32(counter.data(), key_of(seed), rounds);
  return counter;
}

// The names of all rules, in the order of their numbers.
std::vector<std::string> rules() {
  std::vector<std::string> names = {"moments"};
  const auto add = [&](auto rule) { names.push_back(decltype(rule)::kName); };
  while (with_rule(int(names.size()), add)) {
  }
  return names;
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

  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  const auto job = py::arg("job");
  py::class_<Job>(m, "Job").def(
      py::init(&make_job), py::arg("operation"), py::arg("distribution"), py::arg("rank"),
      py::arg("table"), py::arg("segments"), py::arg("elements"), py::arg("type"), py::arg("seed"),
      py::arg("offset"), py::arg("words"), py::arg("horizon"), py::arg("with_second"),
      py::arg("rule"), py::arg("buffer_type"), py::arg("scale"), py::arg("eps"),
      py::arg("rounding"), py::arg("carried"));
  m.def("run", &run, "On this machine's CPU.", job, py::arg("isa"), py::arg("threads"), unlocked);

  m.def("philox", &philox, "Philox4x32 as published: the four output words.", py::arg("counter"),
        py::arg("key"), py::arg("rounds") = kPhiloxRounds);
  m.def("instruction_sets", &instruction_sets, "What this machine can run, the fastest first.");
  m.def("rules", &rules);
  m.def(
      "distributions",
      [] { return std::vector<std::string>{"exact", "fast", "rademacher", "lowrank", "flipout"}; },
      "In the order of their numbers.");
  m.def("build_report", &build_report);

  const auto counting = [&](const char* name, auto count) {
    m.def(
        name,
        [count](uint64_t table, int64_t segments, uint64_t offset) {
          return count(reinterpret_cast<Segment*>(table), segments, offset);
        },
        "Sets `first` of a table on the host, and returns the number of all.", py::arg("table"),
        py::arg("segments"), py::arg("offset"));
  };
  counting("count_windows", &count_windows);
  counting("count_tiles", &count_tiles);
  m.def(
      "cuda_on_host",
      [](const Job& job, const HighWords& highs, int64_t blocks, int threads) {
        const DefaultFloatingPoint guard;
        cuda_on_host(job, highs, blocks, threads);
      },
      "The bodies of the CUDA kernels on the host, thread by thread, for tests.", job,
      py::arg("highs"), py::arg("blocks"), py::arg("threads"), unlocked);
  m.def(
      "cuda_quotients_on_host",
      [](uint64_t a, uint64_t b, uint64_t y, uint64_t out, int64_t count) {
        const DefaultFloatingPoint guard;
        cuda_quotients_on_host(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
                               reinterpret_cast<const float*>(y), reinterpret_cast<float*>(out),
                               count);
      },
      "a / b of float32, made of approximations y of 1 / b as the CUDA kernels do, for tests.",
      py::arg("a"), py::arg("b"), py::arg("y"), py::arg("out"), py::arg("count"), unlocked);
  m.def(
      "cuda_roots_on_host",
      [](uint64_t a, uint64_t y, uint64_t out, int64_t count) {
        const DefaultFloatingPoint guard;
        cuda_roots_on_host(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(y),
                           reinterpret_cast<float*>(out), count);
      },
      "The roots of a, likewise from approximations y of 1 / sqrt(a).", py::arg("a"), py::arg("y"),
      py::arg("out"), py::arg("count"), unlocked);
#if defined(ADAMEZO_WITH_CUDA)
  m.def("cuda_report", &cuda_report);
  m.def("cuda_launch", &cuda_launch, "Queues it on a stream of a device.", job, py::arg("highs"),
        py::arg("device"), py::arg("stream"), unlocked);
  m.def(
      "cuda_check_sqrt",
      [](uint64_t count, int device, uint64_t stream) {
        cuda_check_sqrt(reinterpret_cast<uint64_t*>(count), device, stream);
      },
      py::arg("count"), py::arg("device"), py::arg("stream"), unlocked);
#endif
}

}  // namespace adamezo
