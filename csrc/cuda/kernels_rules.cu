#include "cuda/kernels.cuh"

namespace adamezo {
namespace cuda {

template void launch_rule<Exact>(Operation, const Job&, const HighWords&, int, uint64_t);
template void launch_rule<Fast>(Operation, const Job&, const HighWords&, int, uint64_t);
template void launch_rule<Rademacher>(Operation, const Job&, const HighWords&, int, uint64_t);

}  // namespace cuda
}  // namespace adamezo
