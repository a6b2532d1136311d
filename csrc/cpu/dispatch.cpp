#include "cpu/dispatch.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>

namespace adamezo {
namespace {

// Fewer elements than this are not worth waking a thread for (some ten microseconds of work).
constexpr int64_t kElementsPerWorker = 16384;
// More shares than threads, so that a thread that is held up leaves less behind.
constexpr int64_t kWorkersPerThread = 8;

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    kernels.push_back(&avx512_kernels());
  if (avx2) kernels.push_back(&avx2_kernels());
#endif
  kernels.push_back(&portable_kernels());
  return kernels;
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.push_back(kernels->instruction_set);
  return names;
}

const Kernels& kernels_named(const std::string& instruction_set) {
  for (const Kernels* kernels : available_kernels())
    if (kernels->instruction_set == instruction_set) return *kernels;
  std::string message =
      "unknown or unsupported instruction set '" + instruction_set + "'; this machine can run:";
  for (const auto& name : instruction_sets()) message += " " + name;
  throw std::invalid_argument(message);
}

void run(Kernel kernel, const Job& job, int threads) {
  const int64_t shares = (job.elements + kElementsPerWorker - 1) / kElementsPerWorker;
  if (shares == 0) return;
  threads = int(std::min<int64_t>(std::max(threads, 1), shares));
  const int64_t workers = threads == 1 ? 1 : std::min(shares, threads * kWorkersPerThread);
  const size_t room = size_t(job.horizon) + 1;
  std::vector<PhiloxStream> streams(size_t(threads) * room);
#pragma omp parallel num_threads(threads)
  {
    const DefaultFloatingPoint guard;
    PhiloxStream* own = streams.data() + size_t(omp_get_thread_num()) * room;
#pragma omp for schedule(dynamic, 1)
    for (int64_t worker = 0; worker < workers; ++worker) kernel(job, own, worker, workers);
  }
}

}  // namespace adamezo
