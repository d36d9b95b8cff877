// How numbers of each dtype go through the tensor cores; and what the operators on batch x memory read beside rows.
#pragma once

#include "kernel.cuh"
#include "memory.cuh"
#include "mma.cuh"

namespace protomem::cuda {

constexpr float log2_e = 1.4426950408889634f, ln_2 = 0.6931471805599453f;

// The place, in elements, of `chunk` of `row` in a matrix in shared memory with CHUNKS 16-byte chunks a row
// (stream.cuh).
template <class T, int CHUNKS>
DEVICE int swizzled(int row, int chunk) {
  constexpr int SPAN = CHUNKS < 8 ? CHUNKS : 8;  // rows shorter than 128 bytes share their lines of banks
  return (row * CHUNKS + (chunk ^ (row / (8 / SPAN) % SPAN))) * (16 / static_cast<int>(sizeof(T)));
}

// x, as something that the compiler cannot compute ahead of a loop and keep.
DEVICE uint32_t computed_here(uint32_t x) {
#ifndef PROTOMEM_HOST
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// One step through 32 bytes of columns: a (16 rows), b (8 rows), d += a b^T. `raw` is what ldmatrix yields.
//   cut(rest)      the fragment's next number(s) of a float32 resident side, as far as T holds them; keeps the rest
//   transposed     b of two neighbouring 8-column tiles, for a product along the rows of a tile in shared memory
//   place(j)       where the weight of a tile's row j has to stand, to meet that row in `transposed`
//   LIFT           by which a float32 side is multiplied before it is cut, so that the rest is no subnormal number
template <class T>
struct Factor {
  static constexpr float LIFT = std::is_same_v<T, float16> ? 256.0f : 1.0f;
  struct A {
    uint32_t bits[4];
  };
  struct B {
    uint32_t bits[2];
  };

  static DEVICE uint32_t cut(float (&rest)[2]) {
    const uint32_t bits = pack_2<T>(rest[0], rest[1]);
    const float2 held = unpack_2<T>(bits);
    rest[0] -= held.x;
    rest[1] -= held.y;
    return bits;
  }
  static DEVICE A a(const uint32_t (&raw)[4]) { return {{raw[0], raw[1], raw[2], raw[3]}}; }
  static DEVICE B b(uint32_t first, uint32_t second) { return {{first, second}}; }
  static DEVICE void multiply(float (&d)[4], const A& a, const B& b) { mma_m16n8k16<T>(d, a.bits, b.bits); }

  static DEVICE int place(int j) { return j; }
  template <int CHUNKS>
  static DEVICE void transposed(uint32_t (&raw)[4], const T* tile, int step, int column, int lane) {
    ldmatrix_x4_trans(raw, tile + swizzled<T, CHUNKS>(step * 16 + lane % 16, column / 8 + lane / 16));
  }
};

template <>
struct Factor<float> {
  static constexpr float LIFT = 1.0f;
  // x = high + low: high is x rounded to 11 bits, of low, which has 12 and either sign, the tensor cores look at 11.
  template <int N>
  struct Split {
    uint32_t high[N], low[N];

    DEVICE void set(int i, uint32_t raw) {
      // Rounded by hand: two integer operations. A NaN that this would turn into a number stays in `low`.
      high[i] = (raw + 0x1000u) & 0xffffe000u;
      low[i] = bit_cast<uint32_t>(bit_cast<float>(raw) - bit_cast<float>(high[i]));
    }
  };
  using A = Split<4>;
  using B = Split<2>;

  static DEVICE uint32_t cut(float (&rest)[1]) {
    const uint32_t bits = bit_cast<uint32_t>(rest[0]);
    rest[0] = 0;
    return bits;
  }
  static DEVICE A a(const uint32_t (&raw)[4]) {
    A split;
    // In every tile again: split ahead, the resident side would take twice its registers.
#pragma unroll
    for (int i = 0; i < 4; i++) split.set(i, computed_here(raw[i]));
    return split;
  }
  static DEVICE B b(uint32_t first, uint32_t second) {
    B split;
    split.set(0, first);
    split.set(1, second);
    return split;
  }
  static DEVICE void multiply(float (&d)[4], const A& a, const B& b) {
    mma_m16n8k8_tf32(d, a.low, b.high);
    mma_m16n8k8_tf32(d, a.high, b.low);
    mma_m16n8k8_tf32(d, a.high, b.high);
  }

  // There is no ldmatrix that transposes 32-bit numbers. Row 2t meets column t of a, and row 2t + 1 column t + 4: then
  // the words that a warp reads lie in 32 different banks.
  static DEVICE int place(int j) { return j / 8 * 8 + j % 2 * 4 + j % 8 / 2; }
  template <int CHUNKS>
  static DEVICE void transposed(uint32_t (&raw)[4], const float* tile, int step, int column, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = step * 8 + lane % 4 * 2 + i % 2, at = column + i / 2 * 8 + lane / 4;
      raw[i] = bit_cast<uint32_t>(tile[swizzled<float, CHUNKS>(row, at / 4) + at % 4]);
    }
  }
};

// As how many numbers of T a float32 is cut, to lose nothing.
template <class T>
constexpr int exact_terms = std::is_same_v<T, bfloat16>  ? 3
                            : std::is_same_v<T, float16> ? 2
                                                         : 1;

// N = 1, 2 or 4 neighbouring numbers in shared memory, by one instruction.
template <int N>
DEVICE void load_neighbours(float (&to)[N], const float* from) {
  if constexpr (N == 4) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else if constexpr (N == 2) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    to[0] = two.x, to[1] = two.y;
  } else {
    static_assert(N == 1);
    to[0] = *from;
  }
}

