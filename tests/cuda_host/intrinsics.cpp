// What cuda_host.h defines under CUDA's own names, and the runtime's limits, for test_intrinsics.py.
#include "../../csrc/cuda/base/memory.cuh"
#include "../../csrc/cuda/base/warp.cuh"
#include "driver.h"

namespace protomem::cuda {
namespace {

// Four shuffles (index, up, down, xor) within groups of `width` lanes, and votes, matches and reductions.
KERNEL(32)
void warp_operations(const int* x_ptr, int argument, int width, int* y_ptr) {
  const int lane = lane_index(), x = x_ptr[lane];
  int all_equal = 0;
  const unsigned matched_all = __match_all_sync(all_lanes, x, &all_equal);
  const int results[] = {
      __shfl_sync(all_lanes, x, argument, width),
      __shfl_up_sync(all_lanes, x, argument, width),
      __shfl_down_sync(all_lanes, x, argument, width),
      __shfl_xor_sync(all_lanes, x, argument, width),
      static_cast<int>(__ballot_sync(all_lanes, x > argument)),
      __any_sync(all_lanes, x > argument),
      __all_sync(all_lanes, x > argument),
      static_cast<int>(__match_any_sync(all_lanes, x)),
      static_cast<int>(matched_all),
      all_equal,
      __reduce_add_sync(all_lanes, x),
      __reduce_min_sync(all_lanes, x),
      __reduce_max_sync(all_lanes, x),
      static_cast<int>(__reduce_and_sync(all_lanes, static_cast<unsigned>(x))),
      static_cast<int>(__reduce_or_sync(all_lanes, static_cast<unsigned>(x))),
      static_cast<int>(__reduce_xor_sync(all_lanes, static_cast<unsigned>(x))),
  };
  for (int i = 0; i < 16; i++) y_ptr[32 * i + lane] = results[i];
}

// Groups of lanes on paths of their own at the same time: lanes with equal x / 10 agree on their sum.
KERNEL(64)
void divergent_groups(const int* x_ptr, int* y_ptr) {
  const int x = x_ptr[threadIdx.x];
  const unsigned peers = __match_any_sync(all_lanes, x / 10);
  for (int group = 0; group < 4; group++) {
    if (x / 10 == group) y_ptr[threadIdx.x] = __reduce_add_sync(peers, x);
  }
}

template <class T>
KERNEL(96)
void atomics(const T* x_ptr, T* y_ptr) {
  const T x = x_ptr[blockIdx.x * 96 + threadIdx.x];
  atomicAdd(&y_ptr[0], x);
  atomicMin(&y_ptr[1], x);
  atomicMax(&y_ptr[2], x);
  if constexpr (std::is_integral_v<T>) {
    atomicSub(&y_ptr[3], x);
    atomicAnd(&y_ptr[4], x);
    atomicOr(&y_ptr[5], x);
    atomicXor(&y_ptr[6], x);
    atomicAdd(&y_ptr[7], atomicExch(&y_ptr[8], x));  // all but the last, whichever it is
    for (T old = 0;;) {                              // a sum by CAS
      const T seen = atomicCAS(&y_ptr[9], old, static_cast<T>(old + x));
      if (seen == old) break;
      old = seen;
    }
  }
}

// Per thread: how many threads of the block have a positive x, whether any, whether all.
KERNEL(128)
void barrier_votes(const int* x_ptr, int* y_ptr) {
  const int thread = static_cast<int>(threadIdx.x), x = x_ptr[thread];
  y_ptr[thread] = __syncthreads_count(x > 0);
  y_ptr[128 + thread] = __syncthreads_or(x > 0);
  y_ptr[256 + thread] = __syncthreads_and(x > 0);
}

KERNEL(1024)
void indices(int* y_ptr) {
  const dim3 b = blockDim, g = gridDim;
  const unsigned thread = threadIdx.x + b.x * (threadIdx.y + b.y * threadIdx.z);
  const unsigned block = blockIdx.x + g.x * (blockIdx.y + g.y * blockIdx.z);
  atomicAdd(&y_ptr[block * b.x * b.y * b.z + thread], 1);
}

// The order in which blocks, and the threads of the last of them, come to an atomic.
KERNEL(32)
void arrivals(int* counter_ptr, int* blocks_ptr, int* threads_ptr) {
  const int turn = atomicAdd(counter_ptr, 1);
  if (turn % 32 == 0) blocks_ptr[turn / 32] = static_cast<int>(blockIdx.x);
  if (turn / 32 == static_cast<int>(gridDim.x) - 1) threads_ptr[turn % 32] = static_cast<int>(threadIdx.x);
}

// What shared memory holds that nobody has written: all bits 1, in every block, though the block before wrote zeros.
KERNEL(32)
void fresh_shared(uint32_t* y_ptr) {
  SMEM(fixed, uint32_t[32]);
  SMEM(same_line, uint32_t[32]);
  DYN_SMEM(bytes);
  uint32_t* const dynamic = reinterpret_cast<uint32_t*>(bytes);
  const unsigned i = threadIdx.x;
  y_ptr[blockIdx.x * 32 + i] = fixed[i] & same_line[i] & dynamic[i];
  fixed[i] = same_line[i] = dynamic[i] = 0;
}

KERNEL(32)
void much_shared(char* y_ptr) {
  SMEM(fixed, char[1024]);
  DYN_SMEM(bytes);
  if (threadIdx.x == 0) y_ptr[0] = static_cast<char>(fixed[0] & bytes[0]);
}

KERNEL(32)
void may_fail(int fails, int* y_ptr) {
  SMEM(value, int);
  if (threadIdx.x == 0) value = 11;
  if (fails != 0 && threadIdx.x == 7) return;
  __syncthreads();
  y_ptr[threadIdx.x] = value;
}

}  // namespace
}  // namespace protomem::cuda

