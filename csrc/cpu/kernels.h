// What a CPU kernel is given and how it is called.
#pragma once

#include "adamezo/job.h"

namespace adamezo {

// Does `worker`'s share of `job`; `streams` is room for job.horizon + 1 entries of the worker's
// own. The result does not depend on the number of workers.
using Kernel = void (*)(const Job& job, PhiloxStream* streams, int64_t worker, int64_t workers);

struct Kernels {
  const char* instruction_set;
  Kernel sample, perturb, update, moment;
};

const Kernels& portable_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

}  // namespace adamezo
