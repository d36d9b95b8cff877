// Vectors of the instruction set that this file is compiled for, by GCC's and Clang's vector extension.
//
// The kernels are compiled once per instruction set, each time in a namespace of its own (PROTOMEM_ISA), so that the
// linker can never swap in a function that this machine cannot run. Intrinsics only where the extension has no word for
// it (lane_bits, vstore_past_cache): aarch64 and plain x86-64 compile from the same source.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef PROTOMEM_ISA
#error "compile through isa.cpp, which sets PROTOMEM_ISA"
#endif

#if defined(__AVX512F__)
#define PROTOMEM_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PROTOMEM_VECTOR_BYTES 32
#else
#define PROTOMEM_VECTOR_BYTES 16
#endif

// Unrolls the next loop completely: its bound is a compile-time constant below 33.
#define PROTOMEM_UNROLL _Pragma("GCC unroll 32")

namespace protomem::PROTOMEM_ISA {

constexpr int64_t vector_bytes = PROTOMEM_VECTOR_BYTES;

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float Vec __attribute__((vector_size(PROTOMEM_VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(PROTOMEM_VECTOR_BYTES)));
  using Integer = int32_t;
};
template <>
struct Lanes<double> {
  typedef double Vec __attribute__((vector_size(PROTOMEM_VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(PROTOMEM_VECTOR_BYTES)));
  using Integer = int64_t;
};

template <class T>
using Vec = typename Lanes<T>::Vec;
template <class T>
using IntVec = typename Lanes<T>::Int;  // integers as wide as T; also the masks: 0 or -1 per lane
template <class T>
constexpr int64_t lanes = vector_bytes / static_cast<int64_t>(sizeof(T));

template <class T>
inline Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // which compilers drop, so that it is one load; of 0 + value they must keep the addition
}

// Unaligned load and store.
template <class T>
inline Vec<T> vload(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void vstore(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
// The same of the first n lanes alone, n <= lanes<T>; the others are 0 when loaded.
template <class T>
inline Vec<T> vload_first(const T* p, int64_t n) {
  if (n == lanes<T>) return vload<T>(p);
  Vec<T> v{};
  std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(T));
  return v;
}
template <class T>
inline void vstore_first(T* p, Vec<T> v, int64_t n) {
  if (n == lanes<T>) return vstore<T>(p, v);
  std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(T));
}

// Stores without fetching the cache line first, for whole lines of large arrays that are read much later; `p` is
// aligned to the vector. Another thread sees them after this one's next atomic read-modify-write (or lock).
template <class T>
inline void vstore_past_cache(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(p), (__m128)v);
#else
  vstore<T>(p, v);
#endif
}
inline bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % vector_bytes == 0; }
constexpr bool is_large(int64_t bytes) { return bytes >= int64_t{32} << 20; }  // no cache keeps it until it is read

template <class T>
inline IntVec<T> ivload(const typename Lanes<T>::Integer* p) {
  IntVec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// A mask with one bit per lane, the first lane lowest.
template <class T>
inline uint32_t lane_bits(IntVec<T> mask) {
#if defined(__AVX512DQ__)
  return sizeof(T) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  const int bits = sizeof(T) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
  return static_cast<uint32_t>(bits);
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < lanes<T>; lane++) bits |= mask[lane] != 0 ? 1u << lane : 0u;
  return bits;
#endif
}

template <class T>
inline bool any(IntVec<T> mask) {
  return lane_bits<T>(mask) != 0;
}

// Sum of the lanes: the upper half onto the lower one until one is left, the same order on every call.
template <class T, int64_t BYTES>
struct Narrow {
  typedef T Type __attribute__((vector_size(BYTES)));
};
template <class T, int64_t BYTES = vector_bytes, class V>
inline T vsum(V v) {
  if constexpr (BYTES > 16) {
    typename Narrow<T, BYTES / 2>::Type half[2];
    std::memcpy(half, &v, BYTES);
    return vsum<T, BYTES / 2>(half[0] + half[1]);
  } else if constexpr (sizeof(T) == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return v[0] + v[1];
  }
}

// exp, to about one unit in the last place: exp(-inf) = 0, exp(inf) = inf, exp(NaN) = NaN; results below the smallest
// normal number are 0 (in the sums here their share lies below the rounding).
//
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r is its Taylor polynomial, long enough for the type; 2^n goes straight into
// the exponent bits. ln 2 is split in two, so that n ln 2 is exact in its upper part (Cody and Waite).
template <class T>
struct Exp;
template <>
struct Exp<float> {
  static constexpr float lowest = -87.0f, highest = 88.3f;  // 2^n has an exponent of its own for every x in between
  static constexpr float log2e = 1.44269504088896341f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, found in the low bits
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float taylor[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
};
template <>
struct Exp<double> {
  static constexpr double lowest = -708.0, highest = 709.4;
  static constexpr double log2e = 1.4426950408889634074, ln2_high = 0.693147180369123816490,
                          ln2_low = 1.90821492927058770002e-10;
  static constexpr double shifter = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double taylor[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,        1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
};

template <class T>
inline Vec<T> vexp(Vec<T> x) {
  using E = Exp<T>;
  const Vec<T> shifted = x * E::log2e + E::shifter;
  const Vec<T> n = shifted - E::shifter;
  const Vec<T> r = (x - n * E::ln2_high) - n * E::ln2_low;
  Vec<T> p = broadcast<T>(E::taylor[0]);
  PROTOMEM_UNROLL
  for (int i = 1; i < static_cast<int>(sizeof(E::taylor) / sizeof(T)); i++) p = p * r + E::taylor[i];
  const Vec<T> power = (Vec<T>)(((IntVec<T>)shifted + E::bias) << E::mantissa);  // the shifter's own bits fall off
  const Vec<T> result = p * power;
  const Vec<T> bounded = x < E::lowest ? broadcast<T>(0) : result;
  return x > E::highest ? broadcast<T>(std::numeric_limits<T>::infinity()) : bounded;
}

}  // namespace protomem::PROTOMEM_ISA
