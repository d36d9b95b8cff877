#pragma once

#include <algorithm>

#include "base/logits.h"
#include "base/scatter.h"
#include "base/slot_gradients.h"
#include "negative_logsumexp.h"

namespace protomem::PROTOMEM_ISA {

// c (B,) and the target rows dc/dx (B, D): zero where there is no target.
template <class T>
inline void read_targets(const NegativeLogsumexp& in, const int64_t* targets, const Parallel& parallel) {
  constexpr int64_t block = 16;  // rows at a time
  const int64_t batch = in.x.rows, dim = in.x.cols;
  parallel.each(
      div_up(batch, block), [&] { return RowReader<T>(in.prototypes, in.normalize); },
      [&](const RowReader<T>& reader, int64_t item) {
        for (int64_t i = item * block; i < min_of((item + 1) * block, batch); i++) {
          T* row = static_cast<T*>(in.target_rows) + i * dim;
          if (targets[i] >= 0) {
            std::copy_n(reader.read(targets[i]), dim, row);
          } else {
            std::fill_n(row, dim, T(0));
          }
          static_cast<T*>(in.cosine)[i] = dot(static_cast<const T*>(in.x.data) + i * dim, row, dim);
        }
      });
}

// ---- forward -------------------------------------------------------------------------------------------------------

// What a chunk of the memory has contributed to one panel: per row sum_j e^{s h - shift} and its shift, and per row and
// d the moment sum_j e^{s h - shift} h' w_j[d], stored [d][row].
template <class T>
struct Partial {
  T* total;
  T* shift;
  T* moment;  // null: not wanted
};

template <class T>
class Forward {
 public:
  Forward(const NegativeLogsumexp& arguments, const int64_t* targets, const HardForm<T>& form, const Parallel& parallel)
      : in_(arguments),
        parallel_(parallel),
        dim_(in_.x.cols),
        padded_dim_(round_up(dim_, step)),
        padded_(padded_rows<T>(in_.x.rows)),
        targets_(targets),
        form_(form),
        x_(pack_rows(static_cast<const T*>(in_.x.data), in_.x.rows, dim_, static_cast<T>(in_.scale), parallel)),
        cut_(in_.prototypes.rows, tile_slots<T>(dim_), 16,
             padded_ * (in_.with_gradient ? padded_dim_ : 2) * int64_t{sizeof(T)}, int64_t{16} << 20, x_.count,
             parallel.threads()),
        totals_(zeroed<T>(cut_.chunks * padded_, parallel)),
        shifts_(cut_.chunks * padded_),
        moments_(zeroed<T>(in_.with_gradient ? cut_.chunks * padded_ * padded_dim_ : 0, parallel)),
        past_cache_(panel_rows<T> * sizeof(T) % 64 == 0 && is_aligned(in_.kept) && dim_ % lanes<T> == 0 &&
                    is_large(in_.prototypes.rows * dim_ * int64_t{sizeof(T)})) {
    std::fill_n(shifts_.get(), cut_.chunks * padded_, in_.running ? none : static_cast<T>(in_.offset));
  }

  void run() {
    for (int64_t j = 0; in_.occupied != nullptr && in_.kept_rows > 0 && j < in_.prototypes.rows; j++)
      if (!in_.occupied[j]) std::fill_n(static_cast<T*>(in_.kept) + j * dim_, in_.kept_rows, T(0));
    stream_memory<T>(
        cut_, in_.prototypes, in_.normalize, x_.count, parallel_,
        [&](int64_t j) { return in_.occupied == nullptr || in_.occupied[j]; },
        [&](const Tile<T>& tile, T* logits, int64_t chunk, int64_t p) { consume(tile, logits, partial(chunk, p), p); });
    parallel_.each(
        x_.count, [&] { return Buffer<T>(cut_.chunks * panel_rows<T>); },
        [&](const Buffer<T>& weights, int64_t p) { finish(p, weights.get()); });
  }

 private:
  static constexpr T none = -std::numeric_limits<T>::infinity();

  Partial<T> partial(int64_t chunk, int64_t p) const {
    const int64_t at = chunk * padded_ + x_.first(p);
    return {totals_.get() + at, shifts_.get() + at, in_.with_gradient ? moments_.get() + at * padded_dim_ : nullptr};
  }

