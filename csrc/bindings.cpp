// The Python module protomem_kernels._C: how it was built, and which instruction set is in use. Importing it registers
// the operators of namespace protomem_cpu (each in its csrc/cpu/<operator>.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"

PYBIND11_MODULE(_C, m) {
  m.attr("version") = PROTOMEM_VERSION;
  m.attr("compiler") = PROTOMEM_COMPILER;
  m.attr("flags") = PROTOMEM_FLAGS;
  m.attr("torch_version") = PROTOMEM_TORCH_VERSION;
  m.attr("target_abi") = pybind11::make_tuple(TORCH_TARGET_VERSION >> 56, TORCH_TARGET_VERSION >> 48 & 0xff);
  m.def("capabilities", &protomem::capabilities, "The instruction sets that this machine can run, slowest first.");
  m.def("capability", &protomem::capability, "The instruction set in use.");
  m.def("set_capability", &protomem::set_capability, "Use another one of capabilities(), in every thread.");
}
