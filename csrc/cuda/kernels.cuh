// The kernels: every body compiled for the device. One .cu file for each distribution includes it,
// and one for the rules of buffered.cuh, so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/low_rank.cuh"

namespace adamezo {
namespace cuda {

constexpr int kThreads = 256;
// This allows 80 registers a thread, and 24 warps on a multiprocessor.
constexpr int kBlocksPerMultiprocessor = 3;

// What a kernel gets: a job and the words that its launch carries, as CUDA copies all parameters
// when a launch is queued. Every toolkit and device has 4 KB of them, and this takes less than
// half.
struct Parameters {
  Parameters(const Job& job, uint32_t high) : job(job, high) {
    std::memcpy(words, job.directions, size_t(job.carried) * sizeof *words);
  }

  // Where a kernel finds the words.
  __device__ __forceinline__ Words on_device() const {
    return words_at(job.carried ? words : job.directions, job.horizon);
  }

  DeviceJob job;
  uint32_t words[kMostCarried];
};
static_assert(sizeof(Parameters) < 2048);

// The words that are needed again and again, in shared memory: reads there take fewer instructions
// and registers than those by an address that may be one of a parameter.
struct alignas(16) SharedWords {
  uint32_t direction;  // the first
  alignas(8) float step[2];
  float numbers[kRuleNumbers];

  // Copies one thread's part of them, for use after the block's next barrier.
  __device__ __forceinline__ void fill(const DeviceJob& job, const Words& from, int thread) {
    if (thread == 0) direction = from.directions[0];
    if (thread < 2) step[thread] = from.step[thread];
    if (job.numbers && thread < kRuleNumbers) numbers[thread] = from.numbers[thread];
  }
};

// Of a block's shared memory. Without signs there are none.
template <class Body>
constexpr int kCallsShared = Body::Directions::kSigns ? kThreads : 1;

template <class Body>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    kernel(const __grid_constant__ Parameters given) {
  __shared__ float newest[kThreadElements][kThreads];
  __shared__ uint32_t scratch[kScratchWords][kThreads];
  __shared__ Words16 calls[kCallsShared<Body>];
  __shared__ SharedWords shared;
  extern __shared__ Direction table[];
  Words words = given.on_device();
  fill_table<typename Body::Directions>(given.job, words, table, int(threadIdx.x), kThreads);
  shared.fill(given.job, words, int(threadIdx.x));
  __syncthreads();
  words = {&shared.direction, nullptr, nullptr, shared.step, shared.numbers};
  Words16* const of_warp = calls + threadIdx.x / kWarp * kWarp % kCallsShared<Body>;
  Body::run(given.job,
            {words, table, &newest[0][threadIdx.x], &scratch[0][threadIdx.x], kThreads, of_warp},
            int64_t(blockIdx.x) * kThreads + threadIdx.x, int64_t(gridDim.x) * kThreads);
}

// The threads of a block, on a GPU: this one.
template <class State>
struct ThisThread {
  State& state;

  template <class Do>
  __device__ __forceinline__ void each(Do act) const {
    act(int(threadIdx.x), state);
  }
  __device__ __forceinline__ void barrier() const { __syncthreads(); }
};

// A thread has sixteen independent chains of operations, so that 16 warps keep a multiprocessor
// busy, and 128 registers a thread hold the sums beside what finding an element takes.
constexpr int kBlocksOfTiles = 2;

template <class Body, class T>
__global__ void __launch_bounds__(kThreads, kBlocksOfTiles)
    low_rank_kernel(const __grid_constant__ Parameters given) {
  using State = typename Body::template State<T>;
  constexpr int kKept = State::kKept;
  __shared__ alignas(16) float factors[kFactorFloats<kKept>];
  __shared__ float kept[kKept == 0 ? 1 : kKept * kThreadElements][kThreads];
  __shared__ alignas(8) float coefficients[2 * kMostTerms];
  __shared__ alignas(Tile) unsigned char tile[sizeof(Tile)];
  __shared__ SharedWords shared;
  Words words = given.on_device();
  shared.fill(given.job, words, int(threadIdx.x));  // a tile begins with a barrier
  words.step = shared.step, words.numbers = shared.numbers;
  State state;
  walk_tiles<State>(
      given.job,
      {words, *reinterpret_cast<Tile*>(tile), factors, coefficients, &kept[0][0], kThreads},
      blockIdx.x, gridDim.x, ThisThread<State>{state});
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here; it must not surface in torch's next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// How many blocks share `count` windows or tiles, of which a block takes `at_once`. They come in
// whole waves of those that run at the same time, as a wave in part leaves multiprocessors idle; in
// several of them, each with enough work to be worth what a block does once, as no two blocks take
// the same time.
inline int64_t blocks_for(int64_t count, int64_t at_once, int blocks_at_once, int device) {
  constexpr int64_t kMostWaves = 8, kLeastRounds = 4;
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "asking for the number of multiprocessors");
  const int64_t wave = int64_t(multiprocessors) * blocks_at_once;
  const int64_t rounds = (count + at_once - 1) / at_once;
  const int64_t waves = std::clamp(rounds / (kLeastRounds * wave), int64_t(1), kMostWaves);
  return std::min(rounds, waves * wave);
}

template <class Body>
void launch_body(Body, const Job& job, const HighWords& highs, int device, uint64_t stream) {
  if (job.elements == 0) return;
  // The caller's runtime has made the device current already, and restores its own afterwards; this
  // call tells the copy of the runtime that is linked into this module.
  check(cudaSetDevice(device), "choosing the device");
  const int64_t blocks =
      blocks_for(job.elements, kThreads / kWarp, kBlocksPerMultiprocessor, device);
  const size_t table = size_t(job.horizon) * sizeof(Direction);
  const auto function = kernel<Body>;
  constexpr size_t kWithoutAsking = 48 << 10,
                   kStatic = (kThreadElements + kScratchWords) * kThreads * 4 +
                             kCallsShared<Body> * sizeof(Words16) + sizeof(SharedWords);
  if (kStatic + table > kWithoutAsking) {
    // All that the device has: two threads that ask for as much as each needs would race.
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "asking for the size of shared memory");
    const int64_t room = most - int64_t(kStatic);
    if (int64_t(table) > room)
      throw std::runtime_error(
          std::to_string(job.horizon) + " directions need " + std::to_string(table) +
          " bytes of shared memory, and the device has " + std::to_string(room));
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(function),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(room)),
          "asking for shared memory");
  }
  for (const uint32_t high : highs)
    function<<<unsigned(blocks), kThreads, table, reinterpret_cast<cudaStream_t>(stream)>>>(
        Parameters(job, high));
  check(cudaGetLastError(), "launching");
}

template <class D>
void launch(const Job& job, const HighWords& highs, int device, uint64_t stream) {
  select<D>(job, [&](auto body) { launch_body(body, job, highs, device, stream); });
}

// Returns whether a rule's body runs the job.
template <class D>
bool launch_rule(const Job& job, const HighWords& highs, int device, uint64_t stream) {
  return select_rule<D>(job, [&](auto body) { launch_body(body, job, highs, device, stream); });
}

}  // namespace cuda
}  // namespace adamezo