  void consume(const Tile<T>& tile, T* logits, const Partial<T>& sums, int64_t p) const {
    const int vectors = x_.vectors(p);
    const PanelTargets<T> targets(tile, targets_ + x_.first(p));
    tile.products(x_.panel(p), vectors, logits);
    if (form_.present) {
      const T* tau = form_.tau.get() + x_.first(p);
      if (in_.running) raise_shift<true>(tile, targets, vectors, tau, logits, sums);
      exponentiate<true>(tile, targets, vectors, tau, logits, sums);
    } else {
      if (in_.running) raise_shift<false>(tile, targets, vectors, nullptr, logits, sums);
      exponentiate<false>(tile, targets, vectors, nullptr, logits, sums);
    }
    if (in_.with_gradient) tile.add_moments(logits, vectors, sums.moment);
    keep(tile, logits, p);  // last: its stores are under way while the next panel's products are formed
  }

  // Writes e^{s h - offset} h' of the samples to be kept, slot by slot.
  void keep(const Tile<T>& tile, const T* logits, int64_t p) const {
    const int64_t count = min_of(panel_rows<T>, in_.kept_rows - x_.first(p));
    for (int64_t t = 0; count > 0 && t < tile.count(); t++) {
      T* to = static_cast<T*>(in_.kept) + tile.slot(t) * dim_ + x_.first(p);
      store_vectors<T>(to, count, past_cache_, [&](int64_t r) { return vload<T>(logits + t * panel_rows<T> + r); });
    }
  }

  // logits y -> e^{s h - shift} h', in place; adds e^{s h - shift} to the total. The target's entry becomes 0.
  template <bool FORM>
  void exponentiate(const Tile<T>& tile, const PanelTargets<T>& targets, int vectors, const T* threshold, T* logits,
                    const Partial<T>& sums) const {
    for (int v = 0; v < vectors; v++) {
      const Vec<T> shift = vload<T>(sums.shift + v * lanes<T>);
      const Vec<T> finite_shift = shift == none ? broadcast<T>(0) : shift;
      const Vec<T> tau = FORM ? vload<T>(threshold + v * lanes<T>) : Vec<T>{};
      Vec<T> total{};
      for (int64_t t = 0; t < tile.count(); t++) {
        T* at = logits + t * panel_rows<T> + v * lanes<T>;
        const Vec<T> y = vload<T>(at);
        const IntVec<T> is_target = targets.at(v, t);
        Vec<T> e = vexp<T>((FORM ? form_.logit(y, tau) : y) - finite_shift);
        e = is_target ? broadcast<T>(0) : e;
        total += e;
        vstore<T>(at, FORM ? e * form_.slope(y, tau) : e);
      }
      vstore<T>(sums.total + v * lanes<T>, vload<T>(sums.total + v * lanes<T>) + total);
    }
  }

  // Running maxima: lifts each row's shift to its largest logit so far and rescales what has been summed.
  template <bool FORM>
  void raise_shift(const Tile<T>& tile, const PanelTargets<T>& targets, int vectors, const T* threshold,
                   const T* logits, const Partial<T>& sums) const {
    for (int v = 0; v < vectors; v++) {
      const Vec<T> before = vload<T>(sums.shift + v * lanes<T>);
      const Vec<T> tau = FORM ? vload<T>(threshold + v * lanes<T>) : Vec<T>{};
      Vec<T> after = before;
      for (int64_t t = 0; t < tile.count(); t++) {
        const Vec<T> y = vload<T>(logits + t * panel_rows<T> + v * lanes<T>);
        const Vec<T> logit = targets.at(v, t) ? broadcast<T>(none) : (FORM ? form_.logit(y, tau) : y);
        after = logit > after ? logit : after;
      }
      const IntVec<T> risen = after > before;
      if (!any<T>(risen)) continue;
      const Vec<T> factor = risen ? vexp<T>(before - after) : broadcast<T>(1);
      vstore<T>(sums.shift + v * lanes<T>, after);
      vstore<T>(sums.total + v * lanes<T>, vload<T>(sums.total + v * lanes<T>) * factor);
      for (int64_t d = 0; in_.with_gradient && d < padded_dim_; d++) {
        T* at = sums.moment + d * panel_rows<T> + v * lanes<T>;
        vstore<T>(at, vload<T>(at) * factor);
      }
    }
  }

