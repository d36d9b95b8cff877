// negative_logsumexp on a GPU.
//
// What is computed, h, n, o, q and dL/dw, is derived in protomem_kernels/backends/reference/negative_logsumexp.py.
//
// **Forward**, two launches (three if prototypes are scaled to unit length: their inverse lengths come first):
//   stream     samples resident, one split of the memory passes by: per sample the sum of e^{s h - shift}, and o next
//              to it, the sum of e^{s h - shift} h' w. The shift is the fixed offset, or a running maximum per row
//              where no constant will do, and for float16, which holds no exponential below 2^-24.
//   reduction  a block per sample adds up the splits in order, gathers the target's row, and writes n, o, c.
// **Backward**, class-stationary: slots resident, the batch passes by, a tile's gradient is complete when written. One
// launch, before it one that cuts x into 16-bit halves (not for float32), and the inverse lengths if need be.
//
// **Numerics.** Sums are float32. A 16-bit memory meets x as the sum of two 16-bit numbers, 16 bits of it for bfloat16
// and 22 for float16; what they leave counts to first order: n += (x - high - low) . o, as dn/dx = o. Exponentials
// (and, in the backward pass, x) are rounded to 16 bits where they meet the rows, in the second product only: relative
// error 2^-9 (2^-12) per term, of random sign. float32: see stream.cuh.
//
// **Bytes and FLOPs** per tile: stream.cuh. Every block of samples reads the memory once, from the L2 cache for all
// blocks but the first, and writes (D + 2) float32 a sample and split; the reduction reads these once.
//
// **Limits.** D <= 1024. Exact: no gradient is filtered. Deterministic, no atomics on floats; capture-safe.
// Idea: flash attention with K = V = the memory; a target's exclusion and the forms are ours.
#pragma once

#include <cmath>

#include "base/chosen_rows.cuh"
#include "base/stream.cuh"
#include "base/warp.cuh"

namespace protomem::cuda {

// What forward and backward have in common.
struct LogsumexpInputs {
  int64_t batch = 0, capacity = 0;
  int dim = 0;
  Slots targets;                       // (B,)
  Strided<const bool> occupied;        // (M,) or not given: all
  const float* inverse_ptr = nullptr;  // (M,): 1 / |w_j| if prototypes are scaled to unit length
  HardForm form;
  float scale = 1;
};

struct LogsumexpForward : LogsumexpInputs {
  Rows<const float> x;           // (B, D)
  Streamed prototypes;           // (M, D)
  int64_t per_split = 0;         // slots that one row of blocks streams, a multiple of every tile
  bool running = false;          // a running maximum instead of
  float offset = 0;              // a constant, to be subtracted from exponents
  float* totals_ptr = nullptr;   // (splits, B)
  float* maxima_ptr = nullptr;   // (splits, B): what was taken out of exponents, if running
  float* moments_ptr = nullptr;  // (splits, B, COLUMNS)
};

template <class Shape_>
struct ForwardTask : SamplesTask<Shape_, LogsumexpForward> {
  using Shape = Shape_;
  using Base = SamplesTask<Shape, LogsumexpForward>;
  using T = typename Shape::Element;
  using Base::args, Base::row, Base::target;
  static constexpr bool FIRST = true, SECOND = true;
  static constexpr int RESIDENT_TERMS = sizeof(T) == 2 ? 2 : 1;
  // float16 ends at 2^-24: exponentials are 2^10 at most instead of 1, which leaves room for h' up to 64.
  static constexpr float HEADROOM = std::is_same_v<T, float16> ? 10 * ln_2 : 0.0f;

  float scaled_threshold = 0, total = 0, maximum = -INFINITY;
  HardCurve curve;
  float inverse[Shape::OWN];
  int target_at = -1;

  DEVICE ForwardTask(const LogsumexpForward& args_, int64_t first_row, int own_row)
      : Base(args_, first_row, own_row), curve(args_.form, args_.scale) {
    if (row < args.batch && args.form.given()) scaled_threshold = args.scale * args.form.threshold[row];
  }

  DEVICE bool shrinks() const { return args.running; }

