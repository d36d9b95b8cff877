// From PyTorch's tensors (stable ABI) to what the CPU's kernels take beyond ../../torch_views.h: arrays of one type,
// outputs and threads.
#pragma once

#include <initializer_list>
#include <optional>

#include "../../torch_views.h"
#include "huge_pages.h"
#include "parallel.h"

namespace protomem {

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
  Tensor result = empty_on(aoti_torch_device_type_cpu(), 0, sizes, dtype);
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
