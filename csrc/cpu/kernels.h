// The interface of a CPU kernel.
#pragma once

#include "adamezo/job.h"

namespace adamezo {

// Scratch memory of one worker, which writes it before it reads it.
struct Scratch {
  PhiloxStream* streams;  // job.horizon + 1
  uint32_t* signs;        // kSignWords for each direction; only `rademacher` kernels need them
};
constexpr int64_t kSignWords = 64;  // four words of each of the sixteen blocks of the widest lanes

// Runs `worker`'s share of `job`. The result does not depend on the number of workers.
using Kernel = void (*)(const Job& job, const Scratch& scratch, int64_t worker, int64_t workers);

struct InstructionSet {
  const char* name;
  Kernel exact, rademacher;
};

const InstructionSet& portable_kernels();
#if defined(__x86_64__)
const InstructionSet& avx2_kernels();
const InstructionSet& avx512_kernels();
#endif

}  // namespace adamezo
