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

// Where the words of adamezo_kernels/terms.py are: in memory, where a captured kernel reads them
// again, since they change from step to step.
struct Words {
  const uint32_t* directions;  // [horizon], newest first
  const float* first;          // [horizon]
  const float* second;         // [horizon], or null where v = 1; moment: which of the two sums
  const float* step;           // update: -lr, 1 - lr weight_decay
  const float* numbers;        // [kRuleNumbers], the rule's; null without one
};

ADAMEZO_HD Words words_at(const uint32_t* words, int64_t horizon) {
  const float* const first = reinterpret_cast<const float*>(words + horizon);
  const float *const second = first + horizon, *const step = second + horizon;
  return {words, first, second, step, step + 2};
}

// A launch carries no more words than this: MOST_CARRIED of adamezo_kernels/backends/cuda.py.
constexpr int64_t kMostCarried = 256;

// Pointers are borrowed for the call and point to memory of the device that runs the kernel.
struct Job : Words {
  Operation operation;
  Distribution distribution;
  int64_t rank;     // of `lowrank` directions; of `flipout` ones, how many share their normals
  float row_scale;  // 1 / sqrt(rank), which multiplies their factors u (low_rank.h)

  const Segment* segments;
  int64_t segment_count;
  int64_t elements;  // of all segments
  ElementType type;

  PhiloxKey key;
  uint64_t offset;  // added to every element index
  int64_t horizon;  // number of directions
  // How many words the launches of a GPU carry there, since they are on the host; 0: they are in
  // memory of the GPU. On a CPU there is nothing to carry.
  int64_t carried;

  float scale;  // perturb: theta + scale z.  update: restores with it, where it is not 0
  float eps;

  // The rule of perturb and update: kMoments, or the index of a rule of buffered.h.
  int rule;
  ElementType buffer_type;  // of that rule's buffers

  // How perturb and update round stores to 16 bits. Element i takes word i % 4 of the call of block
  // i / 4, counted by directions[0], for Purpose::kRounding, whatever the distribution. Buffers of
  // 16 bits are rounded the same way, with words of their own.
  Rounding rounding;
};

}  // namespace adamezo
