// Enough of CUDA C++ to compile a kernel with g++ and to run it on one core: csrc/cuda_host/README.md.
//
// A kernel's threads are fibers of one OS thread (runtime.cpp); blocks run one after another. This header holds what a
// kernel sees: vector types, built-in variables, barriers, warp operations, atomics, intrinsics. No CUDA header is
// needed. Everything is inlined into the kernel, so that the return address in a call of the runtime lies in the kernel
// and tells file and line.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define CUDA_HOST_INLINE inline __attribute__((always_inline))
#define __host__
#define __device__
#define __global__
#define __forceinline__ CUDA_HOST_INLINE
#define __launch_bounds__(...)

// ---------------------------------------------------------------------------------------------- Types

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_HOST_VECTORS(T, name)                                                   \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  CUDA_HOST_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }               \
  CUDA_HOST_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(float, float)
CUDA_HOST_VECTORS(double, double)
CUDA_HOST_VECTORS(int, int)
CUDA_HOST_VECTORS(unsigned, uint)
CUDA_HOST_VECTORS(short, short)
CUDA_HOST_VECTORS(unsigned short, ushort)
CUDA_HOST_VECTORS(long long, longlong)
CUDA_HOST_VECTORS(unsigned long long, ulonglong)
#undef CUDA_HOST_VECTORS

using cudaStream_t = void*;

// ---------------------------------------------------------------------------------------------- The runtime

namespace cuda_host {

// Constant within a fiber.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] int lane_index();

// Runs body(context) once per thread. Throws std::runtime_error that tells the fault, kernel, block, thread, file,
// line.
void launch(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(void*), void* context);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
            Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  const auto body = [](void* context) {
    const Call& call = *static_cast<Call*>(context);
    std::apply(call.kernel, call.parameters);
  };
  launch(name, grid, block, shared_bytes, body, &call);
}

// Shared memory of the running block, filled with 0xFF when first asked for. `key` tells the declaration.
void* shared(const void* key, std::size_t bytes, std::size_t alignment);
unsigned char* dynamic_shared();

template <class T>
CUDA_HOST_INLINE T& shared(const void* key) {
  return *static_cast<T*>(shared(key, sizeof(T), alignof(T)));
}

// Waits for all threads of the block; how many of them came with `predicate`. `key` tells the barrier.
int barrier(const void* key, bool predicate);

// Every operation of a warp. Each lane of `mask` comes here with a pointer; when the last has come,
// run(arguments, mask) acts on all of them. `run` is not looked at by the race check.
using Lanes = void* const*;
void collective(const char* operation, unsigned mask, void* argument, void (*run)(Lanes lanes, unsigned mask));
void sync_warp(unsigned mask);
[[noreturn]] void fail_lane(int lane, const char* message);  // out of `run`

void fence();
void check_aligned(const void* pointer, std::size_t bytes);
void cp_async(void* shared, const void* global, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int pending);

// `out` has `matrices` (1, 2, 4) elements.
void ldmatrix(uint32_t* out, int matrices, bool transpose, const void* row);

