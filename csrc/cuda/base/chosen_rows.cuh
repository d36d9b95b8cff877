// Rows of the memory that are met one at a time, gathered: a row held by a warp; and the prototypes' gradient where
// each sample meets a few chosen slots only,
//
//     dL/dw_j = sum over the entries e with slot_e = j of g_e x_{i(e)},   g_e = dL/dcos of the entry, i(e) its sample
//
// and for rows that are scaled to unit length first (u = w / |w|), (dL/du - (dL/du . u) u) / |w|, applied once to the
// sum.
//
// The entries (B K) come sorted by slot, stably, so that those of a slot stand side by side in batch order. One warp
// per entry; the one at the head of a slot's entries adds them up and writes the row, the others end at once. Every row
// is written by one warp, in a fixed order: deterministic, no atomics. Read are B K rows of x, 16 bytes at a time where
// they are aligned; written at most B K rows. 2 B K D FLOP. D <= 1024.
#pragma once

#include "factors.cuh"
#include "warp.cuh"

namespace protomem::cuda {

constexpr int most_lane_columns = 1024;

// A row of up to 1024 numbers held by a warp, groups of 16 bytes of T side by side in a lane; zeros past its end.
template <class T>
struct LaneRow {
  static constexpr int GROUP = 16 / sizeof(T), OWN = most_lane_columns / warp_lanes;
  float own[OWN];

  static DEVICE int column(int k) { return (k / GROUP * warp_lanes + lane_index()) * GROUP + k % GROUP; }

  // `aligned`: the rows of U can be read 16 bytes at a time.
  template <class U>
  DEVICE void load(const Rows<const U>& rows, int64_t row, int dim, bool aligned) {
    constexpr int N = Vector16<U>::size < GROUP ? Vector16<U>::size : GROUP;
    const U* from = rows.data + row * rows.row_stride;
#pragma unroll
    for (int k = 0; k < OWN; k += N) {
      const int first = column(k);
      bool done = false;
      if constexpr (N == Vector16<U>::size) {
        if (aligned && first + N <= dim) {
          const Vector16<U> part = load_16_readonly(from + first);
#pragma unroll
          for (int n = 0; n < N; n++) own[k + n] = widen(part[n]);
          done = true;
        }
      }
      if (!done) {
#pragma unroll
        for (int n = 0; n < N; n++) own[k + n] = first + n < dim ? widen(from[(first + n) * rows.column_stride]) : 0.0f;
      }
    }
  }
  DEVICE void clear() {
#pragma unroll
    for (int k = 0; k < OWN; k++) own[k] = 0;
  }
  DEVICE void scale(float factor) {
#pragma unroll
    for (int k = 0; k < OWN; k++) own[k] *= factor;
  }
  DEVICE void add(float factor, const LaneRow& other) {
#pragma unroll
    for (int k = 0; k < OWN; k++) own[k] += factor * other.own[k];
  }
  DEVICE float dot(const LaneRow& other) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < OWN; k++) sum += own[k] * other.own[k];
    return warp_sum(sum);
  }
  // 1 / length; 0 for a zero row, NaN for a broken one. The largest entry is divided out first, so that squares neither
  // overflow nor underflow.
  DEVICE float inverse_length() const {
    float largest = 0, sum = 0;
#pragma unroll
    for (int k = 0; k < OWN; k++) largest = fmaxf(largest, fabsf(own[k]));
    largest = warp_max(largest);
    const float unit = largest > 0 ? largest : 1.0f;
#pragma unroll
    for (int k = 0; k < OWN; k++) sum += own[k] / unit * (own[k] / unit);
    const float length = unit * sqrtf(warp_sum(sum));
    return length == 0 ? 0.0f : 1 / length;
  }
  template <class U>
  DEVICE void store(U* to, int dim) const {
#pragma unroll
    for (int k = 0; k < OWN; k++) {
      if (column(k) < dim) to[column(k)] = narrow<U>(in_range_of<U>(own[k]));
    }
  }
};

// 1 / |w_j| for every slot; 0 for a zero row, NaN for a broken one. One warp a slot, eight a block.
template <class T>
KERNEL(256)
void inverse_lengths_kernel(Rows<const T> prototypes, bool aligned, int64_t capacity, int dim, float* inverse_ptr) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * 8 + warp_index();
  if (slot >= capacity) return;  // a whole warp
  LaneRow<T> row;
  row.load(prototypes, slot, dim, aligned);
  const float inverse = row.inverse_length();
  if (lane_index() == 0) inverse_ptr[slot] = inverse;
}

template <class T>
struct ChosenRows {
  const int64_t* sorted_ptr = nullptr;  // (E,): slots, ascending; negative ones are none
  const int64_t* order_ptr = nullptr;   // (E,): the entry that each came from
  const float* grads_ptr = nullptr;     // (E,): g
  int64_t entries = 0, capacity = 0;
  int chosen = 1;  // entries per sample
  int dim = 0;
  Rows<const float> x;
  Rows<const T> prototypes;
  bool aligned = false;  // whether rows of both can be read 16 bytes at a time
  bool normalize = false;
  T* grad_prototypes_ptr = nullptr;  // (M, D), zeros
};

constexpr int chosen_rows_per_block = 4;

template <class T>
KERNEL(chosen_rows_per_block* warp_lanes)
void chosen_rows_kernel(ChosenRows<T> args) {
  const int64_t head = static_cast<int64_t>(blockIdx.x) * chosen_rows_per_block + warp_index();
  if (head >= args.entries) return;  // a whole warp, here and below
  const int64_t slot = args.sorted_ptr[head];
  if (slot < 0 || slot >= args.capacity || (head > 0 && args.sorted_ptr[head - 1] == slot)) return;
  LaneRow<T> total, row;
  total.clear();
  for (int64_t at = head; at < args.entries && args.sorted_ptr[at] == slot; at++) {
    const int64_t entry = args.order_ptr[at];
    row.load(args.x, entry / args.chosen, args.dim, args.aligned);
    total.add(args.grads_ptr[entry], row);
  }
  if (args.normalize) {
    row.load(args.prototypes, slot, args.dim, args.aligned);
    const float inverse = row.inverse_length();
    row.scale(inverse);
    total.add(-total.dot(row), row);
    total.scale(inverse);
  }
  total.store(args.grad_prototypes_ptr + slot * args.dim, args.dim);
}

}  // namespace protomem::cuda
