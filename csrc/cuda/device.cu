#include <cuda_runtime_api.h>

#include "cuda/device.h"

namespace adamezo {

CudaStatus cuda_status() {
  CudaStatus status{CUDART_VERSION, 0, 0, ""};
  cudaError_t error = cudaDriverGetVersion(&status.driver_version);
  if (error == cudaSuccess) error = cudaGetDeviceCount(&status.devices);
  if (error != cudaSuccess) {
    status.devices = 0;
    status.error = cudaGetErrorString(error);
    cudaGetLastError();  // the error is reported here; it must not surface in torch's next call
  }
  return status;
}

}  // namespace adamezo