// d += a b for a 16 x K and a K x 8 matrix. fragments(a, b, g, t, put_a, put_b) says what lane 4 g + t holds.
template <int K, int A, int B, class Fragments>
CUDA_HOST_INLINE void mma(float (&d)[4], const uint32_t (&a)[A], const uint32_t (&b)[B], Fragments) {
  struct Argument {
    float* d;
    const uint32_t *a, *b;
  } argument{d, a, b};
  collective("mma", 0xffffffffu, &argument, [](Lanes lanes, unsigned) {
    float left[16][K], right[K][8];
    for (int lane = 0; lane < 32; lane++) {
      const Argument& of_lane = *static_cast<Argument*>(lanes[lane]);
      Fragments()(
          of_lane.a, of_lane.b, lane / 4, lane % 4, [&](int row, int k, float value) { left[row][k] = value; },
          [&](int k, int column, float value) { right[k][column] = value; });
    }
    float sums[16][8] = {};
    for (int row = 0; row < 16; row++) {
      for (int k = 0; k < K; k++) {
        for (int column = 0; column < 8; column++) sums[row][column] += left[row][k] * right[k][column];
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      float* of_lane = static_cast<Argument*>(lanes[lane])->d;
      for (int i = 0; i < 4; i++) of_lane[i] += sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
  });
}

// A shuffle. source(lane) is the lane to read.
template <class T>
CUDA_HOST_INLINE T shuffle(const char* operation, unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2));
  struct Argument {
    T value, result;
    int source;
  } argument{value, value, source};
  collective(operation, mask, &argument, [](Lanes lanes, unsigned mask) {
    for (int lane = 0; lane < 32; lane++) {
      if (!(mask >> lane & 1)) continue;
      Argument& of_lane = *static_cast<Argument*>(lanes[lane]);
      if (!(mask >> of_lane.source & 1)) fail_lane(lane, "shuffle from a lane outside the mask");
      of_lane.result = static_cast<Argument*>(lanes[of_lane.source])->value;
    }
  });
  return argument.result;
}

// The lanes of `mask` whose predicate holds.
CUDA_HOST_INLINE unsigned vote(const char* operation, unsigned mask, bool predicate) {
  struct Argument {
    bool predicate;
    unsigned result;
  } argument{predicate, 0};
  collective(operation, mask, &argument, [](Lanes lanes, unsigned mask) {
    unsigned result = 0;
    for (int lane = 0; lane < 32; lane++) {
      if (mask >> lane & 1) result |= static_cast<unsigned>(static_cast<Argument*>(lanes[lane])->predicate) << lane;
    }
    for (int lane = 0; lane < 32; lane++) {
      if (mask >> lane & 1) static_cast<Argument*>(lanes[lane])->result = result;
    }
  });
  return argument.result;
}

// The lanes of `mask` that have the same value as this one.
template <class T>
CUDA_HOST_INLINE unsigned match(const char* operation, unsigned mask, T value) {
  struct Argument {
    T value;
    unsigned result;
  } argument{value, 0};
  collective(operation, mask, &argument, [](Lanes lanes, unsigned mask) {
    for (int lane = 0; lane < 32; lane++) {
      if (!(mask >> lane & 1)) continue;
      Argument& of_lane = *static_cast<Argument*>(lanes[lane]);
      for (int other = 0; other < 32; other++) {
        if (!(mask >> other & 1)) continue;
        const bool same = std::memcmp(&of_lane.value, &static_cast<Argument*>(lanes[other])->value, sizeof(T)) == 0;
        of_lane.result |= static_cast<unsigned>(same) << other;
      }
    }
  });
  return argument.result;
}

template <class T, class Op>
CUDA_HOST_INLINE T reduce(const char* operation, unsigned mask, T value, Op) {
  struct Argument {
    T value;
  } argument{value};
  collective(operation, mask, &argument, [](Lanes lanes, unsigned mask) {
    const int first = __builtin_ctz(mask);
    T result = static_cast<Argument*>(lanes[first])->value;
    for (int lane = first + 1; lane < 32; lane++) {
      if (mask >> lane & 1) result = Op()(result, static_cast<Argument*>(lanes[lane])->value);
    }
    for (int lane = 0; lane < 32; lane++) {
      if (mask >> lane & 1) static_cast<Argument*>(lanes[lane])->value = result;
    }
  });
  return argument.value;
}

// old = *address; *address = f(old), as one atomic step. The compiler's own atomics, so that every build sees them.
template <class T, class F>
CUDA_HOST_INLINE T update(T* address, F f) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  Bits* const bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(bits, &old,
                                      __builtin_bit_cast(Bits, static_cast<T>(f(__builtin_bit_cast(T, old)))), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return __builtin_bit_cast(T, old);
}

}  // namespace cuda_host

// ---------------------------------------------------------------------------------------------- Built-in variables

#define threadIdx (cuda_host::thread_index())
#define blockIdx (cuda_host::block_index())
#define blockDim (cuda_host::block_size())
#define gridDim (cuda_host::grid_size())
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------- Barriers, warps

