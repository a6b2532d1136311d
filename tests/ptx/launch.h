// A launch of a translated kernel, for cudart.cpp.
#pragma once

#include <string>

#include "machine.h"

namespace ptx {

// Returns what was wrong, or nothing. The parameters lie as Entry::parameters says.
std::string run_launch(const Entry& kernel, const unsigned char* parameters, u32 blocks,
                       u32 threads, u32 dynamic_shared);

// The memory that launches may use from now on, which is none to begin with.
void allow(const Range* first, int count);

// Seeds the order of blocks and threads in each launch from now on.
void shuffle_by(unsigned number);

}  // namespace ptx
