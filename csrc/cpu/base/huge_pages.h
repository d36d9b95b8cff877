// Large pages for large arrays. The first touch of an ordinary page costs a trap of 0.5 to 3 us per 4 KiB: for a
// gradient of 200 MB, as much time as half a matrix product. Smaller arrays the allocator finds among those that were
// freed; and where memory is in pieces, making a huge page takes milliseconds.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace protomem {

// Asks for huge pages where [data, data + bytes) is large; advice only, its refusal means nothing.
[[maybe_unused]] static inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 4096;
  constexpr std::size_t always_new = 32 * 1024 * 1024;  // from here on glibc asks the kernel for every array
  if (bytes < always_new) return;
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t last = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace protomem
