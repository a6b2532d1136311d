#include "cuda/kernels.cuh"

namespace adamezo {
namespace cuda {

template void launch<Rademacher>(const Job&, const HighWords&, int, uint64_t);

}  // namespace cuda
}  // namespace adamezo
