#include "adamezo/lanes_scalar.h"
#include "cpu/loops.h"

namespace adamezo {
const Kernels& portable_kernels() {
  static const Kernels kernels = kernels_over<ScalarLanes>("portable");
  return kernels;
}
}  // namespace adamezo
