// Reading prototypes as the accumulation type, of unit length where asked, and the gradient of that scaling.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "parallel.h"
#include "rows.h"

namespace protomem::PROTOMEM_ISA {

inline int64_t div_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t multiple) { return div_up(n, multiple) * multiple; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of a floating matrix as T: where they lie if they are stored so, else through one scratch row per `way`.
template <class T>
class RowReader {
 public:
  RowReader(const Matrix& matrix, bool normalize, int64_t ways = 1)
      : matrix_(matrix), normalize_(normalize), scratch_(ways * matrix.cols) {}

  const T* read(int64_t row, int64_t way = 0) const {
    T* scratch = scratch_.get() + way * matrix_.cols;
    const T* raw = row_as(matrix_, row, scratch);
    if (!normalize_) return raw;
    const auto [values, scale, length] = direction_of(raw, matrix_.cols, scratch);
    scale_into(scratch, scale, values, matrix_.cols);
    return scratch;
  }

 private:
  Matrix matrix_;
  bool normalize_;
  Buffer<T> scratch_;
};

// The gradient of a raw row given that of its unit row, in place: (g - (g . u) u) / |raw|; 0 where the unit row is 0.
template <class T>
inline void unit_backward(T* grad, const T* raw, const T* unit, int64_t n) {
  const T norm = length_of(raw, n, dot(raw, raw, n)), along = dot(grad, unit, n);
  const bool alive = std::any_of(unit, unit + n, [](T u) { return u != 0; });
  for (int64_t d = 0; d < n; d++) grad[d] = alive ? (grad[d] - along * unit[d]) / (norm > 0 ? norm : T(1)) : T(0);
}

template <class T>
inline bool is_finite(const T* x, int64_t n) {
  return std::all_of(x, x + n, [](T e) { return e - e == 0; });
}

// y += factor * x
template <class T>
inline void add_scaled(T* __restrict y, T factor, const T* __restrict x, int64_t n) {
  for (int64_t d = 0; d < n; d++) y[d] += factor * x[d];
}

}  // namespace protomem::PROTOMEM_ISA
