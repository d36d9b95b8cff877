#include "capability.h"

#include <atomic>
#include <stdexcept>

namespace protomem {
namespace {

// __builtin_cpu_supports also asks whether the operating system saves the wide registers.
std::vector<const Kernels*> find_runnable() {
  std::vector<const Kernels*> found{&kernels_baseline()};
#ifdef __x86_64__
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return found;
  found.push_back(&kernels_avx2());
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return found;
  found.push_back(&kernels_avx512());
#endif
  return found;
}

const std::vector<const Kernels*>& runnable() {
  static const std::vector<const Kernels*> found = find_runnable();
  return found;
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{runnable().back()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::string capability() { return kernels().capability; }

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Kernels* kernels : runnable()) names.push_back(kernels->capability);
  return names;
}

void set_capability(const std::string& name) {
  std::string message = "capability must be one of";
  for (const Kernels* kernels : runnable()) {
    if (name == kernels->capability) return current().store(kernels, std::memory_order_relaxed);
    message += std::string(" ") + kernels->capability;
  }
  throw std::invalid_argument(message + ", got " + name);
}

}  // namespace protomem
