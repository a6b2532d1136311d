#include "cpu/lanes_avx2.h"
#include "cpu/loops.h"

namespace adamezo {
const Kernels& avx2_kernels() {
  static const Kernels kernels = kernels_over<Avx2Lanes>("avx2");
  return kernels;
}
}  // namespace adamezo
