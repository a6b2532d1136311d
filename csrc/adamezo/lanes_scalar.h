// Lanes of width one: portable C++ on the CPU, one thread's registers on a GPU.
//
// The core is written over a set of lanes, which has `kWidth` blocks side by side and
//   Words     one 32-bit word of each block, in the form that Philox needs
//   I, F      one integer or float32 of each block
//   group_blocks   which block of a group each lane works on: chosen so that `natural` is cheap
//   natural   reorders "output j of every block" to the order in memory
//   flip_signs     flips the elements, in memory order, whose bit in the low kWidth bits is set
//   max, min  b unless a is larger (smaller), so b where either is a NaN
//   store     rounds to nearest, or stochastically with a random word for each element (rounding.h)
// Every operation rounds as IEEE 754 says; nothing is contracted.
#pragma once

#include <cmath>

#include "adamezo/config.h"
#include "adamezo/rounding.h"

namespace adamezo {

struct ScalarLanes {
  static constexpr int kWidth = 1;
  using Words = uint32_t;
  using Product = uint64_t;
  using I = uint32_t;
  using F = float;

  static ADAMEZO_HD Words words(uint32_t value) { return value; }
  static ADAMEZO_HD Words group_blocks(uint32_t first) { return first; }
  static ADAMEZO_HD Product multiply(Words a, uint32_t b) { return uint64_t(a) * b; }
  static ADAMEZO_HD Words hi(Product product) { return uint32_t(product >> 32); }
  static ADAMEZO_HD Words lo(Product product) { return uint32_t(product); }
  static ADAMEZO_HD Words exclusive_or(Words a, Words b) { return a ^ b; }
  static ADAMEZO_HD Words exclusive_or(Words a, Words b, Words c) { return a ^ b ^ c; }
  static ADAMEZO_HD I integers(Words a) { return a; }

  static ADAMEZO_HD I bits(F a) { return float_to_bits(a); }
  static ADAMEZO_HD F from_bits(I a) { return bits_to_float(a); }
  static ADAMEZO_HD F to_float(I a) { return float(int32_t(a)); }
  static ADAMEZO_HD I subtract(I a, I b) { return a - b; }
  static ADAMEZO_HD I bit_and(I a, uint32_t b) { return a & b; }
  static ADAMEZO_HD I and_or(I a, uint32_t mask, uint32_t ones) { return (a & mask) | ones; }

  static ADAMEZO_HD F f(float value) { return value; }
  static ADAMEZO_HD F max(F a, F b) { return a > b ? a : b; }
  static ADAMEZO_HD F min(F a, F b) { return a < b ? a : b; }
  static ADAMEZO_HD F flip_sign(F a, I sign) { return from_bits(bits(a) ^ (sign & 0x80000000u)); }
  static ADAMEZO_HD F flip_signs(F a, uint32_t bits) { return flip_sign(a, bits << 31); }
#if defined(__CUDA_ARCH__)
  static ADAMEZO_HD F add(F a, F b) { return __fadd_rn(a, b); }
  static ADAMEZO_HD F mul(F a, F b) { return __fmul_rn(a, b); }
  static ADAMEZO_HD F div(F a, F b) { return __fdiv_rn(a, b); }
  static ADAMEZO_HD F sqrt(F a) { return __fsqrt_rn(a); }
  static ADAMEZO_HD F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
#else
  static ADAMEZO_HD F add(F a, F b) { return a + b; }
  static ADAMEZO_HD F mul(F a, F b) { return a * b; }
  static ADAMEZO_HD F div(F a, F b) { return a / b; }
  static ADAMEZO_HD F sqrt(F a) { return std::sqrt(a); }
  static ADAMEZO_HD F fma(F a, F b, F c) { return std::fma(a, b, c); }
#endif
  static ADAMEZO_HD F fms(F a, F b, F c) { return fma(a, b, -c); }
  static ADAMEZO_HD F fnma(F a, F b, F c) { return fma(-a, b, c); }

  static ADAMEZO_HD void natural(F[4]) {}

  template <class T>
  static ADAMEZO_HD F load(const T* from) {
    return to_float32(*from);
  }
  template <class T>
  static ADAMEZO_HD void store(F value, T* to) {
    from_float32(value, *to);
  }
  template <class T>
  static ADAMEZO_HD void store(F value, I random, T* to) {
    from_float32(value, random, *to);
  }
  static ADAMEZO_HD void store_words(I value, uint32_t* to) { *to = value; }
};

}  // namespace adamezo
