// margin_softmax_logits on a GPU: the (B, M) logits themselves.
//
// With x_i a unit embedding (i < B), w_j a prototype (j < M), y_ij = s x_i . w_j, z_i the target's logit (given) and
// s h_ij the hard-negative form of y_ij (HardForm; y_ij itself where there is none),
//
//   logits_ij = z_i at i's target, else s h_ij, else (an empty slot) -inf;
//
// and with G = dL/dlogits, H_ij = s G_ij h'_ij, but 0 at targets, in empty slots
//
//   dL/dx_i = sum_j H_ij w_j     dL/dw_j = sum_i H_ij x_i over sound samples     dL/dz_i = G_ij at the target
//   and where prototypes are scaled to unit length, u = w / |w|:  (dL/du - (dL/du . u) u) / |w|.
//
// **Forward**, one launch (two with lengths): stream.cuh's first product, samples resident, one split of the memory
// passes by; what comes out of a tile is reshaped and written, once.
// **Backward**, a plain product each, stream.cuh's second with H for the weights:
//   embeddings  samples resident, one split of the memory passes by, then `sums` adds the splits up in order;
//   prototypes  slots resident, the batch passes by: complete when written. `samples` says before which embeddings are
//               sound (a broken one passes nothing on) and writes them in the memory's dtype.
// Slopes h' need the cosines again: where there is a form the memory is taken in chunks, and the forward's kernel
// writes G h' of a chunk, from which both products read instead of from G. 64 MiB at most, whatever B M is; and a slope
// belongs to the very logit that was written. Four launches without a form; with one two, and three a chunk.
//
// **Bytes and FLOPs** of 32 x 32 logits (bfloat16, D = 512): forward 32 KiB of prototypes from the L2 cache, 3 MFLOP, 4
// KiB written; backward, of 64 x 32: 32 KiB of rows, 2 MFLOP and 8 KiB of G for either gradient. Each block of 64 rows
// reads the other side once. G is loaded a tile ahead, into registers. Rows of 4 k logits are written and read (for the
// embeddings) 16 bytes a thread, but 8 with tiles of 16 x 32 and 4 with 16 x 16; for the prototypes a warp reads whole
// sectors of 8 slots, a number a thread, as tensor cores want samples side by side.
//
// **Numerics.** Cosines are exact to float32: x is cut into as many numbers of the memory's dtype as hold its bits.
// Gradients of a 16-bit memory have H, and x, rounded to that dtype: relative error 2^-9 (2^-12) per term, of random
// sign. float16 ends at 2^-24, so H is multiplied there by a power of two per row, such that the largest met so far is
// near 2^10. Sums are float32.
//
// **Limits.** D <= 1024. Deterministic, no atomics; capture-safe.
#pragma once

#include <cmath>

#include "base/chosen_rows.cuh"
#include "base/stream.cuh"
#include "base/warp.cuh"

namespace protomem::cuda {

// What all passes have in common. Slots are those of a chunk, whose first one is the memory's `first_slot`.
struct LogitsInputs {
  int64_t batch = 0, capacity = 0, first_slot = 0;
  int dim = 0;
  Slots targets;                       // (B,), of the whole memory
  Strided<const bool> occupied;        // (M,) or not given: all
  const float* inverse_ptr = nullptr;  // (M,): 1 / |w_j| if prototypes are scaled to unit length
  float scale = 1;
};

// One row of G, or of G h', at neighbouring slots; 0 outside. `aligned`: rows lie on multiples of 16 bytes.
struct LogitGradient {
  Rows<const float> rows;
  bool aligned = false;

  template <int N>
  DEVICE void load(float* to, int64_t row, int64_t slot, int64_t capacity) const {
    if constexpr (N == 4) {
      if (aligned && slot + N <= capacity) {
        const Vector16<float> four = load_16_streamed(rows.data + row * rows.row_stride + slot);
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = four[i];
        return;
      }
    }
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = slot + i < capacity ? rows(row, slot + i) : 0.0f;
  }
};

struct Logits : LogitsInputs {
  Rows<const float> x;                 // (B, D)
  Streamed prototypes;                 // (M, D)
  int64_t per_split = 0;               // slots that one row of blocks streams, a multiple of every tile
  HardForm form;                       // or none
  Strided<const float> target_logits;  // (B,)
  LogitGradient grad;                  // (B, M); if given, G h' is wanted, whatever stands at targets and empty slots
  float* logits_ptr = nullptr;         // (B, M)
  int64_t row_stride = 0;              // of them
};

template <class Shape_>
struct LogitsTask : SamplesTask<Shape_, Logits> {
  using Shape = Shape_;
  using Base = SamplesTask<Shape, Logits>;
  using T = typename Shape::Element;
  using Base::args, Base::row, Base::target;
  static constexpr bool FIRST = true, SECOND = false;
  static constexpr int RESIDENT_TERMS = exact_terms<T>, GROUP = Shape::GROUP;

