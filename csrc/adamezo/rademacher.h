// `rademacher` signs: a Philox call gives 128 of them, one per bit. Element i is bit i % 32 of word
// (i / 32) % 4 of the call whose block is i / 128; a bit that is set stands for -1.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

constexpr int kSignsPerCall = 128;

// `value` times the sign of the element `i` places after a word's first, i in [0, 32).
ADAMEZO_HD float with_sign(float value, uint32_t word, int i) {
  return bits_to_float(float_to_bits(value) ^ ((word << (31 - i)) & 0x80000000u));
}

}  // namespace adamezo
