// `fast` normals: those of normal.h through a GPU's special-function unit, in half the
// instructions.
//
// The same real-number function of the same two words, with z0 and z1 written as one rotation
//   R = sqrt(-2 ln u),  z0 = R sin(pi/4 (f + 1)),  z1 = R cos(pi/4 (f + 1)),
// so a `fast` normal is near the `exact` one of its place, but not equal to it, and only devices of
// one kind agree on its bits. On the host the same formula runs through libm, for tests.
#pragma once

#include <cmath>

#include "adamezo/config.h"

namespace adamezo {

#if defined(__CUDA_ARCH__)
// PTX instructions by name, as the intrinsics of these names also handle subnormals, which do not
// occur here.
#define ADAMEZO_SPECIAL_FUNCTION(name, instruction)                     \
  __device__ __forceinline__ float name(float a) {                      \
    float result;                                                       \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a)); \
    return result;                                                      \
  }
ADAMEZO_SPECIAL_FUNCTION(fast_log2, "lg2")
ADAMEZO_SPECIAL_FUNCTION(fast_sqrt, "sqrt")
ADAMEZO_SPECIAL_FUNCTION(fast_sin, "sin")
ADAMEZO_SPECIAL_FUNCTION(fast_cos, "cos")
#undef ADAMEZO_SPECIAL_FUNCTION
#else
ADAMEZO_HD float fast_log2(float a) { return std::log2(a); }
ADAMEZO_HD float fast_sqrt(float a) { return std::sqrt(a); }
ADAMEZO_HD float fast_sin(float a) { return std::sin(a); }
ADAMEZO_HD float fast_cos(float a) { return std::cos(a); }
#endif

// The bits of `a` where those of `mask` are set, else those of `b`.
template <uint32_t mask>
ADAMEZO_HD uint32_t pick(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // One instruction, which the compiler does not find on its own.
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xe2;" : "=r"(result) : "r"(a), "n"(mask), "r"(b));
  return result;
#else
  return (a & mask) | (b & ~mask);
#endif
}

// The bits that are set in numbers made from random words: 2.0f as an exponent, and 1.
constexpr uint32_t kFastOnes = 0x40000001u;

// Turns a call's four words into four normals. `ones` is kFastOnes: a GPU's instruction for
// (x & mask) | (ones & ~mask) takes one constant, so the other one should be in a register.
ADAMEZO_HD void fast_normals(const uint32_t x[4], uint32_t ones, float z[4]) {
  for (int i = 0; i < 4; i += 2) {
    const float u = float(int32_t(pick<0x7ffffffeu>(x[i], ones))) * 0x1p-31f;
    // The approximate logarithm may be above 0 where u is next to 1. -2 ln 2 = -1.386...
    const float radius = fast_sqrt(std::fabs(fast_log2(u) * -1.3862943611198906f));
    // f + 3 with the sign of x1. A quarter turn on, sin(pi/4 (f + 1)) is -cos(pi/4 (f + 3)), and
    // cos(pi/4 (f + 1)) is sin(pi/4 (f + 3)), which takes the sign along as sin is odd.
    const float angle = bits_to_float(pick<0x807fffffu>(x[i + 1], ones)) * 0.7853981633974483f;
    const float z0 = radius * fast_cos(angle);
    z[i] = bits_to_float(float_to_bits(z0) ^ (~x[i] & 0x80000000u));
    z[i + 1] = radius * fast_sin(angle);
  }
}

}  // namespace adamezo
