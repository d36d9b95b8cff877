// Rows and single numbers of any floating dtype as the accumulation type, and the direction of a row.
#pragma once

#include <cmath>
#include <limits>

#include "../../convert.h"
#include "simd.h"

namespace protomem::PROTOMEM_ISA {

template <class T>
constexpr T largest_finite = std::numeric_limits<T>::max();

template <class T>
inline T floating_at(const Vector& v, int64_t i) {
  T value{};
  with_floating(v.dtype, v.data, [&](auto* data) { value = load<T>(data[i * v.stride]); });
  return value;
}

template <class T>
inline void store_at(const Vector& v, int64_t i, T value) {
  with_floating(v.dtype, v.data, [&](auto* data) { store(data + i * v.stride, value); });
}

// The row where it lies if it is contiguous and of type T, else null.
template <class T>
inline T* row_in_place(const Matrix& m, int64_t row) {
  constexpr Dtype dtype = sizeof(T) == sizeof(float) ? Dtype::float32 : Dtype::float64;
  const bool fits = m.dtype == dtype && m.col_stride == 1;
  return fits ? static_cast<T*>(m.data) + row * m.row_stride : nullptr;
}

// The row to be read as T: where it lies, or converted into `buffer`.
template <class T>
inline const T* row_as(const Matrix& m, int64_t row, T* buffer) {
  if (const T* in_place = row_in_place<T>(m, row)) return in_place;
  load_row(m, row, buffer);
  return buffer;
}

// Starts to fetch a row into the outer cache; nothing if its numbers lie apart. Inlined by force: GCC takes a function
// that only prefetches for one without effect, and drops the calls.
[[gnu::always_inline]] inline void fetch_row(const Matrix& m, int64_t row) {
  if (m.col_stride != 1) return;
  constexpr int64_t line = 64;
  const int64_t size = element_size(m.dtype);
  const char* data = static_cast<const char*>(m.data) + row * m.row_stride * size;
  for (int64_t at = 0; at < m.cols * size; at += line) __builtin_prefetch(data + at, 0, 2);
}

template <class T>
inline void fill(T* to, T value, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = value;
}

// to = a x + b y. `to` may be x or y.
template <class T>
inline void combine(T* to, T a, const T* x, T b, const T* y, int64_t n) {
  for (int64_t d = 0; d < n; d++) to[d] = a * x[d] + b * y[d];
}

// to = a x. `to` may be x.
template <class T>
inline void scale_into(T* to, T a, const T* x, int64_t n) {
  for (int64_t d = 0; d < n; d++) to[d] = a * x[d];
}

// The order of the additions depends on n alone.
template <class T>
inline T dot(const T* x, const T* y, int64_t n) {
  constexpr int64_t width = lanes<T>, chains = 4;  // that many additions in flight
  Vec<T> sums[chains] = {};
  int64_t d = 0;
  for (; d + chains * width <= n; d += chains * width) {
    PROTOMEM_UNROLL
    for (int64_t k = 0; k < chains; k++) sums[k] += vload(x + d + k * width) * vload(y + d + k * width);
  }
  for (; d + width <= n; d += width) sums[0] += vload(x + d) * vload(y + d);
  T sum = vsum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; d < n; d++) sum += x[d] * y[d];
  return sum;
}

// Whether the root of a sum of squares is the length: what squares lose below the smallest normal number lies below the
// rounding of a sum of this size.
template <class T>
inline bool squares_hold(T squares) {
  constexpr T epsilon = std::numeric_limits<T>::epsilon();
  constexpr T safe = std::numeric_limits<T>::min() / (epsilon * epsilon);
  return squares >= safe && squares <= largest_finite<T>;
}

template <class T>
inline T largest_of(const T* x, int64_t n) {
  T largest = 0;
  for (int64_t d = 0; d < n; d++) largest = std::max(largest, std::abs(x[d]));
  return largest;
}

// x /= by
template <class T>
inline void divide(T* x, T by, int64_t n) {
  for (int64_t d = 0; d < n; d++) x[d] /= by;
}

// The direction of a row x is `values` * `scale`; the scale is 0 for a zero row and NaN for one that is not finite.
// `length` is infinite where it leaves the range of T, though the direction stands.
template <class T>
struct Direction {
  const T* values;
  T scale;
  T length;
};

// `scratch` (n numbers; may be x itself) is used only where squares leave the range: then the largest entry is divided
// out first.
template <class T>
inline Direction<T> direction_of(const T* x, int64_t n, T* scratch, T squares) {
  const T length = std::sqrt(squares);
  if (squares_hold(squares)) return {x, 1 / length, length};
  const T largest = largest_of(x, n);
  if (squares != squares || largest > largest_finite<T>) return {x, std::numeric_limits<T>::quiet_NaN(), length};
  if (largest == 0) return {x, 0, length};
  for (int64_t d = 0; d < n; d++) scratch[d] = x[d] / largest;
  const T rest = std::sqrt(dot(scratch, scratch, n));
  return {scratch, 1 / rest, largest * rest};
}

// The length alone, without scratch; not finite if anything in x is not.
template <class T>
inline T length_of(const T* x, int64_t n, T squares) {
  const T largest = squares_hold(squares) ? 0 : largest_of(x, n);
  if (largest == 0 || squares != squares || largest > largest_finite<T>) return std::sqrt(squares);
  T rest = 0;
  for (int64_t d = 0; d < n; d++) rest += (x[d] / largest) * (x[d] / largest);
  return largest * std::sqrt(rest);
}

template <class T>
inline Direction<T> direction_of(const T* x, int64_t n, T* scratch) {
  return direction_of(x, n, scratch, dot(x, x, n));
}

// How many of `rows` rows of `dim` numbers one thread takes at a time: enough work to outweigh waking the thread.
inline int64_t rows_per_item(int64_t dim) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(dim, 1)); }

}  // namespace protomem::PROTOMEM_ISA
