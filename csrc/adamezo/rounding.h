// The element types of weights, and the conversions to and from float32: loads are exact; stores
// round to nearest even, or stochastically: up with the probability of the fraction that is cut
// off, so that the mean of a store is the value. Any NaN stays a NaN; its payload is not part of
// the contract. A GPU has instructions that round to nearest, with subnormals and infinities as in
// IEEE 754.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

enum class ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Rounding : int { kNearest = 0, kStochastic = 1 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

ADAMEZO_HD float to_float32(float value) { return value; }
ADAMEZO_HD float to_float32(bfloat16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
ADAMEZO_HD float to_float32(float16 value) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(value.bits));
  return out;
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + (112u << 23)));
  // Subnormal: a whole number of 2^-24, exact in float32.
  return bits_to_float(sign | float_to_bits(float(int32_t(magnitude)) * 0x1p-24f));
#endif
}

ADAMEZO_HD void from_float32(float value, float& out) { out = value; }
ADAMEZO_HD void from_float32(float value, bfloat16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = is_nan ? 0x7fc0u : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
ADAMEZO_HD void from_float32(float value, float16& out) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and above
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the spacing is 2^-24, which is that of float32 at 1/2: one addition rounds.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = uint16_t(sign | half);
#endif
}

// Stochastic: `random` / 2^32, uniform in [0, 1), is added in units of the last place of the
// result, and the rest cut off. Values beyond the type's largest may become infinite, as to
// nearest; but float16 does not round up from it, as a weight at 65504 would then be lost in some
// store.
ADAMEZO_HD void from_float32(float value, uint32_t, float& out) { out = value; }
ADAMEZO_HD void from_float32(float value, uint32_t random, bfloat16& out) {
  const uint32_t bits = float_to_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = is_nan ? 0x7fc0u : uint16_t((bits + (random >> 16)) >> 16);
}
ADAMEZO_HD void from_float32(float value, uint32_t random, float16& out) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 65536 and above
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - (112u << 23) + (random >> 19)) >> 13;
    half = half < 0x7bffu ? half : 0x7bffu;
  } else if (magnitude < 0x00800000u) {
    half = 0;  // below 2^-126, where it would round up once in 2^102
  } else {
    // Below 2^-14 the unit stays 2^-24: the smaller the value, the more digits are cut off. Of more
    // than 31 digits the lowest count as 0.
    const uint32_t digits = 126u - (magnitude >> 23), beyond = digits > 31u ? digits - 31u : 0u;
    const uint32_t significand =
        beyond > 31u ? 0u : ((magnitude & 0x7fffffu) | 0x800000u) >> beyond;
    const uint32_t shift = digits - beyond;
    half = (significand + (random >> (32u - shift))) >> shift;
  }
  out.bits = uint16_t(sign | half);
}

}  // namespace adamezo
