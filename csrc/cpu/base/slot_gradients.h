// Gradients of all prototypes, tile by tile: every row is complete when it is written, so nothing is added up across
// tiles and there are no atomics.
#pragma once

#include "stream.h"

namespace protomem::PROTOMEM_ISA {

// The batch and the output, shared by all threads.
template <class T>
struct SlotGradients {
  Matrix out;         // (M, D) contiguous
  Matrix prototypes;  // as stored
  bool normalize;     // the kernel works on their unit rows: the gradient goes on to the raw ones
  Panels<T> columns;  // x with the lanes over d, zero where not alive

  template <class Alive>
  SlotGradients(const Matrix& out_, const Matrix& prototypes_, bool normalize_, const T* x, int64_t batch,
                const Alive& alive, const Parallel& parallel)
      : out(out_),
        prototypes(prototypes_),
        normalize(normalize_),
        columns(pack_columns(x, batch, prototypes_.cols, alive, parallel)) {}
};

// One thread's hands on them.
template <class T>
class SlotGradientWriter {
 public:
  explicit SlotGradientWriter(const SlotGradients<T>& all)
      : all_(all),
        raw_(all.prototypes, false),
        unit_(all.prototypes, true),
        row_(all.columns.count * panel_rows<T>),
        sums_(step * row_) {}

  // dL/dw_j = sum_i p[j][i] x_i for the slots of a tile. `p` holds one panel [slot][row] per panel of the batch,
  // tile.capacity slots each.
  void write(const Tile<T>& tile, const T* p) const {
    for (int64_t t = 0; t < tile.count(); t += step) {
      for (int64_t c = 0; c < all_.columns.count; c++)
        multiply<T, Use::slot_sums>(all_.columns.vectors(c), all_.columns.depth, p + t * panel_rows<T>,
                                    tile.capacity * panel_rows<T>, all_.columns.panel(c),
                                    sums_.get() + c * panel_rows<T>, row_, false);
      for (int64_t r = 0; r < min_of(step, tile.count() - t); r++) {
        T* grad = sums_.get() + r * row_;
        const int64_t slot = tile.slot(t + r);
        if (all_.normalize) unit_backward(grad, raw_.read(slot), unit_.read(slot), all_.prototypes.cols);
        store_row(all_.out, slot, grad);
      }
    }
  }

  void write_zeros(int64_t slot) const {
    std::fill_n(sums_.get(), all_.prototypes.cols, T(0));
    store_row(all_.out, slot, sums_.get());
  }

 private:
  const SlotGradients<T>& all_;
  RowReader<T> raw_, unit_;
  int64_t row_;
  Buffer<T> sums_;  // of `step` slots
};

}  // namespace protomem::PROTOMEM_ISA
