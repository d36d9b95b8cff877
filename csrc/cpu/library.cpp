// What the library says of itself: how it was built, and which instruction set is in use. Functions of the namespace
// protomem_cpu like the operators, so that nothing here knows Python; backends/cpu.py gives them their schemas.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "capability.h"

namespace protomem {
namespace {

// Version, compiler, flags, torch, the oldest torch that it loads into.
std::tuple<std::string, std::string, std::string, std::string, std::string> build() {
  const auto part = [](int shift) { return std::to_string(TORCH_TARGET_VERSION >> shift & 0xff); };
  return {PROTOMEM_VERSION, PROTOMEM_COMPILER, PROTOMEM_FLAGS, PROTOMEM_TORCH_VERSION, part(56) + "." + part(48)};
}

// Those that this machine can run, slowest first, with a space between them.
std::string runnable_capabilities() {
  std::string names;
  for (const std::string& name : capabilities()) names += (names.empty() ? "" : " ") + name;
  return names;
}

STABLE_TORCH_LIBRARY_IMPL(protomem_cpu, CompositeExplicitAutograd, m) {
  m.impl("build", TORCH_BOX(&build));
  m.impl("capabilities", TORCH_BOX(&runnable_capabilities));
  m.impl("capability", TORCH_BOX(&capability));
  m.impl("set_capability", TORCH_BOX(&set_capability));
}

}  // namespace
}  // namespace protomem
