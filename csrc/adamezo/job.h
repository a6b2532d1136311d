// A job: one operation over a table of segments, the argument of every kernel on a CPU or a GPU.
#pragma once

#include "adamezo/buffered.h"
#include "adamezo/philox.h"
#include "adamezo/rounding.h"
#include "adamezo/segment.h"

namespace adamezo {

enum class Operation : int { kSample = 0, kPerturb = 1, kUpdate = 2, kMoment = 3 };

// Kinds of directions: normal.h, fast_normal.h, rademacher.h, low_rank.h, flipout.h.
enum class Distribution : int {
  kExact = 0,
  kFast = 1,
  kRademacher = 2,
  kLowRank = 3,
  kFlipout = 4
};

// Pointers are borrowed for the call and point to memory of the device that runs the kernel.
struct Job {
  Operation operation;
  Distribution distribution;
  int64_t rank;     // of `lowrank` directions; of `flipout` ones, how many share their normals
  float row_scale;  // 1 / sqrt(rank), which multiplies their factors u (low_rank.h)

  const Segment* segments;
  int64_t segment_count;
  int64_t elements;  // of all segments
  ElementType type;

  PhiloxKey key;
  uint64_t offset;             // added to every element index
  const uint32_t* directions;  // newest first
  int64_t horizon;             // number of directions

  // Values that change from step to step are in memory, where a captured kernel reads them again.
  const float* first;   // [horizon]
  const float* second;  // [horizon], or null where v = 1; moment: which of the two sums
  const float* step;    // update: -lr, 1 - lr weight_decay
  float scale;          // perturb: theta + scale z.  update: restores with it, where it is not 0
  float eps;

  // The rule of perturb and update: kMoments, or the index of a rule of buffered.h.
  int rule;
  ElementType buffer_type;  // of that rule's buffers
  const float* numbers;     // [kRuleNumbers], the rule's; null without one

  // How perturb and update round stores to 16 bits. Element i takes word i % 4 of the call of block
  // i / 4, counted by directions[0], for Purpose::kRounding, whatever the distribution. Buffers of
  // 16 bits are rounded the same way, with words of their own.
  Rounding rounding;
};

}  // namespace adamezo
