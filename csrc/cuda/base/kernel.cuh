// How a CUDA kernel of this package is written, so that nvcc compiles it for a GPU and, under -DPROTOMEM_HOST, g++
// compiles the very same source for csrc/cuda_host, where every CUDA thread is a fiber (csrc/cuda_host/README.md).
//
//   #include "base/memory.cuh"                        (and warp.cuh, mma.cuh: each includes this file)
//   namespace protomem::cuda {
//   template <class T, int THREADS>
//   KERNEL(THREADS) void row_sums(const T* x_ptr, int64_t D, float* sums_ptr) {
//     SMEM(shared_by_all, float[32][33]);             // name first, then the type; commas are fine
//     DYN_SMEM(bytes);                                // unsigned char*, aligned to 16; its size is LAUNCH's
//     float sum = 0;
//     for (int64_t d = threadIdx.x; d < D; d += THREADS) sum += widen(x_ptr[blockIdx.x * D + d]);
//     sum = block_sum<THREADS>(sum);
//     if (threadIdx.x == 0) sums_ptr[blockIdx.x] = sum;
//   }
//   }
//   LAUNCH((row_sums<T, 256>), grid, block, dynamic_bytes, stream, x_ptr, D, sums_ptr);   // a grid of 0: nothing
//
// Rules
// - DEVICE marks a function that kernels call. Blocks are whole warps, one-dimensional where warp.cuh is used.
// - Elements are float, double, bfloat16, float16 of this header and nothing else: widen(x) -> float (double for
//   double), narrow<T>(y) rounds to nearest even; pack_2<T>(low, high) and unpack_2<T> for the halves of 32 bits.
// - CUDA's own names that may be used: threadIdx .. gridDim, __syncthreads and its _or/_and/_count, __syncwarp, the
//   *_sync shuffles, votes, matches and integer reductions, __threadfence, atomicAdd/Sub/Min/Max/And/Or/Xor/Exch/CAS,
//   __ldg/__ldcs/__stcs, __popc/__ffs/__clz.. and their ll forms, bit casts, and the float maths of csrc/cuda_host.
//   `#pragma unroll` and __restrict__ as well. Every thread of a block reaches every __syncthreads; a warp operation's
//   mask names the lanes that execute it, no more (none that has returned), no fewer.
// - No spinning, no __activemask, no textures, no printf, no new; inline PTX only in this folder, beside a host twin.
// - cp.async: nothing may touch the destination between issue and the wait that covers its group; after the wait it is
//   visible to the issuing thread alone, to others after the next __syncthreads.
// - Visibility between blocks of one launch: write, (__syncthreads,) __threadfence, atomic ticket; in the last block
//   atomic ticket, __threadfence, (__syncthreads,) read. Both fences are needed, both by the thread that draws the
//   ticket.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#ifdef PROTOMEM_HOST
#include "../../cuda_host/cuda_host.h"
#ifndef PROTOMEM_ISA
#define PROTOMEM_ISA host
#endif
#include "../../convert.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#ifdef PROTOMEM_HOST

#define DEVICE inline __attribute__((always_inline))
#define KERNEL(...) inline
#define SMEM(name, ...)             \
  static const char name##_key = 0; \
  auto& name = cuda_host::shared<__VA_ARGS__>(&name##_key)
#define DYN_SMEM(name) unsigned char* const name = cuda_host::dynamic_shared()

#else

#define DEVICE __device__ __forceinline__
// The most threads a block may have and, optionally, how many blocks a multiprocessor should hold.
#define KERNEL(...) __global__ __launch_bounds__(__VA_ARGS__)
#define SMEM(name, ...) __shared__::protomem::cuda::Identity<__VA_ARGS__> name
#define DYN_SMEM(name) extern __shared__ __align__(16) unsigned char name[]

#endif

// Throws std::runtime_error when the launch fails. A kernel with a comma in its name goes in parentheses.
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::protomem::cuda::launch(#kernel, kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

namespace protomem::cuda {

constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;

#ifdef PROTOMEM_HOST

using host::bfloat16;
using host::float16;

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            cudaStream_t, Arguments&&... arguments) {
  cuda_host::launch(name, kernel, grid, block, shared_bytes, std::forward<Arguments>(arguments)...);
}

#else

using bfloat16 = __nv_bfloat16;
using float16 = __half;

template <class T>
struct IdentityOf {
  using type = T;
};
template <class T>
using Identity = typename IdentityOf<T>::type;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) {  // more than every kernel may have unasked
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

#endif

// The dtype of accumulation.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// An element as its accumulator, and back, rounded to nearest even.
DEVICE float widen(float x) { return x; }
DEVICE double widen(double x) { return x; }
#ifdef PROTOMEM_HOST
DEVICE float widen(bfloat16 x) { return host::to_float(x); }
DEVICE float widen(float16 x) { return host::to_float(x); }
#else
DEVICE float widen(bfloat16 x) { return __bfloat162float(x); }
DEVICE float widen(float16 x) { return __half2float(x); }
#endif

template <class T>
struct Narrow {
  static DEVICE T from(T x) { return x; }
};
template <>
struct Narrow<bfloat16> {
#ifdef PROTOMEM_HOST
  static DEVICE bfloat16 from(float x) { return host::from_float<bfloat16>(x); }
#else
  static DEVICE bfloat16 from(float x) { return __float2bfloat16_rn(x); }
#endif
};
template <>
struct Narrow<float16> {
#ifdef PROTOMEM_HOST
  static DEVICE float16 from(float x) { return host::from_float<float16>(x); }
#else
  static DEVICE float16 from(float x) { return __float2half_rn(x); }
#endif
};
template <class T>
DEVICE T narrow(Accumulator<T> x) {
  return Narrow<T>::from(x);
}

// What is to be stored as T: a finite number beyond float16's range becomes the largest of that range, as gradients
// have to stay finite.
template <class T>
DEVICE Accumulator<T> in_range_of(Accumulator<T> x) {
  if constexpr (std::is_same_v<T, float16>) {
    constexpr float largest = 65504.0f;
    const float magnitude = fabsf(x);
    return magnitude > largest && magnitude <= 3.402823466e38f ? copysignf(largest, x) : x;
  } else {
    return x;
  }
}

// The bits of one type as another of the same size.
template <class To, class From>
DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
#ifdef PROTOMEM_HOST
  return __builtin_bit_cast(To, from);
#else
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
#endif
}

// Two bfloat16 or float16 in 32 bits, as mma takes them: `low` is the element at the lower address.
template <class T>
DEVICE uint32_t pack_2(float low, float high) {
  static_assert(sizeof(T) == 2);
#ifndef PROTOMEM_HOST
  if constexpr (std::is_same_v<T, bfloat16>) {
    return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));  // one instruction
  } else {
    return bit_cast<uint32_t>(__floats2half2_rn(low, high));
  }
#else
  return bit_cast<uint16_t>(narrow<T>(low)) | static_cast<uint32_t>(bit_cast<uint16_t>(narrow<T>(high))) << 16;
#endif
}

template <class T>
DEVICE float2 unpack_2(uint32_t bits) {
  static_assert(sizeof(T) == 2);
  return make_float2(widen(bit_cast<T>(static_cast<uint16_t>(bits))),
                     widen(bit_cast<T>(static_cast<uint16_t>(bits >> 16))));
}

}  // namespace protomem::cuda