  // Adds the chunks' parts of panel p in order, and writes n and o. `weights` is scratch: e^{chunk's shift - shift}.
  void finish(int64_t p, T* weights) const {
    T factor[panel_rows<T>];
    for (int64_t r = 0; r < x_.filled(p); r++) {
      T shift = none, total = 0;
      for (int64_t c = 0; c < cut_.chunks; c++) shift = std::max(shift, partial(c, p).shift[r]);
      for (int64_t c = 0; c < cut_.chunks; c++) {
        const T own = partial(c, p).shift[r];
        weights[c * panel_rows<T> + r] = own == shift ? T(1) : std::exp(own - shift);
        total += weights[c * panel_rows<T> + r] * partial(c, p).total[r];
      }
      static_cast<T*>(in_.n)[x_.first(p) + r] = total == 0 ? none : std::log(total) + shift;
      factor[r] = total == 0 ? T(0) : static_cast<T>(in_.scale) / total;
    }
    for (int64_t d = 0; in_.with_gradient && d < dim_; d++) {
      T sum[panel_rows<T>] = {};
      for (int64_t c = 0; c < cut_.chunks; c++)
        for (int64_t r = 0; r < x_.filled(p); r++)
          sum[r] += weights[c * panel_rows<T> + r] * partial(c, p).moment[d * panel_rows<T> + r];
      for (int64_t r = 0; r < x_.filled(p); r++)
        static_cast<T*>(in_.o)[(x_.first(p) + r) * dim_ + d] = factor[r] * sum[r];
    }
  }

