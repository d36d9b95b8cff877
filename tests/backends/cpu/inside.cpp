// The innermost pieces of the CPU kernels as Python functions on NumPy arrays, for the machine that this is compiled
// on: conversions of 16-bit numbers (convert.h) and the vectors' exp (base/simd.h), which no operator shows alone.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../../../csrc/convert.h"
#include "../../../csrc/cpu/base/simd.h"

namespace {

namespace py = pybind11;
using namespace protomem::PROTOMEM_ISA;

template <class Half>
float widened(uint16_t bits) {
  return to_float(Half{bits});
}

template <class Half>
uint16_t narrowed(float value) {
  return from_float<Half>(value).bits;
}

template <class T>
T exponential(T x) {
  return vexp<T>(broadcast<T>(x))[0];
}

PYBIND11_MODULE(inside, m) {
  m.def("float16_to_float", py::vectorize(widened<float16>));
  m.def("bfloat16_to_float", py::vectorize(widened<bfloat16>));
  m.def("float_to_float16", py::vectorize(narrowed<float16>));
  m.def("float_to_bfloat16", py::vectorize(narrowed<bfloat16>));
  m.def("exp_float", py::vectorize(exponential<float>));
  m.def("exp_double", py::vectorize(exponential<double>));
}

}  // namespace
