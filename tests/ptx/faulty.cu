// A kernel with a fault of every kind that a launch is checked for; test_found_faults.py runs them.
#include <cuda_runtime.h>

#include <string>

namespace {

constexpr int kThreads = 64;
extern __shared__ float dynamic[];

// out[i] = in[kThreads - 1 - i], by way of shared memory.
__global__ void right(const float* in, float* out) {
  __shared__ float passed[kThreads];
  passed[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = passed[kThreads - 1 - threadIdx.x];
}

__global__ void without_the_barrier(const float* in, float* out) {
  __shared__ float passed[kThreads];
  passed[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = passed[kThreads - 1 - threadIdx.x];
}

__global__ void without_the_second_barrier(const float* in, float* out) {
  __shared__ float passed[kThreads];
  passed[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = passed[kThreads - 1 - threadIdx.x];
  passed[threadIdx.x] = 0;
  __syncthreads();
  if (passed[threadIdx.x] != 0) out[threadIdx.x] = 1;
}

// The same by way of a warp's own part of shared memory.
template <bool kBetween, bool kAfter>
__device__ void through_warps(const float* in, float* out) {
  __shared__ float passed[kThreads];
  const int warp = int(threadIdx.x) / 32 * 32, lane = int(threadIdx.x) % 32;
  passed[threadIdx.x] = in[kThreads / 2 - warp + lane];
  if (kBetween) __syncwarp();
  out[threadIdx.x] = passed[warp + 31 - lane];
  if (kAfter) __syncwarp();
  passed[threadIdx.x] = 0;
  __syncwarp();
  if (passed[threadIdx.x] != 0) out[threadIdx.x] = 1;
}
__global__ void right_in_warps(const float* in, float* out) { through_warps<true, true>(in, out); }
__global__ void without_the_barrier_of_warps(const float* in, float* out) {
  through_warps<false, true>(in, out);
}
__global__ void without_the_second_barrier_of_warps(const float* in, float* out) {
  through_warps<true, false>(in, out);
}

__global__ void barrier_of_warps_between_warps(const float* in, float* out) {
  __shared__ float passed[kThreads];
  passed[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = passed[kThreads - 1 - threadIdx.x];
}

__global__ void missed_barrier_of_a_warp(const float* in, float* out) {
  if (threadIdx.x != 5) __syncwarp();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void two_writers(const float* in, float* out) {
  __shared__ float passed[kThreads];
  passed[threadIdx.x / 2] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = passed[threadIdx.x / 2];
}

__global__ void missed_barrier(const float* in, float* out) {
  if (threadIdx.x != 5) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void never_written(const float*, float* out) {
  __shared__ float passed[kThreads];
  if (threadIdx.x != 5) passed[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = passed[threadIdx.x];
}

__global__ void misaligned_load(const float* in, float* out) {
  const float4 four = *reinterpret_cast<const float4*>(in + 4 * (threadIdx.x / 4) + 1);
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

__global__ void misaligned_store(const float* in, float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<float2*>(out + 1) = make_float2(in[0], in[1]);
}

__global__ void misaligned_shared(const float* in, float* out) {
  dynamic[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float4 four = reinterpret_cast<const float4*>(dynamic + 1)[threadIdx.x / 8];
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}

__global__ void behind_shared_memory(const float* in, float* out) {
  dynamic[threadIdx.x + 1] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = dynamic[threadIdx.x + 1];
}

__global__ void behind_the_input(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}

__global__ void before_the_output(const float* in, float* out) {
  out[int(threadIdx.x) - 1] = in[threadIdx.x];
}

// Of 64 floats that lie among the parameters, or elsewhere: the kernel cannot tell.
struct Some {
  float values[kThreads];
};
__device__ const float* one_of(const float* in, const Some& some) {
  return in[0] == 1 ? some.values : in;
}
__global__ void right_from_parameters(const float* in, float* out,
                                      const __grid_constant__ Some some) {
  out[threadIdx.x] = one_of(in, some)[kThreads - 1 - threadIdx.x];
}
__global__ void behind_the_parameters(const float* in, float* out,
                                      const __grid_constant__ Some some) {
  out[threadIdx.x] = one_of(in, some)[threadIdx.x + 1];
}
__global__ void misaligned_parameter(const float* in, float* out,
                                     const __grid_constant__ Some some) {
  const float2 two = *reinterpret_cast<const float2*>(one_of(in, some) + threadIdx.x % 2);
  out[threadIdx.x] = two.x + two.y;
}

__global__ void write_of_the_input(const float* in, float*) {
  const_cast<float*>(in)[threadIdx.x] = 1;
}

__global__ void __launch_bounds__(kThreads) bounded(const float* in, float* out) {
  out[threadIdx.x % kThreads] = in[threadIdx.x % kThreads];
}

std::string message;

}  // namespace

// What CUDA says of the launch, or nothing. `in` and `out` have 64 floats each.
extern "C" __attribute__((visibility("default"))) const char* launch(const char* name,
                                                                     const float* in, float* out) {
  const std::string of = name;
  constexpr int kBytes = kThreads * sizeof(float);
#define LAUNCH(kernel) \
  if (of == #kernel) kernel<<<1, kThreads, kBytes>>>(in, out)
  LAUNCH(right);
  LAUNCH(without_the_barrier);
  LAUNCH(without_the_second_barrier);
  LAUNCH(right_in_warps);
  LAUNCH(without_the_barrier_of_warps);
  LAUNCH(without_the_second_barrier_of_warps);
  LAUNCH(barrier_of_warps_between_warps);
  LAUNCH(missed_barrier_of_a_warp);
  LAUNCH(two_writers);
  LAUNCH(missed_barrier);
  LAUNCH(never_written);
  LAUNCH(misaligned_load);
  LAUNCH(misaligned_store);
  LAUNCH(misaligned_shared);
  LAUNCH(behind_shared_memory);
  LAUNCH(behind_the_input);
  LAUNCH(before_the_output);
  LAUNCH(write_of_the_input);
  LAUNCH(bounded);
  Some some;
  for (int i = 0; i < kThreads; ++i) some.values[i] = in[i];
#define LAUNCH_WITH(kernel) \
  if (of == #kernel) kernel<<<1, kThreads>>>(in, out, some)
  LAUNCH_WITH(right_from_parameters);
  LAUNCH_WITH(behind_the_parameters);
  LAUNCH_WITH(misaligned_parameter);
  if (of == "more threads than bounded") bounded<<<1, kThreads + 1>>>(in, out);
  if (of == "more threads than there are") right<<<1, 1025>>>(in, out);
  if (of == "no blocks") right<<<0, kThreads>>>(in, out);
  if (of == "a second dimension") right<<<dim3(1, 2), kThreads>>>(in, out);
  if (of == "shared memory not asked for") right<<<1, kThreads, 48 << 10>>>(in, out);
  if (of == "shared memory asked for") {
    cudaFuncSetAttribute(right, cudaFuncAttributeMaxDynamicSharedMemorySize, 48 << 10);
    right<<<1, kThreads, 48 << 10>>>(in, out);
  }
  if (of == "more shared memory than there is")
    cudaFuncSetAttribute(bounded, cudaFuncAttributeMaxDynamicSharedMemorySize, (227 << 10) + 1);
  const cudaError_t error = cudaGetLastError();
  message = error == cudaSuccess ? "" : cudaGetErrorString(error);
  return message.c_str();
}