  template <class Columns>
  DEVICE void prepare(int64_t slot, Columns column_of) {
    target_at = target >= slot && target < slot + Shape::TILE ? static_cast<int>(target - slot) : -1;
    if (args.inverse_ptr != nullptr) this->load_inverses(inverse, slot, column_of);
  }

  template <class Columns>
  DEVICE float weigh(float (&value)[Shape::OWN], uint32_t present, Columns column_of) {
    const bool normalize = args.inverse_ptr != nullptr;
    const float to_scaled = args.scale / Factor<T>::LIFT;
    float slope[Shape::OWN];
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) {
      const int column = column_of(j);
      // As in the backward pass, to the last bit where the product is the same: y - n is a small difference there.
      float y = value[j] * (normalize ? to_scaled * inverse[j] : to_scaled);
      slope[j] = args.form.given() ? curve.reshape(y, scaled_threshold) : 1.0f;
      value[j] = (present >> column & 1u) != 0 && column != target_at ? y : -INFINITY;
    }
    float shift = args.offset, factor = 1;
    if (args.running) {
      float top = maximum;
#pragma unroll
      for (int j = 0; j < Shape::OWN; j++) {
        // In the moment stands e / |w|, which must not overflow either.
        top = fmaxf(top, normalize && inverse[j] > 1 ? value[j] + logf(inverse[j]) : value[j]);
      }
      top = warp_max<Shape::PER_ROW>(top);
      const float taken = top == -INFINITY ? 0.0f : top;
      factor = exp2f((maximum - taken) * log2_e);
      total *= factor;
      maximum = top;
      shift = taken - HEADROOM;
    }
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) {
      const float e = exp2f((value[j] - shift) * log2_e);
      total += e;
      value[j] = e * slope[j];
      if (normalize && e != 0) value[j] *= inverse[j];  // an absent slot counts 0, whatever its length is
    }
    return factor;
  }

  DEVICE void close() {
    total = warp_sum<Shape::PER_ROW>(total);
    if (row < args.batch && threadIdx.x % Shape::PER_ROW == 0) {
      const int64_t at = blockIdx.y * args.batch + row;
      args.totals_ptr[at] = total;
      if (args.running) args.maxima_ptr[at] = maximum - HEADROOM;
    }
  }
  DEVICE bool projects() const { return false; }
  DEVICE void store(int64_t i, int column, float m0, float m1, float) const {
    if (i < args.batch) {
      float* to = args.moments_ptr + (blockIdx.y * args.batch + i) * Shape::COLUMNS + column;
      *reinterpret_cast<float2*>(to) = make_float2(m0, m1);
    }
  }
};

template <class Shape>
KERNEL(Shape::THREADS, 1)
void logsumexp_stream_kernel(LogsumexpForward args) {
  stream<ForwardTask<Shape>>(args);
}

template <class T>
struct LogsumexpReduction {
  int64_t batch = 0;
  int dim = 0, columns = 0, splits = 0;  // columns: of a row of moments, a multiple of 4
  const float* totals_ptr = nullptr;
  const float* maxima_ptr = nullptr;  // or null: `offset` was subtracted
  const float* moments_ptr = nullptr;
  Rows<const float> x;
  Rows<const T> prototypes;
  Slots targets;
  bool normalize = false;
  float scale = 1, offset = 0;
  float* cosine_ptr = nullptr;       // (B,)
  float* n_ptr = nullptr;            // (B,)
  float* target_rows_ptr = nullptr;  // (B, D)
  float* o_ptr = nullptr;            // (B, D) or null: not wanted
};

constexpr int reduction_threads = 128;

// Scales a row held by the block, one column of OWN a thread, to unit length; a zero row stays zero. The largest entry
// is divided out first, so that squares neither overflow nor underflow.
template <int THREADS, int OWN>
DEVICE float inverse_length(const float (&row)[OWN]) {
  float largest = 0, sum = 0;
#pragma unroll
  for (int k = 0; k < OWN; k++) largest = fmaxf(largest, fabsf(row[k]));
  largest = block_max<THREADS>(largest);
  const float unit = largest > 0 ? largest : 1.0f;
#pragma unroll
  for (int k = 0; k < OWN; k++) sum += row[k] / unit * (row[k] / unit);
  const float length = unit * sqrtf(block_sum<THREADS>(sum));
  return length == 0 ? 0.0f : 1 / length;
}

