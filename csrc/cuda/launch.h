// Runs a job's kernel bodies: on a GPU, or thread by thread on the host for tests.
#pragma once

#include <vector>

#include "adamezo/job.h"

namespace adamezo {

// The values of index / 2^34 among a job's elements: nearly always 0 alone. A launch processes the
// elements of one value, as the table that a block of threads fills depends on the high words of
// Philox blocks.
using HighWords = std::vector<uint32_t>;

// In a job for a GPU, `first` of its segments and `elements` count what its threads share: windows
// of elements, or of a job with `lowrank` directions tiles of matrices (adamezo/low_rank.h), the
// only parameters that there are such kernels for. These set `first` of a table on the host, and
// return the number of all.
int64_t count_windows(Segment* segments, int64_t count, uint64_t offset);
int64_t count_tiles(Segment* segments, int64_t count, uint64_t offset);

// Queues the job on a stream (a cudaStream_t) of a device and returns. All pointers are to memory
// of that device, and must stay valid until the stream is done with the job; but those to words
// that the launch carries are to memory of the host, and may end with the call. Leaves `device`
// current for this thread.
//
// Throws std::runtime_error with CUDA's message.
void cuda_launch(const Job& job, const HighWords& highs, int device, uint64_t stream);

// The same bodies on the host, one thread after the other, in a launch of that shape. Pointers are
// to host memory; the caller has set the default floating-point environment.
void cuda_on_host(const Job& job, const HighWords& highs, int64_t blocks, int threads);

// The steps of quotients.cuh on the host, for tests: from approximations y of 1 / b or 1 / sqrt(a).
void cuda_quotients_on_host(const float* a, const float* b, const float* y, float* out,
                            int64_t count);
void cuda_roots_on_host(const float* a, const float* y, float* out, int64_t count);

// Adds to *count, in the device's memory, how many float32 in [2^-25, 22] and at 0 have a root that
// ThreadLanes::sqrt does not round correctly.
void cuda_check_sqrt(uint64_t* count, int device, uint64_t stream);

}  // namespace adamezo
