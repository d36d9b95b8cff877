#pragma once

#include "aggregate_prototypes.h"
#include "base/buffer.h"
#include "base/rows.h"

namespace protomem::PROTOMEM_ISA {

struct LabelledSample {
  uint64_t label;
  int64_t sample;
};

// Sorts by label, equal ones in the order in which they came, and returns where the result lies: in `items` or `spare`.
// A radix sort, byte by byte; bytes in which all labels agree, such as the upper ones of small labels, cost nothing.
inline const LabelledSample* sort_by_label(LabelledSample* items, LabelledSample* spare, int64_t n) {
  uint64_t varying = 0;
  for (int64_t i = 0; i < n; i++) varying |= items[i].label ^ items[0].label;
  for (int shift = 0; shift < 64; shift += 8) {
    if ((varying >> shift & 255) == 0) continue;
    int64_t places[256] = {};
    for (int64_t i = 0; i < n; i++) places[items[i].label >> shift & 255]++;
    int64_t place = 0;
    for (int64_t& next : places) {
      const int64_t count = next;
      next = place;
      place += count;
    }
    for (int64_t i = 0; i < n; i++) spare[places[items[i].label >> shift & 255]++] = items[i];
    std::swap(items, spare);
  }
  return items;
}

inline void group_samples(const Vector& labels, Groups& groups) {
  Buffer<LabelledSample> samples(labels.size), spare(labels.size);
  int64_t n = 0;
  for (int64_t i = 0; i < labels.size; i++) {
    const int64_t label = integer_at(labels, i);
    if (label >= 0) samples[n++] = {static_cast<uint64_t>(label), i};
  }
  const LabelledSample* sorted = sort_by_label(samples.get(), spare.get(), n);
  groups.count = 0;
  for (int64_t i = 0; i < n; i++) {
    if (i == 0 || sorted[i].label != sorted[i - 1].label) {
      groups.identities[groups.count] = static_cast<int64_t>(sorted[i].label);
      groups.starts[groups.count++] = i;
    }
    groups.order[i] = sorted[i].sample;
  }
  groups.starts[groups.count] = n;
}

// Calls work(state, group) for groups [0, count) of `samples` samples together: one range of groups per thread, as long
// as each has work enough to outweigh waking it. Equal ranges, not whoever is free: a thread meets the rows again that
// its own cache holds.
template <class MakeState, class Work>
inline void each_group(const Parallel& parallel, int64_t count, int64_t samples, int64_t dim,
                       const MakeState& make_state, const Work& work) {
  constexpr int64_t enough = 32768;  // numbers
  const int64_t ranges = std::clamp<int64_t>(samples * dim / enough, 1, parallel.threads());
  parallel.each(ranges, make_state, [&](auto& state, int64_t range) {
    for (int64_t group = count * range / ranges; group < count * (range + 1) / ranges; group++) work(state, group);
  });
}

inline bool is_weight(double weight) { return weight >= 0 && weight <= largest_finite<double>; }

// The weight of a sample as it counts: 1 if none are given, 0 in place of a bad one.
template <class T>
inline T weight_at(const Vector& weights, int64_t sample) {
  if (!weights) return 1;
  const T weight = floating_at<T>(weights, sample);
  return is_weight(weight) ? weight : 0;
}

// What a sample adds to its identity's sum, `values` * `factor`, and the most that this can add to the sum's length.
template <class T>
struct Share {
  const T* values;
  T factor;
  T length;
};

// `buffer` has room for one row.
template <class T>
inline Share<T> share_of(const AggregateArgs& a, int64_t sample, T weight, T* buffer) {
  const int64_t dim = a.embeddings.cols;
  const T* row = row_as(a.embeddings, sample, buffer);
  const T square = dot(row, row, dim);
  if (!a.normalize) return {row, weight, weight * length_of(row, dim, square)};
  const Direction<T> x = direction_of(row, dim, buffer, square);
  return {x.values, weight * x.scale, x.scale == 0 ? 0 : weight};
}

// to = base + x + y; returns the sum of squares of `to`, which may be `base`.
template <class T>
inline T add_shares(T* to, const T* base, const Share<T>& x, const Share<T>& y, int64_t n) {
  constexpr int64_t width = lanes<T>, chains = 2;
  Vec<T> squares[chains] = {};
  int64_t d = 0;
  for (; d + chains * width <= n; d += chains * width) {
    PROTOMEM_UNROLL
    for (int64_t k = 0; k < chains; k++) {
      const int64_t at = d + k * width;
      const Vec<T> sum = vload(base + at) + x.factor * vload(x.values + at) + y.factor * vload(y.values + at);
      vstore(to + at, sum);
      squares[k] += sum * sum;
    }
  }
  T square = vsum<T>(squares[0] + squares[1]);
  for (; d < n; d++) {
    to[d] = base[d] + x.factor * x.values[d] + y.factor * y.values[d];
    square += to[d] * to[d];
  }
  return square;
}

// A thread's scratch rows.
template <class T>
struct ScratchRows {
  explicit ScratchRows(int64_t dim)
      : buffer(4 * dim), zeros(buffer.get()), total(zeros + dim), x(total + dim), y(x + dim) {
    fill(zeros, T{0}, dim);
  }
  Buffer<T> buffer;
  T *zeros, *total, *x, *y;
};

template <class T>
inline void aggregate_one(const AggregateArgs& a, int64_t c, const ScratchRows<T>& rows) {
  constexpr T antipodal = static_cast<T>(1e-6);
  constexpr int64_t ahead = 8;  // rows; 4 and 16 do as well
  const int64_t dim = a.embeddings.cols;
  const int64_t *begin = a.groups.order + a.groups.starts[c], *end = a.groups.order + a.groups.starts[c + 1];
  const int64_t* last = a.groups.order + a.groups.starts[a.groups.count] - 1;
  T mass = 0;
  for (const int64_t* i = begin; i < end; i++) mass += weight_at<T>(a.weights, *i);

  const auto share = [&](const int64_t* i, T* buffer) {
    if (i + ahead <= last) fetch_row(a.embeddings, i[ahead]);
    return share_of(a, *i, mass > 0 ? weight_at<T>(a.weights, *i) : 1, buffer);
  };
  T budget = 0, square = 0;
  for (const int64_t* i = begin; i < end; i += 2) {
    const Share<T> x = share(i, rows.x);
    const Share<T> y = i + 1 < end ? share(i + 1, rows.y) : Share<T>{rows.zeros, 0, 0};
    square = add_shares(rows.total, i == begin ? rows.zeros : rows.total, x, y, dim);
    budget += x.length + y.length;
  }

  const Direction<T> direction = direction_of(rows.total, dim, rows.x, square);
  const bool exists = direction.length > antipodal * budget && direction.length <= largest_finite<T>;
  T* const prototype = row_in_place<T>(a.prototypes, c);
  if (exists) {
    scale_into(prototype, direction.scale, direction.values, dim);
  } else {
    fill(prototype, T{0}, dim);
  }
  a.identities[c] = a.groups.identities[c];
  store_at(a.mass, c, mass);
  store_at(a.norm, c, exists ? direction.length : T{0});
}

template <class T>
inline void aggregate_in(const AggregateArgs& a, const Parallel& parallel) {
  const int64_t rows = a.prototypes.rows, dim = a.embeddings.cols, count = std::min(a.groups.count, rows);
  fill(a.index.data, int64_t{-1}, a.index.size);
  for (int64_t c = 0; c < count; c++)
    for (int64_t i = a.groups.starts[c]; i < a.groups.starts[c + 1]; i++) a.index[a.groups.order[i]] = c;
  each_group(
      parallel, count, a.groups.starts[count], dim, [&] { return ScratchRows<T>(dim); },
      [&](const ScratchRows<T>& scratch, int64_t c) { aggregate_one(a, c, scratch); });
  for (int64_t c = count; c < rows; c++) {
    fill(row_in_place<T>(a.prototypes, c), T{0}, dim);
    a.identities[c] = -1;
    store_at(a.mass, c, T{0});
    store_at(a.norm, c, T{0});
  }
}

inline void aggregate_prototypes(const AggregateArgs& a, const Parallel& parallel) {
  a.prototypes.dtype == Dtype::float64 ? aggregate_in<double>(a, parallel) : aggregate_in<float>(a, parallel);
}

template <class T>
inline void store_gradients(const AggregateBackwardArgs& a, int64_t sample, const T* grad_row, T grad_weight) {
  if (grad_row != row_in_place<T>(a.grad_embeddings, sample)) store_row(a.grad_embeddings, sample, grad_row);
  const bool counts = !a.weights || is_weight(floating_at<double>(a.weights, sample));
  store_at(a.grad_weights, sample, counts ? grad_weight : T{0});
}

// One identity c and its samples. `buffer` has room for four rows.
template <class T>
inline void aggregate_one_backward(const AggregateBackwardArgs& a, int64_t c, const int64_t* begin, const int64_t* end,
                                   T* buffer) {
  const int64_t dim = a.embeddings.cols;
  T *tangent = buffer, *across = buffer + dim, *sample_buffer = buffer + 2 * dim, *grad_buffer = buffer + 3 * dim;
  const T norm = floating_at<T>(a.norm, c), grad_mass = floating_at<T>(a.grad_mass, c);
  const bool weighted = floating_at<T>(a.mass, c) > 0;
  if (norm > 0) {
    const T *grad = row_as(a.grad_prototypes, c, sample_buffer), *prototype = row_as(a.prototypes, c, grad_buffer);
    combine(across, T(1), grad, -dot(grad, prototype, dim), prototype, dim);
    for (int64_t d = 0; d < dim; d++) tangent[d] = across[d] / norm;  // one over it may leave the range
  }
  for (const int64_t* i = begin; i < end; i++) {
    T* const in_place = row_in_place<T>(a.grad_embeddings, *i);
    T* const to = in_place != nullptr ? in_place : grad_buffer;
    const T weight = weighted ? weight_at<T>(a.weights, *i) : 1;
    T along = 0;
    if (!(norm > 0)) {  // a zero prototype passes nothing
      fill(to, T{0}, dim);
    } else if (a.normalize) {
      const Direction<T> x = direction_of(row_as(a.embeddings, *i, sample_buffer), dim, sample_buffer);
      along = dot(across, x.values, dim) * x.scale / norm;
      const T factor = x.length > 0 ? weight : 0;
      const bool in_range = x.length >= std::numeric_limits<T>::min();  // one over it is
      const T inverse = in_range ? 1 / x.length : T(1);
      combine(to, factor * inverse, tangent, -factor * inverse * along * x.scale, x.values, dim);
      if (!in_range && factor > 0) divide(to, x.length, dim);
    } else {
      along = dot(across, row_as(a.embeddings, *i, sample_buffer), dim) / norm;  // what this leaves has one sign
      scale_into(to, weight, tangent, dim);
    }
    store_gradients(a, *i, to, grad_mass + (weighted ? along : 0));
  }
}

template <class T>
inline void aggregate_backward_in(const AggregateBackwardArgs& a, const Parallel& parallel) {
  const int64_t batch = a.index.size, dim = a.embeddings.cols;
  const Buffer<int64_t> scratch(Groups::scratch_size(batch));
  Groups groups(scratch.get(), batch);
  group_samples(a.index, groups);
  each_group(
      parallel, groups.count, batch, dim, [&] { return Buffer<T>(4 * dim); },
      [&](const Buffer<T>& buffer, int64_t g) {
        aggregate_one_backward(a, groups.identities[g], groups.order + groups.starts[g],
                               groups.order + groups.starts[g + 1], buffer.get());
      });
  if (groups.starts[groups.count] == batch) return;
  const Buffer<T> zeros(dim);  // for the samples without identity
  fill(zeros.get(), T{0}, dim);
  for (int64_t i = 0; i < batch; i++)
    if (integer_at(a.index, i) < 0) {
      store_row(a.grad_embeddings, i, zeros.get());
      store_at(a.grad_weights, i, T{0});
    }
}

inline void aggregate_prototypes_backward(const AggregateBackwardArgs& a, const Parallel& parallel) {
  a.embeddings.dtype == Dtype::float64 ? aggregate_backward_in<double>(a, parallel)
                                       : aggregate_backward_in<float>(a, parallel);
}

}  // namespace protomem::PROTOMEM_ISA