// The row of sample i's target as the cosine takes it, and c; OWN columns a thread, every THREADS-th.
template <class T, int THREADS, int OWN>
DEVICE void target_row(const Rows<const T>& prototypes, int64_t target, const Rows<const float>& x, int64_t i, int dim,
                       bool normalize, float* cosine_ptr, float* target_rows_ptr) {
  float w[OWN], product = 0;
#pragma unroll
  for (int k = 0; k < OWN; k++) {
    const int column = threadIdx.x + k * THREADS;
    w[k] = target >= 0 && column < dim ? widen(prototypes(target, column)) : 0.0f;
  }
  const float inverse = normalize ? inverse_length<THREADS>(w) : 1.0f;
#pragma unroll
  for (int k = 0; k < OWN; k++) {
    const int column = threadIdx.x + k * THREADS;
    if (column < dim) {
      w[k] *= inverse;
      target_rows_ptr[i * dim + column] = w[k];
      product += w[k] * x(i, column);
    }
  }
  product = block_sum<THREADS>(product);
  if (threadIdx.x == 0) cosine_ptr[i] = product;
}

// One block per sample. Four neighbouring columns a thread where splits are added up.
template <class T>
KERNEL(reduction_threads)
void logsumexp_reduction_kernel(LogsumexpReduction<T> args) {
  constexpr int THREADS = reduction_threads, OWN = 1024 / THREADS;
  const int64_t i = blockIdx.x;
  target_row<T, THREADS, OWN>(args.prototypes, args.targets[i], args.x, i, args.dim, args.normalize, args.cosine_ptr,
                              args.target_rows_ptr);

  float shift = 0;
  if (args.maxima_ptr != nullptr) {
    float top = -INFINITY;
    for (int split = 0; split < args.splits; split++) top = fmaxf(top, args.maxima_ptr[split * args.batch + i]);
    shift = top == -INFINITY ? 0.0f : top;
  }
  auto weight = [&](int split) {
    return args.maxima_ptr == nullptr ? 1.0f : exp2f((args.maxima_ptr[split * args.batch + i] - shift) * log2_e);
  };
  float total = 0;
  for (int split = 0; split < args.splits; split++) total += weight(split) * args.totals_ptr[split * args.batch + i];
  const float factor = total != 0 ? args.scale / total : 0.0f;

  float correction = 0;
  for (int column = 4 * threadIdx.x; column < args.columns; column += 4 * THREADS) {
    float o[4] = {};
    for (int split = 0; split < args.splits; split++) {
      const auto part = load_16_streamed(args.moments_ptr + (split * args.batch + i) * args.columns + column);
      const float share = weight(split);
#pragma unroll
      for (int k = 0; k < 4; k++) o[k] += share * part[k];
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (column + k < args.dim) {
        o[k] *= factor;
        if (args.o_ptr != nullptr) args.o_ptr[i * args.dim + column + k] = o[k];
        if constexpr (sizeof(T) == 2) {  // what the two halves leave of x
          float rest[2] = {Factor<T>::LIFT * args.x(i, column + k), 0};
          Factor<T>::cut(rest);
          Factor<T>::cut(rest);
          correction += rest[0] / Factor<T>::LIFT * o[k];
        }
      }
    }
  }
  correction = block_sum<THREADS>(correction);
  if (threadIdx.x == 0) {
    args.n_ptr[i] = total != 0 ? logf(total) + (shift + args.offset) + correction : -INFINITY;
  }
}

