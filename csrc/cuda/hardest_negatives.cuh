// hardest_negatives on a GPU: the exact k largest cosines of each sample to the memory, no B x M logits.
//
// With cos_ij = x_i . w_j over the negatives j of row i (occupied, not the target; a NaN counts as -inf) and the memory
// cut into N = ceil(M / 128) groups of 128 slots:
//
//   maxima      streams the memory once (stream.cuh, without a second product) and stores one maximum per row and
//               group: 4 B M / 128 bytes. x is cut into as many numbers of the memory's dtype as hold its bits (3 x 8
//               for bfloat16, 2 x 11 for float16), so that cosines are exact to float32.
//   selection   each row's k best groups, equal maxima in favour of the lower group;
//   candidates  the cosines of the chosen (row, group) pairs again, one prototype a warp: 128 B k products of length D;
//   selection   the k best of each row's 128 k candidates, equal cosines to the lower slot, and their order.
//
// **Why k groups are enough, ties included.** Order the negatives of a row by (cosine descending, slot ascending), and
// its groups by (maximum descending, group ascending). A group's first negative has the group's maximum as its cosine.
// If group s stands before group t, the first negative of s stands before the first negative of t: its cosine is
// larger, or equal and its slot lower, as slots ascend with groups. Were a group t with k groups before it to hold one
// of the k first negatives, its first negative would be one of them too, with k others before it: a contradiction.
//
// **Rounding.** Both passes compute a cosine from the two rows alone, so equal prototypes tie in both; but they add in
// another order. With d the difference, some 2^-22, cosines are right to d, and only negatives within 2 d of the k-th
// can change places at the edge of the list. Results are those of the second pass.
//
// **Selection.** A block per row finds the k-th largest value by its bits, eight at a time from the highest (a
// histogram in shared memory each time, integer atomics: any order gives the same counts), then keeps what is above it,
// and of what equals it the first ones, in the order of columns. The k kept are ordered by counting: k^2 comparisons a
// row.
//
// Backward touches the B k chosen rows only: dL/dx_i = sum of dL/dcos w_j over i's slots, a block per row; dL/dw is
// chosen_rows.cuh. Deterministic; nothing is read back. D <= 1024, k 128 < 2^31.
//
// Idea of the two levels: maxima per block as in approximate top-k for TPUs (Chern et al., arXiv 2206.14286), exact
// here.
#pragma once

#include <cmath>

#include "base/chosen_rows.cuh"
#include "base/stream.cuh"
#include "base/warp.cuh"

namespace protomem::cuda {

constexpr int group_slots = 128;  // that share one maximum

struct HardestInputs {
  int64_t batch = 0, capacity = 0, groups = 0;
  int dim = 0;
  Rows<const float> x;           // (B, D)
  Slots targets;                 // (B,)
  Strided<const bool> occupied;  // (M,) or not given: all
};

struct HardestMaxima : HardestInputs {
  Streamed prototypes;                 // (M, D)
  const float* inverse_ptr = nullptr;  // (M,): 1 / |w_j| if prototypes are scaled to unit length
  int64_t per_split = 0;               // slots that one row of blocks streams, a multiple of group_slots
  float* maxima_ptr = nullptr;         // (B, groups)
};

template <class Shape_>
struct MaximaTask : SamplesTask<Shape_, HardestMaxima> {
  using Shape = Shape_;
  using Base = SamplesTask<Shape, HardestMaxima>;
  using T = typename Shape::Element;
  using Base::args, Base::row, Base::target, Base::last;
  static constexpr bool FIRST = true, SECOND = false;
  static constexpr int RESIDENT_TERMS = exact_terms<T>;
  static_assert(group_slots % Shape::TILE == 0);

  int64_t start = 0;
  float best = -INFINITY;
  float inverse[Shape::OWN];

  DEVICE MaximaTask(const HardestMaxima& args_, int64_t first_row, int own_row) : Base(args_, first_row, own_row) {}

