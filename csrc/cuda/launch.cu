#include <stdexcept>

#include "cuda/kernels.cuh"

namespace adamezo {
namespace cuda {

extern template void launch<Exact>(const Job&, const HighWords&, int, uint64_t);
extern template void launch<Fast>(const Job&, const HighWords&, int, uint64_t);
extern template void launch<Rademacher>(const Job&, const HighWords&, int, uint64_t);
extern template bool launch_rule<Exact>(const Job&, const HighWords&, int, uint64_t);
extern template bool launch_rule<Fast>(const Job&, const HighWords&, int, uint64_t);
extern template bool launch_rule<Rademacher>(const Job&, const HighWords&, int, uint64_t);
void launch_tiles(const Job&, int, uint64_t);

namespace {

__global__ void check_sqrt(uint32_t first, uint32_t last, unsigned long long* count) {
  unsigned long long wrong = 0;
  for (uint64_t bits = first + blockIdx.x * blockDim.x + threadIdx.x; bits <= last;
       bits += gridDim.x * blockDim.x) {
    const float value = __uint_as_float(uint32_t(bits));
    wrong += ThreadLanes::sqrt(value) != __fsqrt_rn(value);
  }
  if (wrong) atomicAdd(count, wrong);
}

}  // namespace
}  // namespace cuda

void cuda_launch(const Job& job, const HighWords& highs, int device, uint64_t stream) {
  const auto launch = [&](auto of) {
    using D = decltype(of);
    if (!cuda::launch_rule<D>(job, highs, device, stream))
      cuda::launch<D>(job, highs, device, stream);
  };
  switch (job.distribution) {
    case Distribution::kExact:
      return launch(cuda::Exact());
    case Distribution::kFast:
      return launch(cuda::Fast());
    case Distribution::kRademacher:
      return launch(cuda::Rademacher());
    case Distribution::kLowRank:
      return cuda::launch_tiles(job, device, stream);
    case Distribution::kFlipout:
      throw std::invalid_argument("the CUDA kernels have no `flipout` directions");
  }
}

void cuda_check_sqrt(uint64_t* count, int device, uint64_t stream) {
  cuda::check(cudaSetDevice(device), "choosing the device");
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  cuda::check_sqrt<<<1024, 256, 0, on>>>(float_to_bits(0x1p-25f), float_to_bits(22.0f),
                                         reinterpret_cast<unsigned long long*>(count));
  cuda::check_sqrt<<<1, 1, 0, on>>>(0, 0, reinterpret_cast<unsigned long long*>(count));
  cuda::check(cudaGetLastError(), "launching");
}

}  // namespace adamezo