using namespace protomem::cuda;

EXPORT const char* warp_operations_int32(const int* x_ptr, int64_t argument, int64_t width, int* y_ptr) {
  return guarded([&] { LAUNCH(warp_operations, 1, 32, 0, nullptr, x_ptr, argument, width, y_ptr); });
}
EXPORT const char* divergent_groups_int32(const int* x_ptr, int* y_ptr) {
  return guarded([&] { LAUNCH(divergent_groups, 1, 64, 0, nullptr, x_ptr, y_ptr); });
}
EXPORT const char* atomics_int32(const int* x_ptr, int* y_ptr) {
  return guarded([&] { LAUNCH(atomics<int>, 5, 96, 0, nullptr, x_ptr, y_ptr); });
}
EXPORT const char* atomics_int64(const void* x_ptr, void* y_ptr) {
  using T = unsigned long long;
  return guarded([&] { LAUNCH(atomics<T>, 5, 96, 0, nullptr, static_cast<const T*>(x_ptr), static_cast<T*>(y_ptr)); });
}
EXPORT const char* atomics_float32(const float* x_ptr, float* y_ptr) {
  return guarded([&] { LAUNCH(atomics<float>, 5, 96, 0, nullptr, x_ptr, y_ptr); });
}
EXPORT const char* barrier_votes_int32(const int* x_ptr, int* y_ptr) {
  return guarded([&] { LAUNCH(barrier_votes, 1, 128, 0, nullptr, x_ptr, y_ptr); });
}
EXPORT const char* indices_int32(const int* grid, const int* block, int* y_ptr) {
  return guarded(
      [&] { LAUNCH(indices, dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), 0, nullptr, y_ptr); });
}
EXPORT const char* arrivals_int32(int64_t blocks, int* counter_ptr, int* blocks_ptr, int* threads_ptr) {
  return guarded([&] { LAUNCH(arrivals, blocks, 32, 0, nullptr, counter_ptr, blocks_ptr, threads_ptr); });
}
EXPORT const char* fresh_shared_int32(int64_t blocks, uint32_t* y_ptr) {
  return guarded([&] { LAUNCH(fresh_shared, blocks, 32, 128, nullptr, y_ptr); });
}
EXPORT const char* much_shared(int64_t bytes, char* y_ptr) {
  return guarded([&] { LAUNCH(much_shared, 1, 32, bytes, nullptr, y_ptr); });
}
EXPORT const char* may_fail_int32(int64_t fails, int* y_ptr) {
  return guarded([&] { LAUNCH(may_fail, 1, 32, 0, nullptr, fails, y_ptr); });
}
// Bits of an unsigned number: popc, ffs, clz, brev, and funnel shifts of it with its complement.
EXPORT const char* bits_int32(const unsigned* x_ptr, int64_t n, int* y_ptr) {
  return guarded([&] {
    for (int64_t i = 0; i < n; i++) {
      const unsigned x = x_ptr[i];
      const int results[] = {__popc(x),
                             __ffs(static_cast<int>(x)),
                             __clz(static_cast<int>(x)),
                             static_cast<int>(__brev(x)),
                             static_cast<int>(__funnelshift_l(~x, x, 5)),
                             static_cast<int>(__funnelshift_r(~x, x, 5)),
                             __popcll(x * 0x100000001ull),
                             __ffsll(static_cast<long long>(x) << 20),
                             __clzll(static_cast<long long>(x) << 20),
                             static_cast<int>(__umulhi(x, x))};
      for (int j = 0; j < 10; j++) y_ptr[i * 10 + j] = results[j];
    }
  });
}
