#include "cuda/kernels.cuh"

namespace adamezo {
namespace cuda {

void launch_tiles(const Job& job, int device, uint64_t stream) {
  if (job.elements == 0) return;
  check(cudaSetDevice(device), "choosing the device");
  const unsigned blocks = unsigned(blocks_for(job.elements, 1, kBlocksOfTiles, device));
  select_tiles(job, [&](auto body) {
    using B = decltype(body);
    low_rank_kernel<typename B::Body, typename B::Element>
        <<<blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(Parameters(job, 0));
  });
  check(cudaGetLastError(), "launching");
}

}  // namespace cuda
}  // namespace adamezo