// x cut into two 16-bit numbers: halves (2, B, columns), zeros past D. One block per sample.
template <class T>
KERNEL(128)
void halves_kernel(Rows<const float> x, int64_t batch, int dim, int columns, T* halves_ptr) {
  const int64_t i = blockIdx.x;
  for (int column = 2 * threadIdx.x; column < columns; column += 2 * 128) {
    float rest[2];
#pragma unroll
    for (int k = 0; k < 2; k++) rest[k] = column + k < dim ? Factor<T>::LIFT * x(i, column + k) : 0.0f;
#pragma unroll
    for (int term = 0; term < 2; term++) {
      *reinterpret_cast<uint32_t*>(halves_ptr + (term * batch + i) * columns + column) = Factor<T>::cut(rest);
    }
  }
}

template <class T>
struct LogsumexpBackward : LogsumexpInputs {
  Streamed x;                              // (B, D), or its halves (2, B, COLUMNS)
  int streamed_dim = 0;                    // D, or COLUMNS
  Rows<const T> prototypes;                // (M, D)
  const float* n_ptr = nullptr;            // (B,)
  const float* grad_n_ptr = nullptr;       // (B,)
  const float* grad_cosine_ptr = nullptr;  // (B,)
  T* grad_prototypes_ptr = nullptr;        // (M, D)
};

template <class Shape_>
struct BackwardTask {
  using Shape = Shape_;
  using T = typename Shape::Element;
  using Args = LogsumexpBackward<T>;
  static constexpr int RESIDENT_TERMS = 1, STREAMED_TERMS = sizeof(T) == 2 ? 2 : 1;
  static constexpr bool ALWAYS_ALIGNED = sizeof(T) == 2;
  static constexpr bool FIRST = true, SECOND = true;

  const Args& args;
  int64_t base, slot;
  bool negative;        // whether the own slot is one for samples that do not target it
  float* inverses_ptr;  // of the block's slots: 1 / |w|, or 1; 0 where there is nothing to read
  float unit = 1;
  HardCurve curve;
  int64_t first_sample = 0;

  DEVICE BackwardTask(const Args& args_, int64_t first_row, int own_row)
      : args(args_), base(first_row), slot(first_row + own_row), curve(args_.form, args_.scale) {
    SMEM(is_target, int[Shape::ROWS]);
    SMEM(inverses, float[Shape::ROWS]);
    inverses_ptr = inverses;
    const bool normalize = args.inverse_ptr != nullptr, all = args.occupied.data == nullptr;
    for (int row = threadIdx.x; row < Shape::ROWS; row += Shape::THREADS) is_target[row] = 0;
    __syncthreads();
    if (normalize && !all) {  // a target is present whatever `occupied` says, and its own row enters its gradient
      for (int64_t i = threadIdx.x; i < args.batch; i += Shape::THREADS) {
        const int64_t target = args.targets[i];
        if (target >= base && target < base + Shape::ROWS) atomicOr(&is_target[target - base], 1);
      }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < Shape::ROWS; row += Shape::THREADS) {
      const int64_t j = base + row;
      const bool present = j < args.capacity && (all || args.occupied[j] || is_target[row] != 0);
      inverses[row] = !present ? 0.0f : normalize ? args.inverse_ptr[j] : 1.0f;
    }
    negative = slot < args.capacity && (all || args.occupied[slot]);
    if constexpr (std::is_same_v<T, float16>) {  // scaled to 2^10 at most, as in the forward pass
      float largest = 0;
      for (int64_t i = threadIdx.x; i < args.batch; i += Shape::THREADS) {
        largest = fmaxf(largest, fmaxf(args.scale * fabsf(args.grad_n_ptr[i]), fabsf(args.grad_cosine_ptr[i])));
      }
      unit = 1024.0f / fmaxf(block_max<Shape::THREADS>(largest), 1e-30f);
    }
    __syncthreads();
  }

  DEVICE int64_t first() const { return 0; }
  DEVICE int64_t last() const { return args.batch; }
  DEVICE const Streamed& streamed() const { return args.x; }
  DEVICE int dim() const { return args.streamed_dim; }
  DEVICE bool streams(int64_t) const { return true; }
  DEVICE float resident(int64_t j, int column) const {
    if (inverses_ptr[j - base] == 0 || column >= args.dim) return 0;
    return widen(args.prototypes(j, column));
  }
  DEVICE bool shrinks() const { return false; }