  int64_t start = 0;
  float at_target = 0, scaled_threshold = 0;
  HardCurve curve;
  float inverse[Shape::OWN], grad[Shape::OWN];

  DEVICE LogitsTask(const Logits& args_, int64_t first_row, int own_row)
      : Base(args_, first_row, own_row), curve(args_.form, args_.scale) {
    if (row >= args.batch) return;
    target -= args.first_slot;
    if (args.target_logits.data != nullptr) at_target = args.target_logits[row];
    if (args.form.given()) scaled_threshold = args.scale * args.form.threshold[row];
  }

  template <class Columns>
  DEVICE void prepare(int64_t slot, Columns column_of) {
    start = slot;
    this->load_inverses(inverse, slot, column_of);
    if (args.grad.rows.data != nullptr && row < args.batch) {
#pragma unroll
      for (int j = 0; j < Shape::OWN; j += GROUP) {
        args.grad.template load<GROUP>(grad + j, row, slot + column_of(j), args.capacity);
      }
    }
  }

  template <class Columns>
  DEVICE float weigh(float (&value)[Shape::OWN], uint32_t present, Columns column_of) {
    const float to_scaled = args.scale / Factor<T>::LIFT;
    const bool slopes = args.grad.rows.data != nullptr;
#pragma unroll
    for (int j = 0; j < Shape::OWN; j += GROUP) {
      float group[GROUP];
#pragma unroll
      for (int i = 0; i < GROUP; i++) {
        const int column = column_of(j + i);
        float y = value[j + i] * (to_scaled * inverse[j + i]);
        const float slope = args.form.given() ? curve.reshape(y, scaled_threshold) : 1.0f;
        group[i] = (present >> column & 1u) != 0 ? y : -INFINITY;
        if (start + column == target) group[i] = at_target;
        if (slopes) group[i] = grad[j + i] * slope;
      }
      write(group, start + column_of(j));
    }
    return 1;
  }

  DEVICE void write(const float (&group)[GROUP], int64_t slot) const {
    if (row >= args.batch) return;
    float* to = args.logits_ptr + row * args.row_stride + slot;
    if (args.row_stride % GROUP == 0 && slot + GROUP <= args.capacity) {
      if constexpr (GROUP == 4) {
        store_16_streamed(to, Vector16<float>{{group[0], group[1], group[2], group[3]}});
      } else if constexpr (GROUP == 2) {
        *reinterpret_cast<float2*>(to) = make_float2(group[0], group[1]);
      } else {
        *to = group[0];
      }
    } else {
#pragma unroll
      for (int i = 0; i < GROUP; i++) {
        if (slot + i < args.capacity) to[i] = group[i];
      }
    }
  }
  DEVICE void close() {}
};

template <class Shape>
KERNEL(Shape::THREADS, 1)
void logits_kernel(Logits args) {
  stream<LogitsTask<Shape>>(args);
}

// By what the weights of a row are multiplied to suit T: a power of two, the smaller the larger the weights so far.
template <class Shape>
struct RowUnit {
  static constexpr bool NEEDED = std::is_same_v<typename Shape::Element, float16>;
  static constexpr float LEAST = 0x1p-100f;

  float unit = 1 / LEAST;
  float* units_ptr;  // of the block's rows, in shared memory

  DEVICE RowUnit() {
    SMEM(units, float[Shape::ROWS]);
    units_ptr = units;
  }
  // Returns by what the row's sums so far are to be multiplied.
  DEVICE float apply(float (&value)[Shape::OWN]) {
    if constexpr (!NEEDED) return 1;
    float largest = 0;
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) largest = fmaxf(largest, fabsf(value[j]));  // passes over NaN
    largest = warp_max<Shape::PER_ROW>(largest);
    const float power = bit_cast<float>(bit_cast<uint32_t>(largest) & 0x7f800000u);
    const float before = unit;
    unit = fminf(unit, fmaxf(1024 / fmaxf(power, LEAST), LEAST));
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) value[j] *= unit;
    return unit / before;
  }
  DEVICE void publish(int own_row) {
    if constexpr (NEEDED) {
      if (threadIdx.x % Shape::PER_ROW == 0) units_ptr[own_row] = unit;
      __syncthreads();
    }
  }
  DEVICE float undo(int row) const { return NEEDED ? 1 / units_ptr[row] : 1.0f; }
};

