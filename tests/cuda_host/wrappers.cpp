// Kernels around each wrapper of csrc/cuda/base, for test_wrappers.py.
#include "../../csrc/cuda/base/memory.cuh"
#include "../../csrc/cuda/base/mma.cuh"
#include "../../csrc/cuda/base/warp.cuh"
#include "driver.h"

namespace protomem::cuda {
namespace {

// For each block of THREADS integers: the sums before each, the sum, the largest and the smallest.
template <class T, int THREADS>
KERNEL(THREADS)
void block_functions(const T* x_ptr, T* before_ptr, T* of_block_ptr) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  T total;
  before_ptr[i] = block_exclusive_sum<THREADS>(x_ptr[i], total);
  const T results[] = {total, block_sum<THREADS>(x_ptr[i]), block_max<THREADS>(x_ptr[i]), block_min<THREADS>(x_ptr[i])};
  if (threadIdx.x < 4) of_block_ptr[4 * blockIdx.x + threadIdx.x] = results[threadIdx.x];
}

// Per group of 8 lanes its sum; per warp the running maximum up to a lane, and over those before it (-1: none).
KERNEL(32)
void warp_functions(const int32_t* x_ptr, int32_t* sums_ptr, int32_t* maxima_ptr, int32_t* before_ptr) {
  const int lane = lane_index();
  sums_ptr[lane] = warp_sum<8>(x_ptr[lane]);
  maxima_ptr[lane] = warp_inclusive_scan(x_ptr[lane], Max());
  before_ptr[lane] = warp_exclusive_scan(x_ptr[lane], -1, Max());
}

// y = 2 x by vectors of 16 bytes, each load and store in turn.
template <class T>
KERNEL(128)
void twice(const T* x_ptr, T* y_ptr, int64_t n) {
  constexpr int size = Vector16<T>::size;
  for (int64_t i = threadIdx.x; i < n / size; i += 128) {
    Vector16<T> x = i % 3 == 0   ? load_16(x_ptr + i * size)
                    : i % 3 == 1 ? load_16_readonly(x_ptr + i * size)
                                 : load_16_streamed(x_ptr + i * size);
    for (int j = 0; j < size; j++) x[j] = narrow<T>(2 * widen(x[j]));
    if (i % 2 == 0) {
      store_16(y_ptr + i * size, x);
    } else {
      store_16_streamed(y_ptr + i * size, x);
    }
  }
}

// Copies the first n bytes in pieces of BYTES through shared memory, zeros after them.
template <int BYTES>
KERNEL(64)
void through_shared(const unsigned char* x_ptr, unsigned char* y_ptr, int64_t n) {
  DYN_SMEM(bytes);
  const int at = BYTES * static_cast<int>(threadIdx.x);
  const int64_t left = n - at;
  cp_async<BYTES>(bytes + at, left > 0 ? x_ptr + at : x_ptr,
                  left > BYTES ? BYTES
                  : left > 0   ? static_cast<int>(left)
                               : 0);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < BYTES; i++) y_ptr[64 * i + threadIdx.x] = bytes[64 * i + threadIdx.x];
}

// d (16 x 8) = a (16 x 16) b; `b` is stored as b (16 x 8) or, if `b_rows_are_columns`, as its transpose (8 x 16).
template <class T>
KERNEL(32)
void product(const T* a_ptr, const T* b_ptr, float* d_ptr, bool b_rows_are_columns) {
  SMEM(left, T[16][16]);
  SMEM(right, T[128]);
  const int lane = lane_index();
  for (int i = lane; i < 256; i += 32) left[i / 16][i % 16] = a_ptr[i];
  for (int i = lane; i < 128; i += 32) right[i] = b_ptr[i];
  __syncwarp();
  uint32_t a[4], b[2];
  ldmatrix_x4(a, &left[lane % 16][8 * (lane / 16)]);
  if (b_rows_are_columns) {
    ldmatrix_x2(b, &right[16 * (lane % 8) + 8 * (lane / 8 % 2)]);
  } else {
    ldmatrix_x2_trans(b, &right[8 * (lane % 16)]);
  }
  float d[4] = {};
  mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; i++) d_ptr[8 * (lane / 4 + 8 * (i / 2)) + 2 * (lane % 4) + i % 2] = d[i];
}

// Two products at once, of b (16 x 16) as two tiles of 8 columns, by ldmatrix_x4 as mma.cuh says.
template <class T>
KERNEL(32)
void wide_product(const T* a_ptr, const T* b_transposed_ptr, float* d_ptr, bool transposed_tile) {
  SMEM(left, T[16][16]);
  SMEM(right, T[16][16]);
  const int lane = lane_index();
  for (int i = lane; i < 256; i += 32) {
    left[i / 16][i % 16] = a_ptr[i];
    (transposed_tile ? right[i % 16][i / 16] : right[i / 16][i % 16]) = b_transposed_ptr[i];
  }
  __syncwarp();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, &left[lane % 16][8 * (lane / 16)]);
  if (transposed_tile) {
    ldmatrix_x4_trans(b, &right[lane % 16][8 * (lane / 16)]);
  } else {
    ldmatrix_x4(b, &right[lane % 8 + 8 * (lane / 16)][8 * (lane / 8 % 2)]);
  }
  for (int tile = 0; tile < 2; tile++) {
    float d[4] = {};
    const uint32_t of_tile[2] = {b[2 * tile], b[2 * tile + 1]};
    mma_m16n8k16<T>(d, a, of_tile);
    for (int i = 0; i < 4; i++) d_ptr[16 * (lane / 4 + 8 * (i / 2)) + 8 * tile + 2 * (lane % 4) + i % 2] = d[i];
  }
}

