// Runs a job's kernel bodies: on a GPU, or thread by thread on the host for tests.
#pragma once

#include <vector>

#include "adamezo/job.h"

namespace adamezo {

// What 2^34 divides out of the indices of a job's elements: nearly always 0 alone. A launch does
// the elements of one of them, as the high words of Philox blocks are part of what a block of
// threads prepares.
using HighWords = std::vector<uint32_t>;

// Queues the job on a stream (a cudaStream_t) of a device and returns. All pointers lead to memory
// of that device, and are to stay valid until the stream is done with the job. Leaves `device`
// current for this thread.
//
// Throws std::runtime_error with what CUDA said.
void cuda_launch(const Job& job, const HighWords& highs, int device, uint64_t stream);

// The same bodies on the host, one thread after the other, in a launch of that shape. Pointers lead
// to host memory; the caller has set the default floating-point environment.
void cuda_on_host(const Job& job, const HighWords& highs, int64_t blocks, int threads);

// Of all float32 in [2^-25, 22], the numbers of those whose root ThreadLanes::sqrt does not round
// correctly are added to *count, which is in the device's memory.
void cuda_check_sqrt(uint64_t* count, int device, uint64_t stream);

}  // namespace adamezo
