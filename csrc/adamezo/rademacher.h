// `rademacher` signs: a Philox call gives 128 of them, one per bit. Element i is bit i % 32 of word
// (i / 32) % 4 of the call whose block is i / 128; a bit that is set stands for -1.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

constexpr int kSignsPerCall = 128;

// The sign of the element `i` places after a word's first, i in [0, 32), as +1 or -1.
ADAMEZO_HD float sign_of(uint32_t word, int i) {
  return bits_to_float(0x3f800000u | ((word << (31 - i)) & 0x80000000u));
}

}  // namespace adamezo
