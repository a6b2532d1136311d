// Stochastic rounding of four numbers at a time: the bits of from_float32 in adamezo/rounding.h, in
// fewer instructions for the usual values of weights.
#pragma once

#include "adamezo/rounding.h"

namespace adamezo {
namespace cuda {

ADAMEZO_HD void round_stochastically(const float values[4], const uint32_t random[4],
                                     bfloat16 out[4]) {
  ADAMEZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t sum = float_to_bits(values[i]) + (random[i] >> 16);
    out[i].bits = values[i] != values[i] ? uint16_t(0x7fc0u) : uint16_t(sum >> 16);
  }
}

ADAMEZO_HD void round_stochastically(const float values[4], const uint32_t random[4],
                                     float16 out[4]) {
  constexpr uint32_t kLeast = 0x38800000u, kTooLarge = 0x47800000u;  // 2^-14 and 2^16
  constexpr uint32_t kInfinity = 0x7f800000u;
  uint32_t above[4];  // kLeast; a subnormal of float16 wraps around
  bool usual = true;
  ADAMEZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    above[i] = (float_to_bits(values[i]) & 0x7fffffffu) - kLeast;
    usual &= above[i] <= kInfinity - kLeast;
  }
  ADAMEZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (usual) {
      const uint32_t half = (above[i] + 0x00800000u + (random[i] >> 19)) >> 13;
      const uint32_t sign = (float_to_bits(values[i]) >> 16) & 0x8000u;
      const uint32_t most = above[i] < kTooLarge - kLeast ? 0x7bffu : 0x7c00u;
      out[i].bits = uint16_t(sign | (half < most ? half : most));
    } else {
      from_float32(values[i], random[i], out[i]);
    }
  }
}

}  // namespace cuda
}  // namespace adamezo