  template <class Columns>
  DEVICE void prepare(int64_t sample, Columns) {
    first_sample = sample;
  }

  // What belongs to the samples is read only now: it would take registers during the product.
  template <class Columns>
  DEVICE float weigh(float (&value)[Shape::OWN], uint32_t, Columns column_of) {
    const float to_scaled = args.scale / Factor<T>::LIFT * inverses_ptr[slot - base];
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) {
      const int64_t i = first_sample + column_of(j);
      float p = 0;
      if (i < args.batch) {
        if (negative) {
          float y = value[j] * to_scaled;
          const float tau = args.form.given() ? args.scale * args.form.threshold[i] : 0.0f;
          const float slope = args.form.given() ? curve.reshape(y, tau) : 1.0f;
          const float n = args.n_ptr[i] == -INFINITY ? INFINITY : args.n_ptr[i];  // no negatives: no probability
          // The difference first: it is exact where p is large, while s h log2(e), near 92, would be off by 4e-6.
          p = exp2f((y - n) * log2_e) * (args.scale * unit * args.grad_n_ptr[i]) * slope;
        }
        if (args.targets[i] == slot) p = unit * args.grad_cosine_ptr[i];
      }
      value[j] = p;
    }
    return 1;
  }

  DEVICE void close() {}
  DEVICE bool projects() const { return args.inverse_ptr != nullptr; }
  DEVICE void store(int64_t j, int column, float m0, float m1, float along) const {
    if (j >= args.capacity) return;
    const float inverse = inverses_ptr[j - base];
    float grad[2] = {m0, m1};
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (projects()) {  // (grad - (grad . u) u) / |w| with u = w / |w|; along = grad . w
        grad[k] = (grad[k] - along * inverse * (resident(j, column + k) * inverse)) * inverse;
      }
      grad[k] *= 1 / (Factor<T>::LIFT * unit);
    }
    store_pair(args.grad_prototypes_ptr + j * args.dim, column, args.dim, grad[0], grad[1]);
  }
};

template <class Shape>
KERNEL(Shape::THREADS, 1)
void logsumexp_backward_kernel(LogsumexpBackward<typename Shape::Element> args) {
  stream<BackwardTask<Shape>>(args);
}

// Where each sample meets a few chosen negatives alone, (B, K) slots: -1, the target and what lies outside are none.
template <class T>
struct LogsumexpChosen : LogsumexpInputs {
  Rows<const float> x;
  Rows<const T> prototypes;
  bool aligned = false;  // whether rows of both can be read 16 bytes at a time
  bool normalize = false;
  Slots negatives;
  int count = 0;                           // K
  float* cosine_ptr = nullptr;             // (B,); written in the forward pass, as n and
  float* target_rows_ptr = nullptr;        // (B, D)
  float* o_ptr = nullptr;                  // (B, D) or null: not wanted
  float* n_ptr = nullptr;                  // (B,); read in the backward pass
  const float* grad_n_ptr = nullptr;       // (B,)
  const float* grad_cosine_ptr = nullptr;  // (B,)
  int64_t* slots_ptr = nullptr;            // (B, K + 1); written in the backward pass: negatives and the target,
  float* grads_ptr = nullptr;              // (B, K + 1): and the gradients of their cosines
};

constexpr int chosen_threads = 128;

// One sample's cosine, scaled, to the chosen negative j; the slot is -1 if it is none. The same for a whole warp.
template <class T>
struct ChosenNegative {
  LaneRow<T> w;
  int64_t slot;
  float y = 0, slope = 1;

  DEVICE ChosenNegative(const LogsumexpChosen<T>& args, const LaneRow<T>& x, int64_t i, int j, int64_t target,
                        const HardCurve& curve, float scaled_threshold)
      : slot(args.negatives.at(i, j)) {
    if (slot == target) slot = -1;
    if (slot < 0) return;
    w.load(args.prototypes, slot, args.dim, args.aligned);
    if (args.normalize) w.scale(w.inverse_length());
    y = args.scale * w.dot(x);
    if (args.form.given()) slope = curve.reshape(y, scaled_threshold);
  }
};

