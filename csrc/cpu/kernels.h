// The interface of a CPU kernel.
#pragma once

#include "adamezo/job.h"

namespace adamezo {

// Scratch memory of one worker, which writes it before it reads it.
struct Scratch {
  PhiloxStream* streams;  // job.horizon + 1
  uint32_t* signs;        // kSignWords for each direction; only `rademacher` kernels need them
  float* factors;         // factor_floats(terms); only `lowrank` and `flipout` kernels need them
};
constexpr int64_t kSignWords = 64;  // four words of each of the sixteen blocks of the widest lanes

// The factors of `count` terms u v^T of `lowrank` directions: of each, kFactorRows elements of u, a
// window of v with kFactorRows floats of padding on either side, so that a group that begins before
// the window or ends behind it reads within the table, and kSpread floats for elements of u that
// are repeated along their rows.
constexpr int64_t kFactorRows = 64;
constexpr int64_t kSpread = 512;
ADAMEZO_HD int64_t factor_columns(int64_t count) {
  // 192 KiB are a part of the second-level cache, of 512 KiB or more.
  const int64_t fit = 49152 / count / kFactorRows * kFactorRows;
  return fit < 128 ? 128 : fit > 8192 ? 8192 : fit;
}
ADAMEZO_HD int64_t factor_floats(int64_t count) {
  return count * (3 * kFactorRows + factor_columns(count) + kSpread);
}

// Runs `worker`'s share of `job`. The result does not depend on the number of workers.
using Kernel = void (*)(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers);

struct InstructionSet {
  const char* name;
  Kernel exact, rademacher;
  Kernel factored;  // `lowrank` and `flipout` of matrices; their vectors are `exact`
};

const InstructionSet& portable_kernels();
#if defined(__x86_64__)
const InstructionSet& avx2_kernels();
const InstructionSet& avx512_kernels();
#endif

}  // namespace adamezo
