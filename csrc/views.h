// What a kernel sees of a tensor: a pointer, a dtype, sizes and strides (in elements). No PyTorch in here.
#pragma once

#include <cstdint>

namespace protomem {

using std::int32_t;
using std::int64_t;

enum class Dtype { float32, float64, bfloat16, float16, int32, int64 };

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 || dtype == Dtype::int64      ? 8
         : dtype == Dtype::bfloat16 || dtype == Dtype::float16 ? 2
                                                               : 4;
}

// A vector of any dtype; `data` may be null: "not given".
struct Vector {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t size = 0;
  int64_t stride = 1;

  explicit operator bool() const { return data != nullptr; }
};

struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 1;

  explicit operator bool() const { return data != nullptr; }
};

// A contiguous array of a known type: what the glue allocates or has made contiguous.
template <class T>
struct Array {
  T* data = nullptr;
  int64_t size = 0;

  T& operator[](int64_t i) const { return data[i]; }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace protomem
