// Rows of embeddings: how threads share their columns, and how long they are.
//
// A row is read in groups of WIDTH neighbouring columns, one group per thread: 16 bytes of the narrowest dtype involved
// where every row starts at a multiple of 16 bytes (VECTOR), else one column. `width_of` is that number.
#pragma once

#include "../../views.h"
#include "memory.cuh"
#include "warp.cuh"

namespace protomem::cuda {

template <class A>
constexpr A infinity = std::numeric_limits<A>::infinity();

template <class T, bool VECTOR>
constexpr int width_of = VECTOR ? 16 / static_cast<int>(sizeof(T)) : 1;

// Whether rows of T can be read and written WIDTH columns at a time.
template <class T, int WIDTH>
inline bool takes_vectors(const Matrix& x) {
  return x.col_stride == 1 && x.cols % WIDTH == 0 &&
         (x.rows < 2 || x.row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0) &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

template <class T>
DEVICE T* row_of(const Matrix& x, int64_t row) {
  return static_cast<T*>(x.data) + row * x.row_stride;
}

// Columns column .. column + WIDTH - 1 of a row. WRITTEN: this launch writes it, and the read-only path will not do.
template <bool VECTOR, bool WRITTEN = false, class T, int WIDTH>
DEVICE void load_columns(const T* row, int64_t stride, int column, Accumulator<T> (&x)[WIDTH]) {
  if constexpr (VECTOR) {
    constexpr int size = Vector16<T>::size;
    static_assert(WIDTH % size == 0);
#pragma unroll
    for (int k = 0; k < WIDTH; k += size) {
      const Vector16<T> values = WRITTEN ? load_16(row + column + k) : load_16_readonly(row + column + k);
#pragma unroll
      for (int i = 0; i < size; i++) x[k + i] = widen(values[i]);
    }
  } else {
    static_assert(WIDTH == 1);
    x[0] = widen(row[column * stride]);
  }
}

template <bool VECTOR, class T, int WIDTH>
DEVICE void store_columns(T* row, int64_t stride, int column, const Accumulator<T> (&x)[WIDTH]) {
  if constexpr (VECTOR) {
    constexpr int size = Vector16<T>::size;
    static_assert(WIDTH % size == 0);
#pragma unroll
    for (int k = 0; k < WIDTH; k += size) {
      Vector16<T> values;
#pragma unroll
      for (int i = 0; i < size; i++) values[i] = narrow<T>(in_range_of<T>(x[k + i]));
      store_16(row + column + k, values);
    }
  } else {
    static_assert(WIDTH == 1);
    row[column * stride] = narrow<T>(in_range_of<T>(x[0]));
  }
}

// A row held by a block of THREADS threads, 8 columns each: f(group, column) for each group of WIDTH columns of this
// thread. `group` is known at compile time, so that arrays indexed by it stay in registers.
constexpr int columns_per_thread = 8;
template <int THREADS, int WIDTH, class F>
DEVICE void for_own_columns(int D, F f) {
#pragma unroll
  for (int group = 0; group < columns_per_thread / WIDTH; group++) {
    const int column = (group * THREADS + static_cast<int>(threadIdx.x)) * WIDTH;
    if (column < D) f(group, column);
  }
}

// f(column) for each group of WIDTH columns of this lane, of a row shared by a warp.
template <int WIDTH, class F>
DEVICE void for_lane_columns(int D, F f) {
#pragma unroll 4
  for (int column = lane_index() * WIDTH; column < D; column += warp_lanes * WIDTH) f(column);
}

// Whether the root of a sum of squares is the length: no square that matters has under- or overflowed. NaN is not.
DEVICE bool is_plain(float squares) { return squares > 1e-20f && squares < 1e38f; }
DEVICE bool is_plain(double squares) { return squares > 1e-200 && squares < 1e300; }

// The root of a sum of squares, and one over a length near 1: an approximation and a Newton step each, right to the
// last bit or next to it. The compiler's own would handle denormal numbers by a call, which spills registers; here they
// do not occur. What is not plain comes back as it is: 0, infinite, NaN.
DEVICE float root_of(float squares) {
  if (!is_plain(squares)) return squares;
  const float inverse = rsqrtf(squares), root = squares * inverse;
  return std::fma(inverse / 2, std::fma(-root, root, squares), root);
}
DEVICE double root_of(double squares) { return std::sqrt(squares); }
DEVICE float reciprocal_of(float x) {
  const float inverse = __fdividef(1.f, x);
  return std::fma(inverse, std::fma(-x, inverse, 1.f), inverse);
}
DEVICE double reciprocal_of(double x) { return 1 / x; }

// A power of two that brings x near 1, and one over it; both are normal numbers, whatever x is.
template <class A>
struct Scale {
  A down, up;
};
DEVICE Scale<float> scale_of(float x) {
  const int field = static_cast<int>(bit_cast<uint32_t>(x) >> 23 & 255), down = 254 - field;
  const int kept = down < 1 ? 1 : down > 253 ? 253 : down;
  return {bit_cast<float>(kept << 23), bit_cast<float>((254 - kept) << 23)};
}
DEVICE Scale<double> scale_of(double x) {
  const int64_t field = static_cast<int64_t>(bit_cast<uint64_t>(x) >> 52 & 2047), down = 2046 - field;
  const int64_t kept = down < 1 ? 1 : down > 2045 ? 2045 : down;
  return {bit_cast<double>(kept << 52), bit_cast<double>((2046 - kept) << 52)};
}

// The length of a row: root * up, which may overflow though the row is finite. Not finite if anything in the row is
// not.
template <class A>
struct Length {
  A root;
  Scale<A> scale;

  DEVICE A value() const { return root * scale.up; }
};

// Division by a length that is not 0: two multiplications, the first by a power of two that keeps all in range.
template <class A>
struct Inverse {
  A scale, rest;

  explicit DEVICE Inverse(Length<A> length) : scale(length.scale.down), rest(reciprocal_of(length.root)) {}
  explicit DEVICE Inverse(A length)
      : scale(is_plain(length * length) ? A(1) : scale_of(length).down), rest(reciprocal_of(length * scale)) {}
  DEVICE A operator()(A x) const { return x * scale * rest; }
};

// The length of a row of which measure(scale, largest) returns the sum of squares of scale x, and the largest |x|:
// usually with one measurement, else with a second after a power of two near the largest entry has been taken out. All
// threads that share the row get the same.
template <class A, class F>
DEVICE Length<A> length_of(F measure) {
  A largest = 0;
  const A squares = measure(A(1), largest);
  if (is_plain(squares)) return {root_of(squares), {A(1), A(1)}};
  const Scale<A> scale = scale_of(largest);
  return {root_of(measure(scale.down, largest)), scale};
}

// The length of a row in memory, by one warp.
template <bool VECTOR, class T>
DEVICE Length<Accumulator<T>> warp_row_length(const T* row, int64_t stride, int D) {
  using A = Accumulator<T>;
  constexpr int WIDTH = width_of<T, VECTOR>;
  return length_of<A>([&](A scale, A& largest) {
    A squares = 0, most = 0;
    for_lane_columns<WIDTH>(D, [&](int column) {
      A x[WIDTH];
      load_columns<VECTOR>(row, stride, column, x);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        most = std::fabs(x[i]) > most ? std::fabs(x[i]) : most;
        squares += x[i] * scale * (x[i] * scale);
      }
    });
    largest = warp_max(most);
    return warp_sum(squares);
  });
}

// The length of a row that a block holds; columns past the last are zero.
template <int THREADS, class A, int GROUPS, int WIDTH>
DEVICE Length<A> block_row_length(const A (&x)[GROUPS][WIDTH]) {
  return length_of<A>([&](A scale, A& largest) {
    A squares = 0, most = 0;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        most = std::fabs(x[group][i]) > most ? std::fabs(x[group][i]) : most;
        squares += x[group][i] * scale * (x[group][i] * scale);
      }
    }
    largest = block_max<THREADS>(most);
    return block_sum<THREADS>(squares);
  });
}

