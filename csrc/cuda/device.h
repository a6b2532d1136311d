// The report of the linked CUDA runtime about this machine.
#pragma once

#include <string>

namespace adamezo {

struct CudaStatus {
  int runtime_version;  // of the runtime linked in, as 1000 major + 10 minor
  int driver_version;   // the newest CUDA that the driver supports; 0 where there is no driver
  int devices;
  std::string error;  // why there are no devices; empty where there are some
};

CudaStatus cuda_status();

}  // namespace adamezo
