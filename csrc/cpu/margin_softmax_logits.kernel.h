#pragma once

#include "base/logits.h"
#include "base/slot_gradients.h"
#include "margin_softmax_logits.h"

namespace protomem::PROTOMEM_ISA {

// out[r][slot] = panel[slot][r] for the slots of a tile and r < count; the rows of `out` are `out_row` apart. `block`
// has room for a panel: [slot / width][row][slot % width], transposed in registers. A row's slots are written together,
// as whole cache lines that are not fetched before if `past_cache`.
template <class T>
inline void store_transposed(const Tile<T>& tile, const T* panel, T* block, int64_t count, T* out, int64_t out_row,
                             bool past_cache) {
  constexpr int64_t width = lanes<T>;
  const int64_t first = tile.slot(0), slots = tile.count();
  if (tile.slot(slots - 1) - first != slots - 1) {  // there are empty slots in between
    for (int64_t r = 0; r < count; r++)
      for (int64_t t = 0; t < slots; t++) out[r * out_row + tile.slot(t)] = panel[t * panel_rows<T> + r];
    return;
  }
  for (int64_t t = 0; t < slots; t += width) {  // with whatever follows the last slot
    const T* from = panel + t * panel_rows<T>;
    T* to = block + t * panel_rows<T>;
    for (int64_t r = 0; r < panel_rows<T>; r++) {
      PROTOMEM_UNROLL
      for (int64_t u = 0; u < width; u++) to[r * width + u] = from[u * panel_rows<T> + r];
    }
  }
  for (int64_t r = 0; r < count; r++) {
    T* to = out + r * out_row + first;
    store_vectors<T>(to, slots, past_cache && is_aligned(to),
                     [&](int64_t t) { return vload<T>(block + t * panel_rows<T> + r * width); });
  }
}

template <class T>
inline void margin_softmax_logits_as(const MarginSoftmaxLogits& in, const Parallel& parallel) {
  const int64_t batch = in.x.rows, capacity = in.prototypes.rows, padded = padded_rows<T>(batch);
  const T scale = static_cast<T>(in.scale);
  const Panels<T> rows = pack_rows(static_cast<const T*>(in.x.data), batch, in.x.cols, scale, parallel);
  const HardForm<T> form(in.threshold, in.coefficients, in.scale, padded);
  T* logits = static_cast<T*>(in.logits);
  if (in.occupied != nullptr)
    parallel.each(batch, [&](int64_t i) {
      for (int64_t j = 0; j < capacity; j++)
        if (!in.occupied[j]) logits[i * capacity + j] = -std::numeric_limits<T>::infinity();
    });
  const bool large = is_large(batch * capacity * int64_t{sizeof(T)});
  const int64_t chunks = 16 * parallel.threads();  // nothing is kept per chunk
  const Cut cut(capacity, tile_slots<T>(in.x.cols), chunks, 1, chunks, rows.count, parallel.threads());
  stream_memory<T>(
      cut, in.prototypes, in.normalize, rows.count, parallel,
      [&](int64_t j) { return in.occupied == nullptr || in.occupied[j]; },
      [&] { return Buffer<T>(tile_slots<T>(in.x.cols) * panel_rows<T>); },
      [&](const Buffer<T>& block, const Tile<T>& tile, T* panel, int64_t, int64_t p) {
        tile.products(rows.panel(p), rows.vectors(p), panel);
        if (form.present)
          for (int64_t t = 0; t < tile.count(); t++)
            for (int v = 0; v < rows.vectors(p); v++) {
              T* at = panel + t * panel_rows<T> + v * lanes<T>;
              vstore<T>(at, form.logit(vload<T>(at), vload<T>(form.tau.get() + rows.first(p) + v * lanes<T>)));
            }
        store_transposed(tile, panel, block.get(), rows.filled(p), logits + rows.first(p) * capacity, capacity, large);
      });
  const Buffer<int64_t> targets = valid_targets(in.targets, capacity, padded);
  for (int64_t i = 0; i < batch; i++)
    if (targets[i] >= 0) logits[i * capacity + targets[i]] = floating_at<T>(in.target_logits, i);
}

inline void margin_softmax_logits(const MarginSoftmaxLogits& in, const Parallel& parallel) {
  in.x.dtype == Dtype::float64 ? margin_softmax_logits_as<double>(in, parallel)
                               : margin_softmax_logits_as<float>(in, parallel);
}

template <class T>
class LogitsBackward {
 public:
  LogitsBackward(const MarginSoftmaxLogitsBackward& arguments, const Parallel& parallel)
      : in_(arguments),
        parallel_(parallel),
        batch_(in_.x.rows),
        dim_(in_.x.cols),
        padded_dim_(round_up(dim_, step)),
        padded_(padded_rows<T>(batch_)),
        targets_(valid_targets(in_.targets, in_.prototypes.rows, padded_)),
        alive_(per_row<bool>(batch_, padded_, false, [&](int64_t i) { return is_finite(x(i), dim_); })),
        form_(in_.threshold, in_.coefficients, in_.scale, padded_),
        rows_(pack_rows(static_cast<const T*>(in_.x.data), batch_, dim_, static_cast<T>(in_.scale), parallel)),
        gradients_(
            in_.grad_prototypes, in_.prototypes, in_.normalize, x(0), in_.grad_prototypes ? batch_ : 0,
            [&](int64_t i) { return alive_[i]; }, parallel),
        cut_(in_.prototypes.rows, tile_slots<T>(dim_), 16, padded_ * padded_dim_ * int64_t{sizeof(T)},
             int64_t{16} << 20, 1, 1),
        moments_(zeroed<T>(cut_.chunks * padded_ * padded_dim_, parallel)) {}