// A key of its own for every place in the source: two may stand on one line.
#define CUDA_HOST_KEY          \
  ([]() -> const void* {       \
    static const char key = 0; \
    return &key;               \
  }())
#define __syncthreads() static_cast<void>(cuda_host::barrier(CUDA_HOST_KEY, false))
#define __syncthreads_count(predicate) cuda_host::barrier(CUDA_HOST_KEY, static_cast<bool>(predicate))
#define __syncthreads_or(predicate) \
  static_cast<int>(cuda_host::barrier(CUDA_HOST_KEY, static_cast<bool>(predicate)) > 0)
#define __syncthreads_and(predicate) \
  static_cast<int>(cuda_host::barrier(CUDA_HOST_KEY, !static_cast<bool>(predicate)) == 0)

CUDA_HOST_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::sync_warp(mask); }
CUDA_HOST_INLINE void __threadfence() { cuda_host::fence(); }
CUDA_HOST_INLINE void __threadfence_block() {}

template <class T>
CUDA_HOST_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = cuda_host::lane_index();
  return cuda_host::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
CUDA_HOST_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_host::lane_index(), source = lane - static_cast<int>(delta);
  return cuda_host::shuffle("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <class T>
CUDA_HOST_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_host::lane_index(), source = lane + static_cast<int>(delta);
  return cuda_host::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
CUDA_HOST_INLINE T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = cuda_host::lane_index(), source = lane ^ lane_mask;
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
CUDA_HOST_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_host::vote("__ballot_sync", mask, predicate != 0);
}
CUDA_HOST_INLINE int __any_sync(unsigned mask, int predicate) {
  return cuda_host::vote("__any_sync", mask, predicate != 0) != 0;
}
CUDA_HOST_INLINE int __all_sync(unsigned mask, int predicate) {
  return cuda_host::vote("__all_sync", mask, predicate != 0) == mask;
}
template <class T>
CUDA_HOST_INLINE unsigned __match_any_sync(unsigned mask, T value) {
  return cuda_host::match("__match_any_sync", mask, value);
}
template <class T>
CUDA_HOST_INLINE unsigned __match_all_sync(unsigned mask, T value, int* all) {
  const unsigned same = cuda_host::match("__match_all_sync", mask, value);
  *all = same == mask;
  return same == mask ? mask : 0;
}
template <class T>
CUDA_HOST_INLINE T __reduce_add_sync(unsigned mask, T value) {
  return cuda_host::reduce("__reduce_add_sync", mask, value, [](T a, T b) { return static_cast<T>(a + 0u + b); });
}
template <class T>
CUDA_HOST_INLINE T __reduce_min_sync(unsigned mask, T value) {
  return cuda_host::reduce("__reduce_min_sync", mask, value, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
CUDA_HOST_INLINE T __reduce_max_sync(unsigned mask, T value) {
  return cuda_host::reduce("__reduce_max_sync", mask, value, [](T a, T b) { return b > a ? b : a; });
}
CUDA_HOST_INLINE unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return cuda_host::reduce("__reduce_and_sync", mask, value, [](unsigned a, unsigned b) { return a & b; });
}
CUDA_HOST_INLINE unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return cuda_host::reduce("__reduce_or_sync", mask, value, [](unsigned a, unsigned b) { return a | b; });
}
CUDA_HOST_INLINE unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return cuda_host::reduce("__reduce_xor_sync", mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}

// ---------------------------------------------------------------------------------------------- Atomics

