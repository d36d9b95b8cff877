// From PyTorch's tensors (stable ABI) to what CUDA kernels take beyond ../../torch_views.h: the stream, outputs, and
// kernels by dtype.
//
// Compiled with -DPROTOMEM_HOST (csrc/cuda_host) the same operators serve tensors on the CPU, where their kernels are
// executed; nothing else about them differs.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../../torch_views.h"
#include "kernel.cuh"

#ifdef PROTOMEM_HOST
#define PROTOMEM_DEVICE CPU
#else
#define PROTOMEM_DEVICE CUDA
#endif
#ifndef PROTOMEM_OPERATORS  // in which namespace PyTorch finds the operators
#define PROTOMEM_OPERATORS protomem_cuda
#endif

namespace protomem::cuda {

// Makes the tensor's device the current one as long as it lives, and knows PyTorch's current stream there.
class OnDevice {
 public:
#ifdef PROTOMEM_HOST
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#ifndef PROTOMEM_HOST
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// Waits for the stream. The one documented place where an operator does.
template <class T>
inline std::vector<T> read_back(const T* data, int64_t size, cudaStream_t stream) {
  std::vector<T> values(size);
#ifdef PROTOMEM_HOST
  static_cast<void>(stream);
  std::memcpy(values.data(), data, size * sizeof(T));
#else
  check(cudaMemcpyAsync(values.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost, stream), "read back");
  check(cudaStreamSynchronize(stream), "read back");
#endif
  return values;
}

// The tensor itself if it has the dtype, else a copy (one launch more).
inline Tensor as_type(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

template <class T>
inline T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int32_t type = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  return empty_on(type, index, sizes, dtype);
}

// Memory for the time of a call, cut into arrays that start at multiples of 16 bytes. First every array is asked for,
// in a first round that only adds up the sizes (`base` null), then again with the memory there.
class Scratch {
 public:
  explicit Scratch(unsigned char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(int64_t size) {
    T* const array = reinterpret_cast<T*>(base_ + used_);
    used_ += (size * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return array;
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

// Calls f(T()) with the type of the view's elements.
template <class F>
inline void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: f(float()); break;
    case Dtype::float64: f(double()); break;
    case Dtype::bfloat16: f(bfloat16()); break;
    case Dtype::float16: f(float16()); break;
    default: STD_TORCH_CHECK(false, "must be a floating point dtype");
  }
}
// Calls f(std::true_type()) or f(std::false_type()).
template <class F>
inline void with_bool(bool value, F f) {
  value ? f(std::true_type()) : f(std::false_type());
}

inline unsigned blocks(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace protomem::cuda
