// What a CPU kernel is given and how it is called.
#pragma once

#include <cstdint>

#include "adamezo/philox.h"
#include "adamezo/rounding.h"
#include "adamezo/segment.h"

namespace adamezo {

// One operation over a table of segments. Pointers are borrowed for the call.
struct Job {
  const Segment* segments;
  int64_t segment_count;
  int64_t elements;  // of all segments
  ElementType type;

  PhiloxKey key;
  uint64_t offset;             // added to every element index
  const uint32_t* directions;  // newest first
  int64_t horizon;             // number of directions

  const float* first;   // [horizon]
  const float* second;  // [horizon], or null where v = 1; moment: which of the two sums
  float scale;          // perturb: theta + scale z.  update: restores with it, where it is not 0
  float minus_lr, eps, decay;
};

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