// Integers wrap around. The second argument's type follows the first's, as CUDA's overloads let it.
template <class T>
CUDA_HOST_INLINE T atomicAdd(T* address, std::type_identity_t<T> value) {
  return cuda_host::update(address, [=](T old) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value));
    } else {
      return old + value;
    }
  });
}
template <class T>
CUDA_HOST_INLINE T atomicSub(T* address, std::type_identity_t<T> value) {
  using Unsigned = std::make_unsigned_t<T>;
  return cuda_host::update(
      address, [=](T old) { return static_cast<T>(static_cast<Unsigned>(old) - static_cast<Unsigned>(value)); });
}
template <class T>
CUDA_HOST_INLINE T atomicMin(T* address, std::type_identity_t<T> value) {
  return cuda_host::update(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
CUDA_HOST_INLINE T atomicMax(T* address, std::type_identity_t<T> value) {
  return cuda_host::update(address, [=](T old) { return value > old ? value : old; });
}
template <class T>
CUDA_HOST_INLINE T atomicAnd(T* address, std::type_identity_t<T> value) {
  return cuda_host::update(address, [=](T old) { return static_cast<T>(old & value); });
}
template <class T>
CUDA_HOST_INLINE T atomicOr(T* address, std::type_identity_t<T> value) {
  return cuda_host::update(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
CUDA_HOST_INLINE T atomicXor(T* address, std::type_identity_t<T> value) {
  return cuda_host::update(address, [=](T old) { return static_cast<T>(old ^ value); });
}
template <class T>
CUDA_HOST_INLINE T atomicExch(T* address, std::type_identity_t<T> value) {
  return cuda_host::update(address, [=](T) { return value; });
}
CUDA_HOST_INLINE unsigned atomicInc(unsigned* address, unsigned limit) {
  return cuda_host::update(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
// Compares bits. Unlike update() it is a single atomic access even where it stores nothing.
template <class T>
CUDA_HOST_INLINE T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  static_assert(std::is_integral_v<T>);
  __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// ---------------------------------------------------------------------------------------------- Loads, stores, bits

template <class T>
CUDA_HOST_INLINE T __ldg(const T* address) {
  return *address;
}
template <class T>
CUDA_HOST_INLINE T __ldcs(const T* address) {
  return *address;
}
template <class T>
CUDA_HOST_INLINE T __ldcg(const T* address) {
  return *address;
}
template <class T>
CUDA_HOST_INLINE void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
CUDA_HOST_INLINE void __stcg(T* address, T value) {
  *address = value;
}

CUDA_HOST_INLINE int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
CUDA_HOST_INLINE unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
CUDA_HOST_INLINE float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
CUDA_HOST_INLINE float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
CUDA_HOST_INLINE long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
CUDA_HOST_INLINE double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }

CUDA_HOST_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
CUDA_HOST_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
CUDA_HOST_INLINE int __ffs(int x) { return __builtin_ffs(x); }
CUDA_HOST_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
CUDA_HOST_INLINE int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
CUDA_HOST_INLINE int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
CUDA_HOST_INLINE unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
CUDA_HOST_INLINE unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
CUDA_HOST_INLINE unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
CUDA_HOST_INLINE unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}

// ---------------------------------------------------------------------------------------------- Maths

// CUDA declares these names without a namespace as well; its approximations (__expf) are libm's functions here.
using std::abs, std::isfinite, std::isinf, std::isnan;
template <class T>
CUDA_HOST_INLINE std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <class T>
CUDA_HOST_INLINE std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}
CUDA_HOST_INLINE float rsqrtf(float x) { return 1.f / std::sqrt(x); }
CUDA_HOST_INLINE double rsqrt(double x) { return 1. / std::sqrt(x); }
CUDA_HOST_INLINE float __expf(float x) { return std::exp(x); }
CUDA_HOST_INLINE float __logf(float x) { return std::log(x); }
CUDA_HOST_INLINE float __log2f(float x) { return std::log2(x); }
CUDA_HOST_INLINE float __fdividef(float x, float y) { return x / y; }
CUDA_HOST_INLINE float __frcp_rn(float x) { return 1.f / x; }
CUDA_HOST_INLINE float __frsqrt_rn(float x) { return static_cast<float>(1. / std::sqrt(static_cast<double>(x))); }
CUDA_HOST_INLINE float __fsqrt_rn(float x) { return std::sqrt(x); }
CUDA_HOST_INLINE float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
CUDA_HOST_INLINE float __fadd_rn(float x, float y) { return x + y; }
CUDA_HOST_INLINE float __fmul_rn(float x, float y) { return x * y; }
CUDA_HOST_INLINE float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