// Forward: one block per sample; its warps take turns, each with a running maximum, and are added up in order.
template <class T>
KERNEL(chosen_threads, 1)
void logsumexp_chosen_kernel(LogsumexpChosen<T> args) {
  constexpr int THREADS = chosen_threads, WARPS = THREADS / warp_lanes;
  SMEM(moments, float[WARPS][most_lane_columns]);
  SMEM(maxima, float[WARPS]);
  SMEM(totals, float[WARPS]);
  const int64_t i = blockIdx.x, target = args.targets[i];
  target_row<T, THREADS, most_lane_columns / THREADS>(args.prototypes, target, args.x, i, args.dim, args.normalize,
                                                      args.cosine_ptr, args.target_rows_ptr);
  const HardCurve curve(args.form, args.scale);
  const float tau = args.form.given() ? args.scale * args.form.threshold[i] : 0.0f;
  LaneRow<T> x, moment;
  x.load(args.x, i, args.dim, args.aligned);
  moment.clear();
  float total = 0, maximum = -INFINITY;
  for (int j = warp_index(); j < args.count; j += WARPS) {
    const ChosenNegative<T> chosen(args, x, i, j, target, curve, tau);
    if (chosen.slot < 0) continue;  // the whole warp
    const float top = fmaxf(maximum, chosen.y), taken = top == -INFINITY ? 0.0f : top;
    const float factor = exp2f((maximum - taken) * log2_e), e = exp2f((chosen.y - taken) * log2_e);
    total = total * factor + e;
    maximum = top;
    moment.scale(factor);
    moment.add(e * chosen.slope, chosen.w);
  }
  moment.store(&moments[warp_index()][0], most_lane_columns);
  if (lane_index() == 0) {
    maxima[warp_index()] = maximum;
    totals[warp_index()] = total;
  }
  __syncthreads();
  float top = -INFINITY, weight[WARPS];
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) top = fmaxf(top, maxima[warp]);
  const float taken = top == -INFINITY ? 0.0f : top;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) {
    weight[warp] = exp2f((maxima[warp] - taken) * log2_e);
    total += weight[warp] * totals[warp];
  }
  if (threadIdx.x == 0) args.n_ptr[i] = total != 0 ? logf(total) + taken : -INFINITY;
  if (args.o_ptr == nullptr) return;
  const float factor = total != 0 ? args.scale / total : 0.0f;
  for (int column = threadIdx.x; column < args.dim; column += THREADS) {
    float o = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) o += weight[warp] * moments[warp][column];
    args.o_ptr[i * args.dim + column] = o * factor;
  }
}

// Backward: one block per sample writes the gradients of the chosen cosines, for chosen_rows_kernel to add up.
template <class T>
KERNEL(chosen_threads, 1)
void logsumexp_chosen_backward_kernel(LogsumexpChosen<T> args) {
  constexpr int WARPS = chosen_threads / warp_lanes;
  const int64_t i = blockIdx.x, target = args.targets[i], line = i * (args.count + 1);
  const HardCurve curve(args.form, args.scale);
  const float tau = args.form.given() ? args.scale * args.form.threshold[i] : 0.0f;
  const float n = args.n_ptr[i] == -INFINITY ? INFINITY : args.n_ptr[i];  // no negatives: no probability
  const float factor = args.scale * args.grad_n_ptr[i];
  LaneRow<T> x;
  x.load(args.x, i, args.dim, args.aligned);
  for (int j = warp_index(); j < args.count; j += WARPS) {
    const ChosenNegative<T> chosen(args, x, i, j, target, curve, tau);
    if (lane_index() == 0) {
      args.slots_ptr[line + j] = chosen.slot;
      args.grads_ptr[line + j] = chosen.slot < 0 ? 0.0f : exp2f((chosen.y - n) * log2_e) * factor * chosen.slope;
    }
  }
  if (threadIdx.x == 0) {
    args.slots_ptr[line + args.count] = target;
    args.grads_ptr[line + args.count] = args.grad_cosine_ptr[i];
  }
}

}  // namespace protomem::cuda