  template <class Columns>
  DEVICE void prepare(int64_t slot, Columns column_of) {
    start = slot;
    this->load_inverses(inverse, slot, column_of);
  }
  template <class Columns>
  DEVICE float weigh(float (&value)[Shape::OWN], uint32_t present, Columns column_of) {
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) {
      const int column = column_of(j);
      const float cosine = value[j] / Factor<T>::LIFT * inverse[j];
      if ((present >> column & 1u) != 0 && start + column != target) best = fmaxf(best, cosine);  // passes over NaN
    }
    const int64_t end = start + Shape::TILE;
    if (end % group_slots == 0 || end >= last()) {
      const float largest = warp_max<Shape::PER_ROW>(best);
      if (row < args.batch && threadIdx.x % Shape::PER_ROW == 0) {
        args.maxima_ptr[row * args.groups + start / group_slots] = largest;
      }
      best = -INFINITY;
    }
    return 1;
  }
  DEVICE void close() {}
};

template <class Shape>
KERNEL(Shape::THREADS, 1)
void hardest_maxima_kernel(HardestMaxima args) {
  stream<MaximaTask<Shape>>(args);
}

constexpr int selection_threads = 256;

// Bits of a float that order as unsigned numbers like the floats do. -0 and 0 are one.
DEVICE uint32_t ascending_bits(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x == 0 ? 0.0f : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Writes the columns of the k largest of `width` values without a NaN, ascending; ties to the earlier one. 1 <= k <=
// width.
DEVICE void select_largest(const float* values, int64_t width, int k, int* columns_ptr) {
  constexpr int THREADS = selection_threads;
  SMEM(counts, int[256]);
  SMEM(chosen, int[2]);  // the digit, and how many of the wanted have it or stand before it
  uint32_t prefix = 0, mask = 0;
  int wanted = k;  // the rank, among values that share the prefix, of the k-th largest
  for (int shift = 24; shift >= 0; shift -= 8) {
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < width; i += THREADS) {
      const uint32_t bits = ascending_bits(values[i]);
      if ((bits & mask) == prefix) atomicAdd(&counts[bits >> shift & 255u], 1);
    }
    __syncthreads();
    // Thread t looks at digit 255 - t: those before it have larger digits.
    const int own = counts[255 - threadIdx.x];
    int total;
    const int before = block_exclusive_sum<THREADS>(own, total);
    if (before < wanted && wanted <= before + own) {
      chosen[0] = 255 - static_cast<int>(threadIdx.x);
      chosen[1] = wanted - before;
    }
    __syncthreads();
    prefix |= static_cast<uint32_t>(chosen[0]) << shift;
    mask |= 255u << shift;
    wanted = chosen[1];
    __syncthreads();
  }
  int tied_before = 0, kept_before = 0;
  for (int64_t first = 0; first < width; first += THREADS) {
    const int64_t i = first + threadIdx.x;
    const uint32_t bits = i < width ? ascending_bits(values[i]) : 0;
    const bool tied = i < width && bits == prefix;
    int tied_here, kept_here;
    const int rank = tied_before + block_exclusive_sum<THREADS>(tied ? 1 : 0, tied_here);
    const bool kept = i < width && (bits > prefix || (tied && rank < wanted));
    const int place = kept_before + block_exclusive_sum<THREADS>(kept ? 1 : 0, kept_here);
    if (kept) columns_ptr[place] = static_cast<int>(i);
    tied_before += tied_here;
    kept_before += kept_here;
  }
}

// The `chosen` best groups of each row, (rows, chosen), ascending. A block per row.
KERNEL(selection_threads)
void hardest_groups_kernel(const float* maxima_ptr, int64_t groups, int chosen, int* best_ptr) {
  select_largest(maxima_ptr + blockIdx.x * groups, groups, chosen,
                 best_ptr + blockIdx.x * static_cast<int64_t>(chosen));
}

template <class T>
struct HardestCandidates : HardestInputs {
  Rows<const T> prototypes;
  bool aligned = false;  // whether rows of x and of the memory can be read 16 bytes at a time
  bool normalize = false;
  const int* best_ptr = nullptr;  // (rows, chosen), ascending; null: all groups
  int64_t first_row = 0;          // of the scratch
  int chosen = 0;
  float* candidates_ptr = nullptr;  // (rows, chosen, 128)
};

constexpr int candidate_threads = 128;

