// 16-byte loads and stores, and asynchronous copies from global to shared memory.
#pragma once

#include "kernel.cuh"

namespace protomem::cuda {

// As many elements as 16 bytes hold, moved by one instruction.
template <class T>
struct alignas(16) Vector16 {
  static constexpr int size = 16 / sizeof(T);
  T values[size];

  DEVICE T& operator[](int i) { return values[i]; }
  DEVICE const T& operator[](int i) const { return values[i]; }
};

// Whether rows of 16-byte vectors can start at `data` with `stride` elements between rows: the host asks once per
// launch and chooses the vectorised or the scalar kernel.
template <class T>
inline bool aligned_16(const T* data, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

// `from` and `to` are aligned to 16 bytes. Three loads: cached as usual; through the read-only path, for what no thread
// of this launch writes; streamed past the L1 cache, for what is read once.
template <class T>
DEVICE Vector16<T> load_16(const T* from) {
#ifdef PROTOMEM_HOST
  cuda_host::check_aligned(from, 16);
#endif
  return bit_cast<Vector16<T>>(*reinterpret_cast<const uint4*>(from));
}
template <class T>
DEVICE Vector16<T> load_16_readonly(const T* from) {
#ifdef PROTOMEM_HOST
  cuda_host::check_aligned(from, 16);
#endif
  return bit_cast<Vector16<T>>(__ldg(reinterpret_cast<const uint4*>(from)));
}
template <class T>
DEVICE Vector16<T> load_16_streamed(const T* from) {
#ifdef PROTOMEM_HOST
  cuda_host::check_aligned(from, 16);
#endif
  return bit_cast<Vector16<T>>(__ldcs(reinterpret_cast<const uint4*>(from)));
}
template <class T>
DEVICE void store_16(T* to, const Vector16<T>& values) {
#ifdef PROTOMEM_HOST
  cuda_host::check_aligned(to, 16);
#endif
  *reinterpret_cast<uint4*>(to) = bit_cast<uint4>(values);
}
template <class T>
DEVICE void store_16_streamed(T* to, const Vector16<T>& values) {
#ifdef PROTOMEM_HOST
  cuda_host::check_aligned(to, 16);
#endif
  __stcs(reinterpret_cast<uint4*>(to), bit_cast<uint4>(values));
}

// Copies BYTES (4, 8 or 16, both ends aligned to as much) from global to shared memory without waiting: `valid` bytes
// from `global`, zeros after them; with valid = 0 nothing is read, but `global` must still be a pointer of the array's.
// 16 bytes go past the L1 cache.
template <int BYTES>
DEVICE void cp_async(void* shared, const void* global, int valid = BYTES) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
#ifdef PROTOMEM_HOST
  cuda_host::cp_async(shared, global, BYTES, valid);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(to), "l"(global), "n"(BYTES), "r"(valid)
                 : "memory");
  }
#endif
}
DEVICE void cp_async_16(void* shared, const void* global, int valid = 16) { cp_async<16>(shared, global, valid); }

// Closes the group of this thread's copies so far; an empty group counts as well.
DEVICE void cp_async_commit() {
#ifdef PROTOMEM_HOST
  cuda_host::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's groups, the newest, are under way.
template <int PENDING>
DEVICE void cp_async_wait() {
#ifdef PROTOMEM_HOST
  cuda_host::cp_async_wait(PENDING);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
#endif
}

}  // namespace protomem::cuda
