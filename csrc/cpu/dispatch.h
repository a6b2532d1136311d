// Runs a job on this machine's CPU: picks the instruction set, splits the work over threads.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace adamezo {

// Names of the instruction sets that this machine can run, the fastest first.
std::vector<std::string> instruction_sets();

// Throws std::invalid_argument for a name that is not among instruction_sets().
const Kernels& kernels_named(const std::string& instruction_set);

// Runs `kernel` over the whole job on at most `threads` threads.
void run(Kernel kernel, const Job& job, int threads);

}  // namespace adamezo