// A block per (row, chosen group): their cosines, -inf at all that is no negative.
template <class T>
KERNEL(candidate_threads)
void hardest_candidates_kernel(HardestCandidates<T> args) {
  const int64_t local = blockIdx.x / args.chosen, i = args.first_row + local;
  const int at_group = static_cast<int>(blockIdx.x % args.chosen);
  const int64_t group = args.best_ptr == nullptr ? at_group : args.best_ptr[i * args.chosen + at_group];
  const int64_t target = args.targets[i];
  LaneRow<T> x, w;
  x.load(args.x, i, args.dim, args.aligned);
  for (int at = warp_index(); at < group_slots; at += candidate_threads / warp_lanes) {
    const int64_t slot = group * group_slots + at;
    float cosine = -INFINITY;
    if (slot < args.capacity && slot != target && (args.occupied.data == nullptr || args.occupied[slot])) {
      w.load(args.prototypes, slot, args.dim, args.aligned);
      const float inverse = args.normalize ? w.inverse_length() : 1.0f;
      cosine = w.dot(x) * inverse;
    }
    if (lane_index() == 0)
      args.candidates_ptr[int64_t{blockIdx.x} * group_slots + at] = cosine == cosine ? cosine : -INFINITY;
  }
}

struct HardestResult : HardestInputs {
  const int* best_ptr = nullptr;
  int64_t first_row = 0;
  int chosen = 0, found = 0, k = 0;  // found = min(k, M)
  const float* candidates_ptr = nullptr;
  int* columns_ptr = nullptr;    // (rows, found): scratch
  float* cosines_ptr = nullptr;  // (B, k)
  int64_t* slots_ptr = nullptr;  // (B, k)
};

// A block per row: the k best candidates in order. A broken embedding gets (NaN, -1).
KERNEL(selection_threads)
void hardest_result_kernel(HardestResult args) {
  const int64_t local = blockIdx.x, i = args.first_row + local, width = int64_t{group_slots} * args.chosen;
  const float* values = args.candidates_ptr + local * width;
  int* columns = args.columns_ptr + local * args.found;
  bool sound = true;
  for (int column = threadIdx.x; column < args.dim; column += selection_threads) {
    sound = sound && std::isfinite(args.x(i, column));
  }
  const bool broken = __syncthreads_or(!sound) != 0;
  if (args.found > 0) select_largest(values, width, args.found, columns);  // the whole block, or none of it
  __syncthreads();
  for (int own = threadIdx.x; own < args.k; own += selection_threads) {
    int place = own;
    float cosine = -INFINITY;
    int64_t slot = -1;
    if (own < args.found) {
      const int column = columns[own];
      cosine = values[column];
      place = 0;
      for (int other = 0; other < args.found; other++) {
        const float value = values[columns[other]];
        place += value > cosine || (value == cosine && other < own) ? 1 : 0;
      }
      if (cosine != -INFINITY) {
        const int at = column / group_slots;
        const int64_t group = args.best_ptr == nullptr ? at : args.best_ptr[i * args.chosen + at];
        slot = group * group_slots + column % group_slots;
      }
    }
    args.cosines_ptr[i * args.k + place] = broken ? NAN : cosine;
    args.slots_ptr[i * args.k + place] = broken ? -1 : slot;
  }
}

template <class T>
struct HardestGradient {
  Rows<const float> grad;  // (B, k): dL/dcos
  Rows<const T> prototypes;
  Slots slots;  // (B, k)
  bool aligned = false, normalize = false;
  int dim = 0, k = 0;
  float* grad_x_ptr = nullptr;  // (B, D)
};

// dL/dx_i, a block per row; its warps take turns and are added up in order.
template <class T>
KERNEL(candidate_threads)
void hardest_gradient_kernel(HardestGradient<T> args) {
  constexpr int WARPS = candidate_threads / warp_lanes;
  SMEM(moments, float[WARPS][most_lane_columns]);
  const int64_t i = blockIdx.x;
  LaneRow<T> moment, w;
  moment.clear();
  for (int j = warp_index(); j < args.k; j += WARPS) {
    const int64_t slot = args.slots.at(i, j);
    if (slot < 0) continue;  // the whole warp
    w.load(args.prototypes, slot, args.dim, args.aligned);
    moment.add(args.grad(i, j) * (args.normalize ? w.inverse_length() : 1.0f), w);
  }
  moment.store(&moments[warp_index()][0], most_lane_columns);
  __syncthreads();
  for (int column = threadIdx.x; column < args.dim; column += candidate_threads) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += moments[warp][column];
    args.grad_x_ptr[i * args.dim + column] = sum;
  }
}

}  // namespace protomem::cuda
