#include "where.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <map>

// Asks addr2line (binutils come with g++), which also names the functions that were inlined there, innermost first.
std::string cuda_host::where(const void* return_address) {
  static std::map<const void*, std::string> known;
  if (const auto found = known.find(return_address); found != known.end()) return found->second;
  const auto call = reinterpret_cast<uintptr_t>(return_address) - 1;  // the call itself, not what follows it
  char address[64];
  std::snprintf(address, sizeof address, "%p", return_address);
  Dl_info module{};
  if (dladdr(return_address, &module) == 0) return address;
  char command[4400];
  std::snprintf(command, sizeof command, "LD_PRELOAD= addr2line -Cfpie '%s' 0x%lx 2>/dev/null", module.dli_fname,
                static_cast<unsigned long>(call - reinterpret_cast<uintptr_t>(module.dli_fbase)));
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    char buffer[1024];
    while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) text += buffer;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return known[return_address] = text.empty() ? address : text;
}
