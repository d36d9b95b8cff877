// From PyTorch's tensors (stable ABI) to the views that kernels take, and outputs and threads for them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "../common/views.h"

namespace protomem {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

// Views. They keep nothing alive: the tensor must outlive them. A tensor that is not given makes a null view, and so
// may one without elements. `mutable_` for what a kernel writes; the others are only read, though a view is not const.
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

inline Matrix matrix(const OptionalTensor& tensor, const char* name) {
  return tensor ? matrix(*tensor, name) : Matrix{};
}

// A contiguous tensor of exactly T (float, double, int32_t, int64_t, bool), of any number of dimensions.
template <class T>
inline Array<T> mutable_array(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return {tensor.mutable_data_ptr<T>(), tensor.numel()};
}

template <class T>
inline Array<const T> array(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  return {tensor.const_data_ptr<T>(), tensor.numel()};
}

template <class T>
inline Array<const T> array(const OptionalTensor& tensor, const char* name) {
  return tensor ? array<T>(*tensor, name) : Array<const T>{};
}

// The tensor itself if it is contiguous, else a copy.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor as_contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_contiguous(*tensor)) : std::nullopt;
}

// Outputs, on the CPU.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  // The C function itself: torch::stable::empty looks the operator up by name on every call, 1 us each time.
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (std::size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(),
                                                         strides.data(), code, aoti_torch_device_type_cpu(), 0,
                                                         &tensor));
  Tensor result(tensor);
  prefer_huge_pages(result.mutable_data_ptr(), static_cast<std::size_t>(result.numel()) * result.element_size());
  return result;
}

// PyTorch's threads; inside one of its parallel regions, this thread alone.
inline Parallel parallel() {
  return Parallel(torch::stable::get_num_threads(),
                  [](int64_t workers, void (*body)(void* context, int64_t worker), void* context) {
                    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
                      for (int64_t worker = begin; worker < end; worker++) body(context, worker);
                    });
                  });
}

}  // namespace protomem
