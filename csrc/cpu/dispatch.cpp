#include "cpu/dispatch.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <stdexcept>

namespace adamezo {
namespace {

// Fewer elements than this are not worth waking a thread for (some ten microseconds of work).
constexpr int64_t kElementsPerWorker = 16384;
// More shares than threads, so that a delayed thread leaves less work behind.
constexpr int64_t kWorkersPerThread = 8;

std::vector<const InstructionSet*> available() {
  std::vector<const InstructionSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&avx512_kernels());
  if (avx2) sets.push_back(&avx2_kernels());
#endif
  sets.push_back(&portable_kernels());
  return sets;
}

Kernel kernel_of(Distribution distribution, const InstructionSet& set) {
  switch (distribution) {
    case Distribution::kRademacher:
      return set.rademacher;
    case Distribution::kLowRank:
    case Distribution::kFlipout:
      return set.factored;
    default:
      return set.exact;
  }
}

Kernel kernel_of(const Job& job, const std::string& instruction_set) {
  if (job.distribution == Distribution::kFast)
    throw std::invalid_argument(
        "a CPU has no `fast` directions; expected exact, rademacher, lowrank or flipout");
  for (const InstructionSet* set : available())
    if (set->name == instruction_set) return kernel_of(job.distribution, *set);
  std::string message =
      "unknown or unsupported instruction set '" + instruction_set + "'; this machine can run:";
  for (const auto& name : instruction_sets()) message += " " + name;
  throw std::invalid_argument(message);
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : available()) names.push_back(set->name);
  return names;
}

void run(const Job& job, const std::string& instruction_set, int threads) {
  const Kernel kernel = kernel_of(job, instruction_set);
  const int64_t shares = (job.elements + kElementsPerWorker - 1) / kElementsPerWorker;
  if (shares == 0) return;
  threads = int(std::min<int64_t>(std::max(threads, 1), shares));
  const int64_t workers = threads == 1 ? 1 : std::min(shares, threads * kWorkersPerThread);
  const size_t horizon = size_t(job.horizon);
  std::vector<PhiloxStream> streams(size_t(threads) * (horizon + 1));
  const std::unique_ptr<uint32_t[]> signs(new uint32_t[size_t(threads) * horizon * kSignWords]);
  const bool low_rank = job.distribution == Distribution::kLowRank;
  const bool has_factors = low_rank || job.distribution == Distribution::kFlipout;
  const int64_t terms = job.horizon * (low_rank ? job.rank : 1);
  const size_t floats = has_factors ? size_t(factor_floats(terms)) : 0;
  const std::unique_ptr<float[]> factors(new float[size_t(threads) * floats]);
#pragma omp parallel num_threads(threads)
  {
    const DefaultFloatingPoint guard;
    const size_t thread = size_t(omp_get_thread_num());
    const Scratch scratch{streams.data() + thread * (horizon + 1),
                          signs.get() + thread * horizon * kSignWords,
                          factors.get() + thread * floats};
#pragma omp for schedule(dynamic, 1)
    for (int64_t worker = 0; worker < workers; ++worker) kernel(job, scratch, worker, workers);
  }
}

}  // namespace adamezo
