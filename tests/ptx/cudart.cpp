// The part of the CUDA runtime that the module's host code calls, for one device without memory of
// its own. A launch runs at once, in the calling thread.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "launch.h"

#define FOR_PYTHON extern "C" __attribute__((visibility("default")))

namespace {

using ptx::Entry;

// Of an H100; the first is what a kernel gets without asking.
constexpr int kSharedWithoutAsking = 48 << 10, kMostShared = 227 << 10;

struct Kernel {
  const Entry* entry;
  int most_dynamic_shared;
  unsigned long long launches, blocks;
};

// Both are filled before main, in any order of files.
std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}
std::map<const void*, std::string>& names_by_stub() {
  static std::map<const void*, std::string> all;
  return all;
}

std::mutex mutex;
cudaError_t last_error;
std::string last_message;
int multiprocessors = 1;

cudaError_t failed(cudaError_t error, const std::string& message) {
  last_error = error;
  last_message = message;
  return error;
}

Kernel* kernel_of(const void* stub) {
  const auto name = names_by_stub().find(stub);
  if (name == names_by_stub().end()) return nullptr;
  const auto kernel = kernels().find(name->second);
  return kernel == kernels().end() ? nullptr : &kernel->second;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local Configuration configuration;

}  // namespace

ptx::Registration::Registration(const Entry* entries) {
  for (; entries->name; ++entries)
    kernels()[entries->name] = {entries, kSharedWithoutAsking - int(entries->static_shared), 0, 0};
}

extern "C" {

// ---- what nvcc's stubs call -------------------------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names_by_stub()[stub] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                     struct CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<void**>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* stub) {
  *out = reinterpret_cast<cudaKernel_t>(kernel_of(stub));
  return *out ? cudaSuccess : failed(cudaErrorInvalidDeviceFunction, "a kernel without PTX");
}

cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  const std::lock_guard<std::mutex> guard(mutex);
  auto& kernel = *reinterpret_cast<Kernel*>(handle);
  const Entry& entry = *kernel.entry;
  // Translated code knows the first dimension alone.
  if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y != 1 || grid.z != 1)
    return failed(cudaErrorInvalidConfiguration, "a grid of impossible shape");
  if (block.x == 0 || block.x > 1024 || block.x > entry.most_threads || block.y != 1 ||
      block.z != 1)
    return failed(cudaErrorInvalidConfiguration, "a block of impossible shape");
  if (shared > size_t(std::max(kernel.most_dynamic_shared, 0)))
    return failed(cudaErrorInvalidValue, "more dynamic shared memory than was asked for");
  const ptx::u32* begins = entry.parameters;
  std::vector<ptx::u64> parameters(begins[entry.parameter_count] / 8 + 1);
  auto* const to = reinterpret_cast<unsigned char*>(parameters.data());
  for (int i = 0; i < entry.parameter_count; ++i)
    std::memcpy(to + begins[i], arguments[i], begins[i + 1] - begins[i]);
  ++kernel.launches;
  kernel.blocks += grid.x;
  const std::string fault = run_launch(entry, to, grid.x, block.x, ptx::u32(shared));
  return fault.empty() ? cudaSuccess : failed(cudaErrorLaunchFailure, fault);
}

// ---- what csrc/cuda calls ---------------------------------------------------------------------

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  Kernel* const kernel = kernel_of(stub);
  if (!kernel || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return failed(cudaErrorInvalidValue, "an attribute or a kernel that is not known here");
  if (value < 0 || value + int(kernel->entry->static_shared) > kMostShared)
    return failed(cudaErrorInvalidValue, "more shared memory than there is");
  kernel->most_dynamic_shared = value;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device == 0 && attribute == cudaDevAttrMultiProcessorCount)
    *value = multiprocessors;
  else if (device == 0 && attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    *value = kMostShared;
  else
    return failed(cudaErrorInvalidValue, "an attribute or a device that is not known here");
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : failed(cudaErrorInvalidDevice, "not the only device");
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    default:
      return "another error of CUDA";
  }
}
const char* cudaGetErrorString(cudaError_t) { return last_message.c_str(); }

}  // extern "C"

// ---- for launched.py --------------------------------------------------------------------------

FOR_PYTHON void ptx_allow(const ptx::Range* first, int count) { ptx::allow(first, count); }

FOR_PYTHON void ptx_set(int multiprocessors_now, unsigned seed) {
  multiprocessors = multiprocessors_now;
  ptx::shuffle_by(seed);
}

// Adds to a file a line for each kernel: launches, blocks, for each piece whether it ran, the name.
FOR_PYTHON int ptx_report(const char* path) {
  FILE* const file = std::fopen(path, "a");
  if (!file) return 1;
  for (const auto& [name, kernel] : kernels()) {
    std::string covered;
    for (ptx::u32 i = 0; i < kernel.entry->pieces; ++i)
      covered += kernel.entry->covered[i] ? '1' : '0';
    std::fprintf(file, "%llu %llu %s %s\n", kernel.launches, kernel.blocks, covered.c_str(),
                 name.c_str());
  }
  return std::fclose(file);
}
