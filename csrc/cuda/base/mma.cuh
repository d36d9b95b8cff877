// Tensor cores, sm_80 and newer: ldmatrix and mma.sync, for whole warps. Sums are float32.
//
// Fragments of lane = 4 g + t (g = 0..7, t = 0..3), 16-bit elements, the lower column (row for b) in the lower half:
//   a (16 x 16)  a[0] = rows g,     columns 2t, 2t+1      b (16 x 8)  b[0] = rows 2t, 2t+1,   column g
//                a[1] = rows g + 8, columns 2t, 2t+1                  b[1] = rows 2t+8, 2t+9, column g
//                a[2] = rows g,     columns 2t+8, 2t+9    d (16 x 8)  d[0], d[1] = row g,     columns 2t, 2t+1
//                a[3] = rows g + 8, columns 2t+8, 2t+9                d[2], d[3] = row g + 8, columns 2t, 2t+1
// tf32: a (16 x 8): a[0] = (g, t), a[1] = (g + 8, t), a[2] = (g, t + 4), a[3] = (g + 8, t + 4); b (8 x 8): b[0] = (t,
// g), b[1] = (t + 4, g); d as above.
#pragma once

#include "kernel.cuh"

namespace protomem::cuda {

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address (aligned to 16 bytes) of row l %
// 8 of matrix l / 8, and gets, of matrix i in out[i], row g, columns 2t and 2t+1; transposed: rows 2t and 2t+1, column
// g. So a row-major 16 x 16 tile becomes `a` when lane l gives row l % 16, column 8 * (l / 16), and b stored as rows of
// n (columns k contiguous) becomes b of two neighbouring 8-column tiles when it gives row l % 8 + 8 * (l / 16), column
// 8 * (l / 8 % 2): {out[0], out[1]} and {out[2], out[3]}.
DEVICE void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#ifdef PROTOMEM_HOST
  cuda_host::ldmatrix(out, 4, false, row);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}
DEVICE void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
#ifdef PROTOMEM_HOST
  cuda_host::ldmatrix(out, 4, true, row);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}
// Two matrices: the addresses of lanes 0 .. 15 count.
DEVICE void ldmatrix_x2(uint32_t (&out)[2], const void* row) {
#ifdef PROTOMEM_HOST
  cuda_host::ldmatrix(out, 2, false, row);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(address)
               : "memory");
#endif
}
DEVICE void ldmatrix_x2_trans(uint32_t (&out)[2], const void* row) {
#ifdef PROTOMEM_HOST
  cuda_host::ldmatrix(out, 2, true, row);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(out[0]), "=r"(out[1])
               : "r"(address)
               : "memory");
#endif
}

#ifdef PROTOMEM_HOST
// What a host twin of mma multiplies: an element of 16 bits as float, or a tf32.
template <class T>
inline float element_16(uint32_t pair, int half) {
  return widen(bit_cast<T>(static_cast<uint16_t>(pair >> (16 * half))));
}
#endif

// d += a b, T = bfloat16 or float16.
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>);
#ifdef PROTOMEM_HOST
  cuda_host::mma<16>(d, a, b,
                     [](const uint32_t* lane_a, const uint32_t* lane_b, int g, int t, auto&& put_a, auto&& put_b) {
                       for (int i = 0; i < 4; i++) {
                         for (int half = 0; half < 2; half++)
                           put_a(g + 8 * (i % 2), 2 * t + 8 * (i / 2) + half, element_16<T>(lane_a[i], half));
                       }
                       for (int i = 0; i < 2; i++) {
                         for (int half = 0; half < 2; half++)
                           put_b(2 * t + 8 * i + half, g, element_16<T>(lane_b[i], half));
                       }
                     });
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// The bits of x rounded to tf32: 10 bits of fraction, to nearest, ties away from zero.
DEVICE uint32_t to_tf32(float x) {
#ifdef PROTOMEM_HOST
  const uint32_t bits = bit_cast<uint32_t>(x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits & (x != x ? 0x7fffffffu : 0xffffffffu);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// d += a b for tf32 elements; the 13 lowest bits of each are not looked at.
DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef PROTOMEM_HOST
  cuda_host::mma<8>(d, a, b,
                    [](const uint32_t* lane_a, const uint32_t* lane_b, int g, int t, auto&& put_a, auto&& put_b) {
                      for (int i = 0; i < 4; i++)
                        put_a(g + 8 * (i % 2), t + 4 * (i / 2), bit_cast<float>(lane_a[i] & 0xffffe000u));
                      for (int i = 0; i < 2; i++) put_b(t + 4 * i, g, bit_cast<float>(lane_b[i] & 0xffffe000u));
                    });
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace protomem::cuda
