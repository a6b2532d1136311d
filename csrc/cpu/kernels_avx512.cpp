// gcc 12's own avx512fintrin.h passes an uninitialised operand behind an all-ones mask, and warns.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "cpu/lanes_avx512.h"
#include "cpu/loops.h"

namespace adamezo {
const InstructionSet& avx512_kernels() {
  static const InstructionSet set = instruction_set_over<Avx512Lanes>("avx512");
  return set;
}
}  // namespace adamezo