// Writes two neighbouring columns, an even one first, of a contiguous row of D.
template <class T>
DEVICE void store_pair(T* row, int column, int dim, float first, float second) {
  first = in_range_of<T>(first);
  second = in_range_of<T>(second);
  if (dim % 2 == 0) {  // a pair never straddles the row's end, and lies on a multiple of its size
    if (column >= dim) return;
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint32_t*>(row + column) = pack_2<T>(first, second);
    } else {
      *reinterpret_cast<float2*>(row + column) = make_float2(first, second);
    }
  } else {
    if (column < dim) row[column] = narrow<T>(first);
    if (column + 1 < dim) row[column + 1] = narrow<T>(second);
  }
}

// Views of tensors with any strides (in elements). No data: not given.
template <class T>
struct Strided {
  T* data = nullptr;
  int64_t stride = 1;

  DEVICE T& operator[](int64_t i) const { return data[i * stride]; }
};

template <class T>
struct Rows {
  T* data = nullptr;
  int64_t row_stride = 0, column_stride = 1;

  DEVICE T& operator()(int64_t row, int64_t column) const { return data[row * row_stride + column * column_stride]; }
};

// Slots, int32 or int64; one outside [0, capacity) reads as -1.
struct Slots {
  const void* data = nullptr;
  int64_t row_stride = 0, stride = 1;
  bool wide = true;
  int64_t capacity = 0;

  DEVICE int64_t at(int64_t row, int64_t i) const {
    const int64_t offset = row * row_stride + i * stride;
    const int64_t slot = wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
    return slot >= 0 && slot < capacity ? slot : -1;
  }
  DEVICE int64_t operator[](int64_t i) const { return at(0, i); }
};

// s h and h' of scaled cosines y = s cos: y and 1 where y <= s tau, else the hard-negative form
// a y + s b + (g / s) y^2 and a + 2 (g / s) y. Where exponents are of 2, s log2(e) stands for s.
struct HardForm {
  Strided<const float> threshold;     // (B,)
  Strided<const float> coefficients;  // (3,): a, b, g

  DEVICE bool given() const { return threshold.data != nullptr; }
};

struct HardCurve {
  float a = 1, sb = 0, bend = 0;

  DEVICE HardCurve() {}
  DEVICE HardCurve(const HardForm& form, float scale) {
    if (form.given()) {
      a = form.coefficients[0];
      sb = scale * form.coefficients[1];
      bend = form.coefficients[2] / scale;
    }
  }
  // Returns h', and turns y into s h.
  DEVICE float reshape(float& y, float scaled_threshold) const {
    const bool hard = y > scaled_threshold;
    const float slope = hard ? a + 2 * bend * y : 1.0f;
    y = hard ? (y * bend + a) * y + sb : y;
    return slope;
  }
};

}  // namespace protomem::cuda
