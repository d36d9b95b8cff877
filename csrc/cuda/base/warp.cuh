// Reductions and scans over warps and blocks, in a fixed order: the same bits on every run.
//
// Every lane of a warp (thread of a block) takes part, and blocks are one-dimensional and whole warps. The warp
// functions order no memory. The block functions begin and end with a barrier, so that what was written to shared
// memory before is seen after, and they may follow one another at once.
#pragma once

#include "kernel.cuh"

namespace protomem::cuda {

DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % warp_lanes; }
DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / warp_lanes; }

struct Sum {
  template <class T>
  DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
// A NaN in `b` is passed over, one in `a` stays: with NaN among the values lanes may get different results.
struct Max {
  template <class T>
  DEVICE T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};
struct Min {
  template <class T>
  DEVICE T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// `op` over groups of WIDTH neighbouring lanes, a power of two; every lane gets its group's result. `op` must be
// associative and commutative but for rounding: a tree of xor shuffles, in which both partners compute op(own, other).
template <int WIDTH = warp_lanes, class T, class Op>
DEVICE T warp_reduce(T x, Op op) {
#pragma unroll
  for (int offset = WIDTH / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(all_lanes, x, offset));
  return x;
}
template <int WIDTH = warp_lanes, class T>
DEVICE T warp_sum(T x) {
  return warp_reduce<WIDTH>(x, Sum());
}
template <int WIDTH = warp_lanes, class T>
DEVICE T warp_max(T x) {
  return warp_reduce<WIDTH>(x, Max());
}
template <int WIDTH = warp_lanes, class T>
DEVICE T warp_min(T x) {
  return warp_reduce<WIDTH>(x, Min());
}

// op over the lanes up to and with this one.
template <class T, class Op>
DEVICE T warp_inclusive_scan(T x, Op op) {
#pragma unroll
  for (int offset = 1; offset < warp_lanes; offset *= 2) {
    const T before = __shfl_up_sync(all_lanes, x, offset);
    if (lane_index() >= offset) x = op(before, x);
  }
  return x;
}

// op over the lanes before this one; lane 0 gets `identity`.
template <class T, class Op>
DEVICE T warp_exclusive_scan(T x, T identity, Op op) {
  const T before = __shfl_up_sync(all_lanes, warp_inclusive_scan(x, op), 1);
  return lane_index() == 0 ? identity : before;
}

// op over the block; every thread gets the result.
template <int THREADS, class T, class Op>
DEVICE T block_reduce(T x, Op op) {
  constexpr int warps = THREADS / warp_lanes;
  static_assert(THREADS % warp_lanes == 0 && warps <= warp_lanes);
  SMEM(of_warp, T[warps]);
  x = warp_reduce(x, op);
  __syncthreads();  // of_warp may still be read from the call before
  if (lane_index() == 0) of_warp[warp_index()] = x;
  __syncthreads();
  x = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < warps; warp++) x = op(x, of_warp[warp]);
  return x;
}
template <int THREADS, class T>
DEVICE T block_sum(T x) {
  return block_reduce<THREADS>(x, Sum());
}
template <int THREADS, class T>
DEVICE T block_max(T x) {
  return block_reduce<THREADS>(x, Max());
}
template <int THREADS, class T>
DEVICE T block_min(T x) {
  return block_reduce<THREADS>(x, Min());
}

// The sum over the threads before this one, and over all of them in `total`.
template <int THREADS, class T>
DEVICE T block_exclusive_sum(T x, T& total) {
  constexpr int warps = THREADS / warp_lanes;
  static_assert(THREADS % warp_lanes == 0 && warps <= warp_lanes);
  SMEM(of_warp, T[warps]);
  const T inclusive = warp_inclusive_scan(x, Sum());
  __syncthreads();  // of_warp may still be read from the call before
  if (lane_index() == warp_lanes - 1) of_warp[warp_index()] = inclusive;
  __syncthreads();
  T before = T(0), all = T(0);
#pragma unroll
  for (int warp = 0; warp < warps; warp++) {
    if (warp == warp_index()) before = all;
    all += of_warp[warp];
  }
  total = all;
  // Not inclusive - x: the difference of rounded sums is not the sum before.
  const T earlier_lanes = __shfl_up_sync(all_lanes, inclusive, 1);
  return lane_index() == 0 ? before : before + earlier_lanes;
}

}  // namespace protomem::cuda