  void run() {
    const auto present = [&](int64_t j) { return in_.occupied == nullptr || in_.occupied[j]; };
    parallel_.each(
        cut_.chunks, [&] { return Worker(*this); },
        [&](Worker& worker, int64_t chunk) {
          const int64_t end = cut_.first(chunk + 1);
          for (int64_t j = cut_.first(chunk); in_.grad_prototypes && j < end; j++)
            if (!present(j)) worker.gradients.write_zeros(j);
          for (int64_t slot = cut_.first(chunk); slot < end;) {
            slot = worker.tile.take(slot, end, present);
            worker.tile.pack();
            for (int64_t p = 0; p < rows_.count; p++) {
              T* h = worker.h.get() + p * worker.tile.capacity * panel_rows<T>;
              read_gradients(worker.tile, p, worker.slopes.get(), h);
              worker.tile.add_moments(h, rows_.vectors(p), moments(chunk, p));
            }
            if (in_.grad_prototypes) worker.gradients.write(worker.tile, worker.h.get());
          }
        });
    parallel_.each(rows_.count, [&](int64_t p) { finish(p); });
  }

 private:
  struct Worker {
    Tile<T> tile;
    SlotGradientWriter<T> gradients;
    Buffer<T> slopes;  // one panel [slot][row]
    Buffer<T> h;       // H of one tile: per panel of the batch [slot][row]

    explicit Worker(const LogitsBackward& of)
        : tile(of.in_.prototypes, of.in_.normalize),
          gradients(of.gradients_),
          slopes(tile.capacity * panel_rows<T>),
          h(tile.capacity * of.rows_.count * panel_rows<T>) {}
  };

  const T* x(int64_t i) const { return static_cast<const T*>(in_.x.data) + i * dim_; }

  T* moments(int64_t chunk, int64_t p) const {
    return moments_.get() + (chunk * padded_ + rows_.first(p)) * padded_dim_;
  }

  T grad(int64_t i, int64_t j) const {
    return static_cast<const T*>(in_.grad.data)[i * in_.grad.row_stride + j * in_.grad.col_stride];
  }

  // H = s G h' of one tile and panel, 0 at the targets and in rows that are broken or not there.
  void read_gradients(const Tile<T>& tile, int64_t p, T* slopes, T* h) const {
    const T scale = static_cast<T>(in_.scale);
    if (form_.present) tile.products(rows_.panel(p), rows_.vectors(p), slopes);
    for (int64_t r = 0; r < panel_rows<T>; r++) {
      const int64_t i = rows_.first(p) + r;
      for (int64_t t = 0; t < tile.count(); t++) {
        const bool counts = alive_[i] && tile.slot(t) != targets_[i];
        h[t * panel_rows<T> + r] = counts ? scale * grad(i, tile.slot(t)) : T(0);
      }
    }
    if (!form_.present) return;
    for (int v = 0; v < rows_.vectors(p); v++) {
      const Vec<T> tau = vload<T>(form_.tau.get() + rows_.first(p) + v * lanes<T>);
      for (int64_t t = 0; t < tile.count(); t++) {
        const int64_t at = t * panel_rows<T> + v * lanes<T>;
        vstore<T>(h + at, vload<T>(h + at) * form_.slope(vload<T>(slopes + at), tau));
      }
    }
  }

  // Adds the chunks' moments in order: dL/dx; and picks dL/dz.
  void finish(int64_t p) const {
    for (int64_t d = 0; d < dim_; d++)
      for (int64_t r = 0; r < rows_.filled(p); r++) {
        T sum = alive_[rows_.first(p) + r] ? T(0) : std::numeric_limits<T>::quiet_NaN();
        for (int64_t c = 0; c < cut_.chunks; c++) sum += moments(c, p)[d * panel_rows<T> + r];
        static_cast<T*>(in_.grad_x)[(rows_.first(p) + r) * dim_ + d] = sum;
      }
    for (int64_t r = 0; r < rows_.filled(p); r++) {
      const int64_t i = rows_.first(p) + r;
      static_cast<T*>(in_.grad_target_logits)[i] = targets_[i] >= 0 ? grad(i, targets_[i]) : T(0);
    }
  }

  const MarginSoftmaxLogitsBackward& in_;
  const Parallel& parallel_;
  const int64_t batch_, dim_, padded_dim_, padded_;
  Buffer<int64_t> targets_;
  Buffer<bool> alive_;  // a broken embedding passes nothing on to the prototypes, which belong to all samples
  HardForm<T> form_;
  Panels<T> rows_;
  SlotGradients<T> gradients_;
  Cut cut_;
  Buffer<T> moments_;  // [chunk][panel][d][row]
};

inline void margin_softmax_logits_backward(const MarginSoftmaxLogitsBackward& in, const Parallel& parallel) {
  in.x.dtype == Dtype::float64 ? LogitsBackward<double>(in, parallel).run() : LogitsBackward<float>(in, parallel).run();
}

}  // namespace protomem::PROTOMEM_ISA
