// Host/device qualifiers and bit casts, which every header of the numerical core needs.
//
// The core is compiled for the CPU and for CUDA from the same source. It allocates nothing, uses
// neither torch nor Python, and its results are defined bit for bit; so it must not be compiled
// with flags that let a compiler change the value of an expression.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FAST_MATH__)
#error "adamezo's streams are defined bit for bit: build it without -ffast-math"
#endif

#if defined(__CUDACC__)
#define ADAMEZO_HD __host__ __device__ __forceinline__
#define ADAMEZO_INLINE_LAMBDA
#if defined(__CUDA_ARCH__)
#define ADAMEZO_UNROLL _Pragma("unroll")
#define ADAMEZO_NO_UNROLL _Pragma("unroll 1")
#else  // nvcc's pass for the host, whose compiler lacks these pragmas
#define ADAMEZO_UNROLL
#define ADAMEZO_NO_UNROLL
#endif
#else
// always_inline also keeps these functions from being emitted out of line: a copy compiled with
// AVX-512 flags must never be the one that the linker picks for a machine without them.
#define ADAMEZO_HD inline __attribute__((always_inline))
#define ADAMEZO_INLINE_LAMBDA __attribute__((always_inline))
#define ADAMEZO_UNROLL _Pragma("GCC unroll 16")
#define ADAMEZO_NO_UNROLL
#endif

namespace adamezo {

ADAMEZO_HD uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

ADAMEZO_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

}  // namespace adamezo