// d (16 x 8) = a (16 x 8) b (8 x 8) in tf32.
KERNEL(32)
void product_tf32(const float* a_ptr, const float* b_ptr, float* d_ptr) {
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  const uint32_t a[4] = {to_tf32(a_ptr[8 * g + t]), to_tf32(a_ptr[8 * (g + 8) + t]), to_tf32(a_ptr[8 * g + t + 4]),
                         to_tf32(a_ptr[8 * (g + 8) + t + 4])};
  const uint32_t b[2] = {to_tf32(b_ptr[8 * t + g]), to_tf32(b_ptr[8 * (t + 4) + g])};
  float d[4] = {};
  mma_m16n8k8_tf32(d, a, b);
  for (int i = 0; i < 4; i++) d_ptr[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = d[i];
}

template <class T>
KERNEL(32)
void pairs(const float* x_ptr, T* y_ptr, float* back_ptr) {
  const int i = 2 * lane_index();
  const uint32_t bits = pack_2<T>(x_ptr[i], x_ptr[i + 1]);
  reinterpret_cast<uint32_t*>(y_ptr)[lane_index()] = bits;
  const float2 back = unpack_2<T>(bits);
  back_ptr[i] = back.x;
  back_ptr[i + 1] = back.y;
}

template <class F>
const char* with_half(int64_t is_float16, const F& f) {
  return guarded([&] { is_float16 ? f(float16()) : f(bfloat16()); });
}

}  // namespace
}  // namespace protomem::cuda

using namespace protomem::cuda;

EXPORT const char* block_functions_int32(const int32_t* x_ptr, int64_t blocks, int32_t* before_ptr,
                                         int32_t* of_block_ptr) {
  return guarded(
      [&] { LAUNCH((block_functions<int32_t, 128>), blocks, 128, 0, nullptr, x_ptr, before_ptr, of_block_ptr); });
}
EXPORT const char* block_functions_float64(const double* x_ptr, int64_t blocks, double* before_ptr,
                                           double* of_block_ptr) {
  return guarded(
      [&] { LAUNCH((block_functions<double, 128>), blocks, 128, 0, nullptr, x_ptr, before_ptr, of_block_ptr); });
}
EXPORT const char* warp_functions_int32(const int32_t* x_ptr, int32_t* sums_ptr, int32_t* maxima_ptr,
                                        int32_t* before_ptr) {
  return guarded([&] { LAUNCH(warp_functions, 1, 32, 0, nullptr, x_ptr, sums_ptr, maxima_ptr, before_ptr); });
}
EXPORT const char* twice_float32(const float* x_ptr, float* y_ptr, int64_t n) {
  return guarded([&] { LAUNCH(twice<float>, 1, 128, 0, nullptr, x_ptr, y_ptr, n); });
}
EXPORT const char* twice_half(const void* x_ptr, void* y_ptr, int64_t n, int64_t is_float16) {
  return with_half(is_float16, [&]<class T>(T) {
    LAUNCH(twice<T>, 1, 128, 0, nullptr, static_cast<const T*>(x_ptr), static_cast<T*>(y_ptr), n);
  });
}
EXPORT const char* through_shared(const unsigned char* x_ptr, unsigned char* y_ptr, int64_t n, int64_t bytes) {
  return guarded([&] {
    if (bytes == 4) LAUNCH(through_shared<4>, 1, 64, 64 * 4, nullptr, x_ptr, y_ptr, n);
    if (bytes == 8) LAUNCH(through_shared<8>, 1, 64, 64 * 8, nullptr, x_ptr, y_ptr, n);
    if (bytes == 16) LAUNCH(through_shared<16>, 1, 64, 64 * 16, nullptr, x_ptr, y_ptr, n);
  });
}
EXPORT const char* product_half(const void* a_ptr, const void* b_ptr, float* d_ptr, int64_t transposed,
                                int64_t is_float16) {
  return with_half(is_float16, [&]<class T>(T) {
    LAUNCH(product<T>, 1, 32, 0, nullptr, static_cast<const T*>(a_ptr), static_cast<const T*>(b_ptr), d_ptr,
           transposed != 0);
  });
}
EXPORT const char* wide_product_half(const void* a_ptr, const void* b_transposed_ptr, float* d_ptr,
                                     int64_t transposed_tile, int64_t is_float16) {
  return with_half(is_float16, [&]<class T>(T) {
    LAUNCH(wide_product<T>, 1, 32, 0, nullptr, static_cast<const T*>(a_ptr), static_cast<const T*>(b_transposed_ptr),
           d_ptr, transposed_tile != 0);
  });
}
EXPORT const char* product_tf32_float32(const float* a_ptr, const float* b_ptr, float* d_ptr) {
  return guarded([&] { LAUNCH(product_tf32, 1, 32, 0, nullptr, a_ptr, b_ptr, d_ptr); });
}
EXPORT const char* pairs_half(const float* x_ptr, void* y_ptr, float* back_ptr, int64_t is_float16) {
  return with_half(is_float16,
                   [&]<class T>(T) { LAUNCH(pairs<T>, 1, 32, 0, nullptr, x_ptr, static_cast<T*>(y_ptr), back_ptr); });
}