struct LogitsEmbeddings : LogitsInputs {
  Rows<const float> x;           // not looked at
  Streamed prototypes;           // (M, D)
  int64_t per_split = 0;         // as in the forward pass
  LogitGradient grad;            // (B, M): G, or G h'
  bool continues = false;        // with the sums of the chunk before
  float* moments_ptr = nullptr;  // (splits, B, COLUMNS)
};

template <class Shape_>
struct EmbeddingsTask : SamplesTask<Shape_, LogitsEmbeddings> {
  using Shape = Shape_;
  using Base = SamplesTask<Shape, LogitsEmbeddings>;
  using Base::args, Base::row, Base::target, Base::first;
  static constexpr bool FIRST = false, SECOND = true;
  static constexpr int RESIDENT_TERMS = 1;

  int64_t base, start = 0;
  RowUnit<Shape> unit;
  float inverse[Shape::OWN], next[Shape::OWN];

  DEVICE EmbeddingsTask(const LogitsEmbeddings& args_, int64_t first_row, int own_row)
      : Base(args_, first_row, own_row), base(first_row) {
    target -= args.first_slot;
  }
  DEVICE bool shrinks() const { return RowUnit<Shape>::NEEDED; }

  template <class Columns>
  DEVICE void load(int64_t slot, Columns column_of) {
    if (row >= args.batch) return;
#pragma unroll
    for (int j = 0; j < Shape::OWN; j += Shape::GROUP) {
      args.grad.template load<Shape::GROUP>(next + j, row, slot + column_of(j), args.capacity);
    }
  }
  template <class Columns>
  DEVICE void prepare(int64_t slot, Columns column_of) {
    start = slot;
    this->load_inverses(inverse, slot, column_of);
    if (slot == first()) load(slot, column_of);
  }
  template <class Columns>
  DEVICE float weigh(float (&value)[Shape::OWN], uint32_t present, Columns column_of) {
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) {
      const int column = column_of(j);
      const bool counts = row < args.batch && (present >> column & 1u) != 0 && start + column != target;
      value[j] = counts ? args.scale * next[j] * inverse[j] : 0.0f;
    }
    load(start + Shape::TILE, column_of);  // arrives during the product
    return unit.apply(value);
  }

  DEVICE void close() { unit.publish(static_cast<int>(row - base)); }
  DEVICE bool projects() const { return false; }
  DEVICE void store(int64_t i, int column, float m0, float m1, float) const {
    if (i >= args.batch) return;
    float2* to = reinterpret_cast<float2*>(args.moments_ptr + (blockIdx.y * args.batch + i) * Shape::COLUMNS + column);
    const float undo = unit.undo(static_cast<int>(i - base));
    const float2 before = args.continues ? *to : make_float2(0, 0);
    *to = make_float2(before.x + m0 * undo, before.y + m1 * undo);
  }
};

template <class Shape>
KERNEL(Shape::THREADS, 1)
void logits_embeddings_kernel(LogitsEmbeddings args) {
  stream<EmbeddingsTask<Shape>>(args);
}

struct LogitsSums {
  int64_t batch = 0;
  int dim = 0, columns = 0, splits = 0;     // columns: of a row of moments, a multiple of 4
  const float* moments_ptr = nullptr;       // (splits, B, columns)
  Slots targets;                            // (B,)
  Rows<const float> grad;                   // (B, M)
  float* grad_x_ptr = nullptr;              // (B, D)
  float* grad_target_logits_ptr = nullptr;  // (B,)
};

constexpr int sums_threads = 128;

// dL/dx of the splits, added up in order, and dL/dz. A block per sample, four neighbouring columns a thread.
KERNEL(sums_threads)
void logits_sums_kernel(LogitsSums args) {
  const int64_t i = blockIdx.x;
  float* to = args.grad_x_ptr + i * args.dim;
  for (int column = 4 * threadIdx.x; column < args.dim; column += 4 * sums_threads) {
    Vector16<float> sum{};
    for (int split = 0; split < args.splits; split++) {
      const auto part = load_16_streamed(args.moments_ptr + (split * args.batch + i) * args.columns + column);
#pragma unroll
      for (int k = 0; k < 4; k++) sum[k] += part[k];
    }
    if (args.dim % 4 == 0) {
      store_16(to + column, sum);
    } else {
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (column + k < args.dim) to[column + k] = sum[k];
      }
    }
  }
  if (threadIdx.x == 0) {
    const int64_t target = args.targets[i];
    args.grad_target_logits_ptr[i] = target >= 0 ? args.grad(i, target) : 0.0f;
  }
}

