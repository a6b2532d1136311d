// `lowrank` directions: of a parameter seen as a matrix with `columns` columns,
//
//   z[i, j] = sum of u_q[i] v_q[j] over q < rank
//
// The first term is a product, the others are added by fma in the order of q. v_q[j] is the exact
// normal of element j under Purpose::kColumn, where q takes the place of the high block word.
// u_q[i] is that of element i under Purpose::kRow, times 1 / sqrt(rank) in float32 where rank is
// not 1. So there are at most 2^34 rows and columns. A parameter of one dimension has exact
// normals.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

constexpr int64_t kLargestRank = 64;

}  // namespace adamezo