  const NegativeLogsumexp& in_;
  const Parallel& parallel_;
  const int64_t dim_, padded_dim_, padded_;
  const int64_t* targets_;
  const HardForm<T>& form_;
  Panels<T> x_;
  Cut cut_;
  Buffer<T> totals_, shifts_, moments_;  // [chunk][row], and [chunk][panel][d][row]
  const bool past_cache_;                // how `kept` is written
};

// ---- forward, over chosen slots only --------------------------------------------------------------------------------

// The chosen negatives of row i: inside the memory and not the target, else -1.
inline int64_t chosen_negative(const LogsumexpInputs& in, int64_t target, int64_t i, int64_t k) {
  const int64_t slot =
      static_cast<const int64_t*>(in.negatives.data)[i * in.negatives.row_stride + k * in.negatives.col_stride];
  return slot >= 0 && slot < in.prototypes.rows && slot != target ? slot : -1;
}

// The scaled cosines of row i to its k chosen negatives, reshaped in place to logits; slopes go to `slope`.
// Slots that are none get -inf and 0.
template <class T>
inline void chosen_logits(const LogsumexpInputs& in, const HardForm<T>& form, const RowReader<T>& reader,
                          int64_t target, int64_t i, T* __restrict logit, T* __restrict slope) {
  const T* x = static_cast<const T*>(in.x.data) + i * in.x.cols;
  const T scale = static_cast<T>(in.scale);
  for (int64_t k = 0; k < in.negatives.cols; k++) {
    const int64_t slot = chosen_negative(in, target, i, k);
    logit[k] = slot < 0 ? -std::numeric_limits<T>::infinity() : scale * dot(x, reader.read(slot), in.x.cols);
    slope[k] = slot < 0 ? T(0) : T(1);
    if (slot >= 0 && form.present && logit[k] > form.tau[i]) {
      slope[k] = logit[k] * (2 * form.g) + form.a;
      logit[k] = (logit[k] * form.g + form.a) * logit[k] + form.b;
    }
  }
}

// value[k] = exp(value[k] - shift), for k < n rounded up to whole vectors.
template <class T>
inline void exponentials(T* value, int64_t n, T shift) {
  for (int64_t k = 0; k < n; k += lanes<T>) vstore<T>(value + k, vexp<T>(vload<T>(value + k) - shift));
}

template <class T>
inline void forward_over_chosen(const NegativeLogsumexp& in, const int64_t* targets, const HardForm<T>& form,
                                const Parallel& parallel) {
  constexpr T none = -std::numeric_limits<T>::infinity();
  const int64_t count = in.negatives.cols, padded = round_up(count, lanes<T>), dim = in.x.cols;
  struct Worker {
    RowReader<T> reader;
    Buffer<T> e, slope;
  };
  parallel.each(
      in.x.rows,
      [&] { return Worker{RowReader<T>(in.prototypes, in.normalize), Buffer<T>(padded), Buffer<T>(padded)}; },
      [&](const Worker& worker, int64_t i) {
        T *e = worker.e.get(), *slope = worker.slope.get();
        chosen_logits(in, form, worker.reader, targets[i], i, e, slope);
        std::fill(e + count, e + padded, none);
        T shift = in.running ? none : static_cast<T>(in.offset), total = 0;
        for (int64_t k = 0; in.running && k < count; k++) shift = e[k] > shift ? e[k] : shift;
        exponentials(e, padded, shift == none ? T(0) : shift);
        for (int64_t k = 0; k < count; k++) total += e[k];
        static_cast<T*>(in.n)[i] = total == 0 ? none : std::log(total) + shift;
        if (!in.with_gradient) return;
        T* o = static_cast<T*>(in.o) + i * dim;
        std::fill_n(o, dim, T(0));
        const T factor = total == 0 ? T(0) : static_cast<T>(in.scale) / total;
        for (int64_t k = 0; k < count; k++) {
          const int64_t slot = chosen_negative(in, targets[i], i, k);
          if (slot >= 0) add_scaled(o, factor * e[k] * slope[k], worker.reader.read(slot), dim);
        }
      });
}

template <class T>
inline void negative_logsumexp_as(const NegativeLogsumexp& in, const Parallel& parallel) {
  const int64_t padded = padded_rows<T>(in.x.rows);
  const Buffer<int64_t> targets = valid_targets(in.targets, in.prototypes.rows, padded);
  const HardForm<T> form(in.threshold, in.coefficients, in.scale, padded);
  read_targets<T>(in, targets.get(), parallel);
  if (in.chosen) {
    forward_over_chosen(in, targets.get(), form, parallel);
  } else {
    Forward<T>(in, targets.get(), form, parallel).run();
  }
}

inline void negative_logsumexp(const NegativeLogsumexp& in, const Parallel& parallel) {
  in.x.dtype == Dtype::float64 ? negative_logsumexp_as<double>(in, parallel)
                               : negative_logsumexp_as<float>(in, parallel);
}

// ---- backward, for the prototypes -----------------------------------------------------------------------------------

template <class T>
class Backward {
 public:
  Backward(const NegativeLogsumexpBackward& arguments, const int64_t* targets, const HardForm<T>& form,
           const Parallel& parallel)
      : in_(arguments),
        parallel_(parallel),
        batch_(in_.x.rows),
        dim_(in_.x.cols),
        targets_(targets),
        form_(form),
        rows_(pack_rows(static_cast<const T*>(in_.x.data), batch_, dim_, static_cast<T>(in_.scale), parallel)),
        gradients_(
            in_.grad_prototypes, in_.prototypes, in_.normalize, static_cast<const T*>(in_.x.data), batch_,
            [](int64_t) { return true; }, parallel),
        kept_panels_(in_.kept_rows >= batch_ ? rows_.count : in_.kept_rows / panel_rows<T>) {
    const int64_t padded = padded_rows<T>(batch_);
    const T* n = static_cast<const T*>(in_.n);
    const T* grad_n = static_cast<const T*>(in_.grad_n);
    const T* grad_cosine = static_cast<const T*>(in_.grad_cosine);
    // A row without negatives (n = -inf) has no probabilities: exp(y - inf) = 0.
    constexpr T infinity = std::numeric_limits<T>::infinity();
    n_ = per_row<T>(batch_, padded, infinity, [&](int64_t i) { return n[i] == -infinity ? infinity : n[i]; });
    factor_ = per_row<T>(batch_, padded, T(0), [&](int64_t i) { return static_cast<T>(in_.scale) * grad_n[i]; });
    kept_factor_ = per_row<T>(batch_, padded, T(0),
                              [&](int64_t i) { return factor_[i] * std::exp(static_cast<T>(in_.offset) - n_[i]); });
    grad_cosine_ = per_row<T>(batch_, padded, T(0), [&](int64_t i) { return grad_cosine[i]; });
  }

