#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/low_rank.cuh"

namespace adamezo {
namespace {

template <class D>
void on_host(const Job& job, const HighWords& highs, int64_t blocks, int threads) {
  using namespace cuda;
  std::vector<Direction> table(static_cast<size_t>(job.horizon));
  std::vector<float> newest(static_cast<size_t>(kThreadElements * threads));
  std::vector<uint32_t> scratch(static_cast<size_t>(kScratchWords * threads));
  Words16 calls[kWarp];
  const auto run = [&](auto body) {
    for (const uint32_t high : highs) {
      const DeviceJob device_job(job, high);
      for (int64_t block = 0; block < blocks; ++block) {
        for (int thread = 0; thread < threads; ++thread)
          fill_table<D>(device_job, job, table.data(), thread, threads);
        for (int thread = 0; thread < threads; ++thread)
          body.run(
              device_job,
              {job, table.data(), newest.data() + thread, scratch.data() + thread, threads, calls},
              block * threads + thread, blocks * threads);
      }
    }
  };
  if (!select_rule<D>(job, run)) select<D>(job, run);
}

// The threads of a block, one after the other.
template <class State>
struct AllThreads {
  std::vector<State>& states;

  template <class Do>
  void each(Do act) const {
    for (size_t thread = 0; thread < states.size(); ++thread) act(int(thread), states[thread]);
  }
  void barrier() const {}
};

void tiles_on_host(const Job& job, int64_t blocks, int threads) {
  using namespace cuda;
  const DeviceJob device_job(job, 0);
  std::vector<float> factors(kFactorFloats<0>), coefficients(2 * kMostTerms);
  Tile tile{};
  select_tiles(job, [&](auto body) {
    using B = decltype(body);
    using State = typename B::Body::template State<typename B::Element>;
    std::vector<State> states(static_cast<size_t>(threads));
    std::vector<float> kept(static_cast<size_t>(State::kKept * kThreadElements * threads));
    const TileSpace space{job, tile, factors.data(), coefficients.data(), kept.data(), threads};
    for (int64_t block = 0; block < blocks; ++block)
      walk_tiles<State>(device_job, space, block, blocks, AllThreads<State>{states});
  });
}

}  // namespace

int64_t count_windows(Segment* segments, int64_t count, uint64_t offset) {
  int64_t windows = 0;
  for (int64_t s = 0; s < count; ++s) {
    segments[s].first = windows;
    windows += segments[s].rows * cuda::windows_of_row(segments[s], offset);
  }
  return windows;
}

int64_t count_tiles(Segment* segments, int64_t count, uint64_t offset) {
  int64_t tiles = 0;
  for (int64_t s = 0; s < count; ++s) {
    segments[s].first = tiles;
    tiles += tiles_of(segments[s], offset).count;
  }
  return tiles;
}

void cuda_quotients_on_host(const float* a, const float* b, const float* y, float* out,
                            int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = cuda::usual_quotient(a[i], b[i], y[i]);
}

void cuda_roots_on_host(const float* a, const float* y, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = cuda::usual_sqrt(a[i], y[i]);
}

void cuda_on_host(const Job& job, const HighWords& highs, int64_t blocks, int threads) {
  switch (job.distribution) {
    case Distribution::kExact:
      return on_host<cuda::Exact>(job, highs, blocks, threads);
    case Distribution::kFast:
      return on_host<cuda::Fast>(job, highs, blocks, threads);
    case Distribution::kRademacher:
      return on_host<cuda::Rademacher>(job, highs, blocks, threads);
    case Distribution::kLowRank:
      return tiles_on_host(job, blocks, threads);
    case Distribution::kFlipout:
      throw std::invalid_argument("the CUDA kernels have no `flipout` directions");
  }
}

}  // namespace adamezo
