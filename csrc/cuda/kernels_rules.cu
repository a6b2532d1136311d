#include "cuda/kernels.cuh"

namespace adamezo {
namespace cuda {

template bool launch_rule<Exact>(const Job&, const HighWords&, int, uint64_t);
template bool launch_rule<Fast>(const Job&, const HighWords&, int, uint64_t);
template bool launch_rule<Rademacher>(const Job&, const HighWords&, int, uint64_t);

}  // namespace cuda
}  // namespace adamezo
