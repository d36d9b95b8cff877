// What the stress programs share: a check that says what failed, tensors of exact size (so that the sanitizers see
// every step past an end) and random numbers that are the same everywhere.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../../../csrc/views.h"

namespace protomem {

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  double number() { return static_cast<double>(below(1 << 20)) / (1 << 19) - 1; }  // in [-1, 1)
  template <class T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }

 private:
  std::mt19937_64 engine_;
};

template <class T>
constexpr Dtype dtype_v = std::is_same_v<T, float>     ? Dtype::float32
                          : std::is_same_v<T, double>  ? Dtype::float64
                          : std::is_same_v<T, int32_t> ? Dtype::int32
                                                       : Dtype::int64;

template <class T>
Vector vector_of(std::vector<T>& values, int64_t stride = 1) {
  const int64_t size = (static_cast<int64_t>(values.size()) + stride - 1) / stride;
  return {values.data(), dtype_v<T>, size, stride};
}

template <class T>
Matrix matrix_of(std::vector<T>& values, int64_t rows, int64_t cols) {
  return {values.data(), dtype_v<T>, rows, cols, cols, 1};
}

}  // namespace protomem