  void run() {
    const int64_t capacity = in_.prototypes.rows;
    Buffer<bool> targeted(in_.occupied == nullptr ? 0 : capacity);
    if (in_.occupied != nullptr) {  // a target is present whatever `occupied` says
      std::fill_n(targeted.get(), capacity, false);
      for (int64_t i = 0; i < batch_; i++)
        if (targets_[i] >= 0) targeted[targets_[i]] = true;
    }
    const auto present = [&](int64_t j) { return in_.occupied == nullptr || in_.occupied[j] || targeted[j]; };
    const int64_t block = 8 * tile_slots<T>(dim_);
    parallel_.each(
        div_up(capacity, block), [&] { return Worker(*this); },
        [&](Worker& worker, int64_t item) {
          const int64_t end = min_of((item + 1) * block, capacity);
          for (int64_t j = item * block; j < end; j++)
            if (!present(j)) worker.gradients.write_zeros(j);
          for (int64_t slot = item * block; slot < end;) {
            slot = worker.tile.take(slot, end, present);
            kept_probabilities(worker.tile, worker.p.get());
            if (kept_panels_ < rows_.count) worker.tile.pack();
            for (int64_t p = kept_panels_; p < rows_.count; p++) {
              T* at = worker.p.get() + p * worker.tile.capacity * panel_rows<T>;
              worker.tile.products(rows_.panel(p), rows_.vectors(p), at);
              form_.present ? probabilities<true>(worker.tile, p, at) : probabilities<false>(worker.tile, p, at);
            }
            worker.gradients.write(worker.tile, worker.p.get());
          }
        });
  }

 private:
  struct Worker {
    Tile<T> tile;
    SlotGradientWriter<T> gradients;
    Buffer<T> p;  // dL/dcos of one tile: per panel of the batch [slot][row]

    explicit Worker(const Backward& of)
        : tile(of.in_.prototypes, of.in_.normalize),
          gradients(of.gradients_),
          p(tile.capacity * of.rows_.count * panel_rows<T>) {}
  };

  // logits y -> dL/dcos = dL/dn s e^{s h - n} h', in place; at the target dL/dc.
  template <bool FORM>
  void probabilities(const Tile<T>& tile, int64_t p, T* logits) const {
    const PanelTargets<T> targets(tile, targets_ + rows_.first(p));
    for (int v = 0; v < rows_.vectors(p); v++) {
      const int64_t row = rows_.first(p) + v * lanes<T>;
      const Vec<T> n = vload<T>(n_.get() + row), factor = vload<T>(factor_.get() + row);
      const Vec<T> grad_cosine = vload<T>(grad_cosine_.get() + row);
      const Vec<T> tau = FORM ? vload<T>(form_.tau.get() + row) : Vec<T>{};
      for (int64_t t = 0; t < tile.count(); t++) {
        T* at = logits + t * panel_rows<T> + v * lanes<T>;
        const Vec<T> y = vload<T>(at);
        Vec<T> q = factor * vexp<T>((FORM ? form_.logit(y, tau) : y) - n);
        if (FORM) q *= form_.slope(y, tau);
        if (in_.occupied != nullptr && !in_.occupied[tile.slot(t)]) q = Vec<T>{};
        vstore<T>(at, targets.at(v, t) ? grad_cosine : q);
      }
    }
  }

