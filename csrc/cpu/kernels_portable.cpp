#include "adamezo/lanes_scalar.h"
#include "cpu/loops.h"

namespace adamezo {
const InstructionSet& portable_kernels() {
  static const InstructionSet set = instruction_set_over<ScalarLanes>("portable");
  return set;
}
}  // namespace adamezo
