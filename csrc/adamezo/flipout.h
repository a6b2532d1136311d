// `flipout` directions: `group` consecutive ones share their normals, and each has signs of its own
// for the rows and for the columns of a parameter seen as a matrix with `columns` columns:
//
//   z[i, j] = u[i, j] (r[i] s[j])
//
// u is the exact direction numbered direction / group. r[i] is 1 with the sign of the exact normal
// of element i under Purpose::kRowSign, and s[j] with that of element j under Purpose::kColumnSign
// (of a zero, with the sign of the zero). A parameter of one dimension has exact normals of the
// direction itself.
#pragma once

#include "adamezo/config.h"

namespace adamezo {

constexpr int64_t kLargestGroup = int64_t(1) << 16;

}  // namespace adamezo
