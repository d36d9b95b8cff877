// PyTorch's tensors (stable ABI) as the views that kernels take: for the launch code of both devices.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "views.h"

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

// Whether two matrices with elements may share bytes.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto begin = [](const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); };
  const auto end = [&](const Tensor& t) {
    const int64_t last = (t.size(0) - 1) * t.stride(0) + (t.size(1) - 1) * t.stride(1);
    return begin(t) + (last + 1) * t.element_size();
  };
  return begin(a) < end(b) && begin(b) < end(a);
}

// A contiguous tensor on a device, with anything in it.
inline Tensor empty_on(int32_t device_type, int32_t device_index, std::initializer_list<int64_t> sizes,
                       ScalarType dtype) {
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
                                                         strides.data(), code, device_type, device_index, &tensor));
  return Tensor(tensor);
}

}  // namespace protomem