// Element i of a vector whose dtype is known at run time only: for the few numbers per row.
DEVICE int64_t integer_at(const Vector& x, int64_t i) {
  return x.dtype == Dtype::int64 ? static_cast<const int64_t*>(x.data)[i * x.stride]
                                 : static_cast<const int32_t*>(x.data)[i * x.stride];
}
template <class A>
DEVICE A number_at(const Vector& x, int64_t i) {
  switch (x.dtype) {
    case Dtype::float64: return static_cast<A>(static_cast<const double*>(x.data)[i * x.stride]);
    case Dtype::bfloat16: return widen(static_cast<const bfloat16*>(x.data)[i * x.stride]);
    case Dtype::float16: return widen(static_cast<const float16*>(x.data)[i * x.stride]);
    default: return static_cast<const float*>(x.data)[i * x.stride];
  }
}
template <class A>
DEVICE void put_number(const Vector& x, int64_t i, A value) {
  switch (x.dtype) {
    case Dtype::float64: static_cast<double*>(x.data)[i * x.stride] = value; break;
    case Dtype::bfloat16:
      static_cast<bfloat16*>(x.data)[i * x.stride] = narrow<bfloat16>(static_cast<float>(value));
      break;
    case Dtype::float16:
      static_cast<float16*>(x.data)[i * x.stride] = narrow<float16>(in_range_of<float16>(static_cast<float>(value)));
      break;
    default: static_cast<float*>(x.data)[i * x.stride] = static_cast<float>(value);
  }
}

}  // namespace protomem::cuda
