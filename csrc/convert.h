// bfloat16 and float16 as bits, and their conversions (round to nearest even), written so that loops vectorise.
// Included once per instruction set, inside its namespace, so that no inline function is shared between them.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "views.h"

namespace protomem::PROTOMEM_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  // The exponent's bias moves from 15 to 127 by a multiplication, which also scales subnormals right.
  const uint32_t finite = bits_of(float_of(magnitude) * float_of(0x77800000u));
  const uint32_t special = magnitude | 0x7f800000u;  // inf and NaN
  return float_of(sign | (magnitude >= 0x0f800000u ? special : finite));
}

template <class T>
inline T from_float(float value);

template <>
inline bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded)};
}

template <>
inline float16 from_float<float16>(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and more, inf, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: subnormal; adding 0.5 lets the hardware round
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // rebias by -112 << 23 and round
  }
  return {static_cast<uint16_t>(sign | half)};
}

// Any element as the accumulation type, and back.
template <class T>
inline T load(float x) {
  return static_cast<T>(x);
}
template <class T>
inline T load(double x) {
  return static_cast<T>(x);
}
template <class T>
inline T load(bfloat16 x) {
  return static_cast<T>(to_float(x));
}
template <class T>
inline T load(float16 x) {
  return static_cast<T>(to_float(x));
}

template <class T>
inline void store(float* to, T value) {
  *to = static_cast<float>(value);
}
template <class T>
inline void store(double* to, T value) {
  *to = static_cast<double>(value);
}
template <class T>
inline void store(bfloat16* to, T value) {
  *to = from_float<bfloat16>(static_cast<float>(value));
}
// A finite number beyond float16's range is stored as the largest of that range: gradients have to stay finite.
template <class T>
inline void store(float16* to, T value) {
  constexpr T largest = 65504;
  const T magnitude = value < 0 ? -value : value;
  const T bounded = magnitude > largest && magnitude <= std::numeric_limits<T>::max() ? largest : magnitude;
  *to = from_float<float16>(static_cast<float>(value < 0 ? -bounded : bounded));
}

// Calls f(pointer) with `data` cast to the element type of a floating dtype.
template <class F>
inline void with_floating(Dtype dtype, void* data, const F& f) {
  switch (dtype) {
    case Dtype::float32: return f(static_cast<float*>(data));
    case Dtype::float64: return f(static_cast<double*>(data));
    case Dtype::bfloat16: return f(static_cast<bfloat16*>(data));
    case Dtype::float16: return f(static_cast<float16*>(data));
    default: return;
  }
}

// An integer of an int32 or int64 vector.
inline int64_t integer_at(const Vector& v, int64_t i) {
  return v.dtype == Dtype::int32 ? static_cast<const int32_t*>(v.data)[i * v.stride]
                                 : static_cast<const int64_t*>(v.data)[i * v.stride];
}

// Row `row` of a floating matrix, as T, into out[0 .. cols).
template <class T>
inline void load_row(const Matrix& m, int64_t row, T* __restrict out) {
  with_floating(m.dtype, m.data, [&](auto* data) {
    const auto* from = data + row * m.row_stride;
    if (m.col_stride == 1) {
      for (int64_t d = 0; d < m.cols; d++) out[d] = load<T>(from[d]);
    } else {
      for (int64_t d = 0; d < m.cols; d++) out[d] = load<T>(from[d * m.col_stride]);
    }
  });
}

template <class T>
inline void store_row(const Matrix& m, int64_t row, const T* __restrict values) {
  with_floating(m.dtype, m.data, [&](auto* data) {
    auto* to = data + row * m.row_stride;
    for (int64_t d = 0; d < m.cols; d++) store(to + d * m.col_stride, values[d]);
  });
}

}  // namespace protomem::PROTOMEM_ISA
