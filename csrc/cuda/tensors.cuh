// From PyTorch's tensors (stable ABI) to what CUDA kernels take: views, outputs, the stream, and kernels by dtype.
//
// Compiled with -DPROTOMEM_HOST (tests/cuda_host) the same operators serve tensors on the CPU, where their kernels are
// executed; nothing else about them differs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/cuda/kernel.cuh"
#include "../common/views.h"

#ifdef PROTOMEM_HOST
#define PROTOMEM_DEVICE CPU
#else
#define PROTOMEM_DEVICE CUDA
#endif
#ifndef PROTOMEM_OPERATORS  // in which namespace PyTorch finds the operators
#define PROTOMEM_OPERATORS protomem_cuda
#endif

namespace protomem::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Int: return Dtype::int32;
    case ScalarType::Long: return Dtype::int64;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16, float16, int32 or int64, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// The dtype of accumulation: float64 for float64, else float32.
inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself if it has the dtype, else a copy (one launch more).
inline Tensor as_type(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Views; they keep nothing alive. A tensor that is not given makes one without data.
inline Vector vector(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 1, name, " must have 1 dimension, got ", tensor.dim());
  return {const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor, name), tensor.size(0), tensor.stride(0)};
}
inline Vector mutable_vector(const Tensor& tensor, const char* name) {
  Vector view = vector(tensor, name);
  view.data = tensor.mutable_data_ptr();
  return view;
}
inline Vector vector(const OptionalTensor& tensor, const char* name) {
  return tensor ? vector(*tensor, name) : Vector{};
}
inline Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must have 2 dimensions, got ", tensor.dim());
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  void* data = const_cast<void*>(tensor.const_data_ptr());
  return {data, dtype_of(tensor, name), sizes[0], sizes[1], strides[0], strides[1]};
}
inline Matrix mutable_matrix(const Tensor& tensor, const char* name) {
  Matrix view = matrix(tensor, name);
  view.data = tensor.mutable_data_ptr();
  return view;
}
template <class T>
inline T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A contiguous tensor on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  // The C function itself: torch::stable::empty looks the operator up by name on every call.
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  int32_t type = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), code, type, index, &tensor));
  return Tensor(tensor);
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
