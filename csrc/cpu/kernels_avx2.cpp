#include "cpu/lanes_avx2.h"
#include "cpu/loops.h"

namespace adamezo {
const InstructionSet& avx2_kernels() {
  static const InstructionSet set = instruction_set_over<Avx2Lanes>("avx2");
  return set;
}
}  // namespace adamezo
