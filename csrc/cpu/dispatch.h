// Runs a job on this machine's CPU: selects the instruction set and splits the work over threads.
#pragma once

#include <cfenv>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace adamezo {

// A stream's bits assume round-to-nearest and gradual underflow. The process may have set another
// mode (torch.set_flush_denormal does), and worker threads inherit the mode at their creation.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

// The names of the instruction sets that this machine can run, the fastest first.
std::vector<std::string> instruction_sets();

// Runs the job on at most `threads` threads. Throws std::invalid_argument for a name that is not
// among instruction_sets(), and for `fast` directions, which only a GPU has.
void run(const Job& job, const std::string& instruction_set, int threads);

}  // namespace adamezo
