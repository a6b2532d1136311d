// The kernels: every body compiled for the device. One .cu file for each distribution includes it,
// and one for the rules of buffered.cuh, so that they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/buffered.cuh"
#include "cuda/launch.h"

namespace adamezo {
namespace cuda {

constexpr int kThreads = 256;
// This allows 80 registers a thread, and 24 warps on a multiprocessor.
constexpr int kBlocksPerMultiprocessor = 3;

template <class Body>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    kernel(const __grid_constant__ DeviceJob job) {
  __shared__ float newest[kThreadElements][kThreads];
  __shared__ uint32_t scratch[kScratchWords][kThreads];
  extern __shared__ Direction table[];
  fill_table<typename Body::Directions>(job, table, int(threadIdx.x), kThreads);
  __syncthreads();
  Body::run(job, {table, &newest[0][threadIdx.x], &scratch[0][threadIdx.x], kThreads},
            int64_t(blockIdx.x) * kThreads + threadIdx.x, int64_t(gridDim.x) * kThreads);
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here; it must not surface in torch's next call
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// Enough blocks to keep all multiprocessors busy to the end, each with enough windows to be worth
// its table of directions.
inline int64_t blocks_for(int64_t elements, int device) {
  constexpr int64_t kWavesWanted = 8, kMostWindowsPerWarp = 16;
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "asking for the number of multiprocessors");
  constexpr int64_t kWarps = kThreads / kWarp;
  const int64_t windows = (elements + kWindow - 1) / kWindow;
  const int64_t wanted = kWavesWanted * multiprocessors * kBlocksPerMultiprocessor * kWarps;
  const int64_t share =
      std::min(std::max(windows / wanted, int64_t(1)), kMostWindowsPerWarp) * kWarps;
  return (windows + share - 1) / share;
}

template <class Body>
void launch_body(Body, const Job& job, const HighWords& highs, int device, uint64_t stream) {
  if (job.elements == 0) return;
  // The caller's runtime has made the device current already, and restores its own afterwards; this
  // call tells the copy of the runtime that is linked into this module.
  check(cudaSetDevice(device), "choosing the device");
  const int64_t blocks = blocks_for(job.elements, device);
  const size_t table = size_t(job.horizon) * sizeof(Direction);
  const auto function = kernel<Body>;
  constexpr size_t kWithoutAsking = 48 << 10,
                   kStatic = (kThreadElements + kScratchWords) * kThreads * 4;
  if (kStatic + table > kWithoutAsking)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(function),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, int(table)),
          ("asking for " + std::to_string(table) + " bytes of shared memory, 32 a direction")
              .c_str());
  for (const uint32_t high : highs)
    function<<<unsigned(blocks), kThreads, table, reinterpret_cast<cudaStream_t>(stream)>>>(
        DeviceJob(job, high));
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