constexpr int samples_threads = 128;

// Which embeddings are sound, and all of them in T, `columns` a row, zeros past D. A block per sample.
template <class T>
KERNEL(samples_threads)
void logits_samples_kernel(Rows<const float> x, int dim, int columns, T* samples_ptr, bool* sound_ptr) {
  const int64_t i = blockIdx.x;
  bool sound = true;
  for (int column = threadIdx.x; column < columns; column += samples_threads) {
    const float own = column < dim ? x(i, column) : 0.0f;
    sound = sound && std::isfinite(own);
    samples_ptr[i * columns + column] = narrow<T>(Factor<T>::LIFT * own);
  }
  sound = __syncthreads_and(sound) != 0;
  if (threadIdx.x == 0) sound_ptr[i] = sound;
}

template <class T>
struct LogitsPrototypes : LogitsInputs {
  Streamed samples;                  // (B, COLUMNS): x
  const bool* sound_ptr = nullptr;   // (B,)
  Rows<const T> prototypes;          // (M, D)
  Rows<const float> grad;            // (B, M): G, or G h'
  T* grad_prototypes_ptr = nullptr;  // (M, D)
};

template <class Shape_>
struct PrototypesTask {
  using Shape = Shape_;
  using T = typename Shape::Element;
  using Args = LogitsPrototypes<T>;
  static constexpr bool FIRST = false, SECOND = true, ALWAYS_ALIGNED = true;
  static constexpr int RESIDENT_TERMS = 1, STREAMED_TERMS = 1;

  const Args& args;
  int64_t base, slot, start = 0;
  bool negative;  // whether the own slot is one for samples that do not target it
  RowUnit<Shape> unit;
  float next[Shape::OWN];

  DEVICE PrototypesTask(const Args& args_, int64_t first_row, int own_row)
      : args(args_), base(first_row), slot(first_row + own_row), negative(present(slot)) {}

  DEVICE int64_t first() const { return 0; }
  DEVICE int64_t last() const { return args.batch; }
  DEVICE const Streamed& streamed() const { return args.samples; }
  DEVICE int dim() const { return Shape::COLUMNS; }
  DEVICE bool streams(int64_t i) const { return args.sound_ptr[i]; }
  DEVICE bool present(int64_t j) const {
    return j < args.capacity && (args.occupied.data == nullptr || args.occupied[j]);
  }
  DEVICE float resident(int64_t j, int column) const {
    return present(j) && column < args.dim ? widen(args.prototypes(j, column)) : 0.0f;
  }
  DEVICE bool shrinks() const { return RowUnit<Shape>::NEEDED; }

  template <class Columns>
  DEVICE void load(int64_t sample, Columns column_of) {
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) {
      const int64_t i = sample + column_of(j);
      next[j] = negative && i < args.batch ? args.grad(i, slot) : 0.0f;
    }
  }
  template <class Columns>
  DEVICE void prepare(int64_t sample, Columns column_of) {
    start = sample;
    if (sample == 0) load(sample, column_of);
  }
  template <class Columns>
  DEVICE float weigh(float (&value)[Shape::OWN], uint32_t sound, Columns column_of) {
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) {
      const int column = column_of(j);
      const bool counts = (sound >> column & 1u) != 0 && args.targets[start + column] - args.first_slot != slot;
      value[j] = counts ? args.scale * next[j] : 0.0f;
    }
    load(start + Shape::TILE, column_of);  // arrives during the product
    return unit.apply(value);
  }

  DEVICE void close() { unit.publish(static_cast<int>(slot - base)); }
  DEVICE bool projects() const { return args.inverse_ptr != nullptr; }
  DEVICE void store(int64_t j, int column, float m0, float m1, float along) const {
    if (j >= args.capacity) return;
    float grad[2] = {m0, m1};
    const float inverse = projects() && present(j) ? args.inverse_ptr[j] : 0.0f;
    const float undo = unit.undo(static_cast<int>(j - base)) / Factor<T>::LIFT;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (projects()) grad[k] = (grad[k] - along * inverse * (resident(j, column + k) * inverse)) * inverse;
      grad[k] *= undo;
    }
    store_pair(args.grad_prototypes_ptr + j * args.dim, column, args.dim, grad[0], grad[1]);
  }
};

template <class Shape>
KERNEL(Shape::THREADS, 1)
void logits_prototypes_kernel(LogitsPrototypes<typename Shape::Element> args) {
  stream<PrototypesTask<Shape>>(args);
}

}  // namespace protomem::cuda
