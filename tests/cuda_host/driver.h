// Functions that tests call from Python (build.py): extern "C", every argument a pointer, an int64_t or a double, the
// result null or what went wrong.
//
//   EXPORT const char* row_sums(const float* x_ptr, int64_t rows, int64_t D, float* sums_ptr) {
//     return guarded([&] { LAUNCH((row_sums<float, 256>), rows, 256, 0, nullptr, x_ptr, D, sums_ptr); });
//   }
#pragma once

#include <exception>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

template <class F>
const char* guarded(const F& f) {
  static std::string error;
  try {
    f();
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}
