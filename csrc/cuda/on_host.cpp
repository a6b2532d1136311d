#include <stdexcept>

#include "cuda/buffered.cuh"
#include "cuda/launch.h"

namespace adamezo {
namespace {

template <class D>
void on_host(const Job& job, const HighWords& highs, int64_t blocks, int threads) {
  using namespace cuda;
  std::vector<Direction> table(static_cast<size_t>(job.horizon));
  std::vector<float> newest(static_cast<size_t>(kThreadElements * threads));
  std::vector<uint32_t> scratch(static_cast<size_t>(kScratchWords * threads));
  const auto run = [&](auto body) {
    for (const uint32_t high : highs) {
      const DeviceJob device_job(job, high);
      for (int64_t block = 0; block < blocks; ++block) {
        for (int thread = 0; thread < threads; ++thread)
          fill_table<D>(device_job, table.data(), thread, threads);
        for (int thread = 0; thread < threads; ++thread)
          body.run(device_job,
                   {table.data(), newest.data() + thread, scratch.data() + thread, threads},
                   block * threads + thread, blocks * threads);
      }
    }
  };
  if (!select_rule<D>(job, run)) select<D>(job, run);
}

}  // namespace

void cuda_on_host(const Job& job, const HighWords& highs, int64_t blocks, int threads) {
  switch (job.distribution) {
    case Distribution::kExact:
      return on_host<cuda::Exact>(job, highs, blocks, threads);
    case Distribution::kFast:
      return on_host<cuda::Fast>(job, highs, blocks, threads);
    case Distribution::kRademacher:
      return on_host<cuda::Rademacher>(job, highs, blocks, threads);
    case Distribution::kLowRank:
    case Distribution::kFlipout:
      throw std::invalid_argument("the CUDA kernels have no `lowrank` and `flipout` directions");
  }
}

}  // namespace adamezo