  // The same for the panels whose samples were all kept: dL/dn s e^{offset - n} times what forward kept, slot by slot,
  // as it lies in memory. A row without probabilities may hold NaN.
  void kept_probabilities(const Tile<T>& tile, T* out) const {
    const int64_t panel = tile.capacity * panel_rows<T>;
    for (int64_t t = 0; t < tile.count(); t++) {
      const T* kept = static_cast<const T*>(in_.grad_prototypes.data) + tile.slot(t) * dim_;
      for (int64_t p = 0; p < kept_panels_; p++)
        for (int v = 0; v < rows_.vectors(p); v++) {
          const int64_t row = rows_.first(p) + v * lanes<T>;
          const Vec<T> factor = vload<T>(kept_factor_.get() + row);
          const Vec<T> q = factor * vload_first<T>(kept + row, min_of(batch_ - row, lanes<T>));
          vstore<T>(out + p * panel + t * panel_rows<T> + v * lanes<T>, factor == 0 ? broadcast<T>(0) : q);
        }
    }
    for (int64_t i = 0; i < kept_panels_ * panel_rows<T> && i < batch_; i++) {
      const int64_t t = tile.find(targets_[i]), p = i / panel_rows<T>;
      if (t >= 0) out[p * panel + t * panel_rows<T> + i % panel_rows<T>] = grad_cosine_[i];
    }
  }

  const NegativeLogsumexpBackward& in_;
  const Parallel& parallel_;
  const int64_t batch_, dim_;
  const int64_t* targets_;
  const HardForm<T>& form_;
  Panels<T> rows_;
  SlotGradients<T> gradients_;
  const int64_t kept_panels_;  // those whose samples were all kept
  Buffer<T> n_, factor_, kept_factor_, grad_cosine_;
};

// Where only chosen slots and targets take part: dL/dcos of each, then rows of x summed slot by slot, in batch order.
template <class T>
inline void backward_over_chosen(const NegativeLogsumexpBackward& in, const int64_t* targets, const HardForm<T>& form,
                                 const Parallel& parallel) {
  const int64_t batch = in.x.rows, count = in.negatives.cols, padded = round_up(count, lanes<T>);
  Buffer<T> grad(batch * (count + 1));
  Buffer<int64_t> slots(batch * (count + 1));
  struct Worker {
    RowReader<T> reader;
    Buffer<T> e, slope;
  };
  parallel.each(
      batch, [&] { return Worker{RowReader<T>(in.prototypes, in.normalize), Buffer<T>(padded), Buffer<T>(padded)}; },
      [&](const Worker& worker, int64_t i) {
        T *e = worker.e.get(), *slope = worker.slope.get();
        const T n = static_cast<const T*>(in.n)[i];
        const T factor = static_cast<T>(in.scale) * static_cast<const T*>(in.grad_n)[i];
        chosen_logits(in, form, worker.reader, targets[i], i, e, slope);
        std::fill(e + count, e + padded, T(0));
        exponentials(e, padded, n == -std::numeric_limits<T>::infinity() ? -n : n);
        for (int64_t k = 0; k <= count; k++) {
          const bool last = k == count;
          slots[i * (count + 1) + k] = last ? targets[i] : chosen_negative(in, targets[i], i, k);
          grad[i * (count + 1) + k] = last ? static_cast<const T*>(in.grad_cosine)[i] : factor * e[k] * slope[k];
        }
      });
  scatter_rows(in.grad_prototypes, in.prototypes, in.normalize, static_cast<const T*>(in.x.data), slots.get(),
               grad.get(), batch, count + 1, parallel);
}

template <class T>
inline void negative_logsumexp_backward_as(const NegativeLogsumexpBackward& in, const Parallel& parallel) {
  const int64_t padded = padded_rows<T>(in.x.rows);
  const Buffer<int64_t> targets = valid_targets(in.targets, in.prototypes.rows, padded);
  const HardForm<T> form(in.threshold, in.coefficients, in.scale, padded);
  if (in.chosen) {
    backward_over_chosen(in, targets.get(), form, parallel);
  } else {
    Backward<T>(in, targets.get(), form, parallel).run();
  }
}

inline void negative_logsumexp_backward(const NegativeLogsumexpBackward& in, const Parallel& parallel) {
  in.x.dtype == Dtype::float64 ? negative_logsumexp_backward_as<double>(in, parallel)
                               : negative_logsumexp_backward_as<float>(in, parallel);
}

}  // namespace protomem::PROTOMEM_ISA
