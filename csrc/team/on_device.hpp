// Which device is current, for the life of an object; for files that nvcc compiles.
#pragma once

#include <cuda_runtime.h>

namespace selbp {

// Makes `device` current for the life of the object. What the runtime remembers of errors is cleared on entry, so that
// an earlier one is not taken for the launch's, and on exit: the caller is told of ours, and nobody meets it again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaGetLastError();
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) error_ = cudaSetDevice(device);
    moved_ = error_ == cudaSuccess && before_ != device;
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
    cudaGetLastError();
  }
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool moved_ = false;
};

}  // namespace selbp
