// From scaled cosines y = s cos to logits s h and slopes h' (protomem_kernels/backends/reference/negative_logsumexp.py
// derives them), and values of one sample each, laid out as the micro-kernel's panels.
#pragma once

#include "stream.h"

namespace protomem::PROTOMEM_ISA {

// value(i) for every row i < batch, padded with `fill` to whole panels.
template <class Value, class F>
inline Buffer<Value> per_row(int64_t batch, int64_t padded, Value fill, const F& value) {
  Buffer<Value> out(padded);
  for (int64_t i = 0; i < padded; i++) out[i] = i < batch ? static_cast<Value>(value(i)) : fill;
  return out;
}

template <class T>
inline int64_t padded_rows(int64_t batch) {
  return round_up(batch, panel_rows<T>);
}

// Each row's target slot, -1 where it has none inside the memory.
inline Buffer<int64_t> valid_targets(const Vector& targets, int64_t capacity, int64_t padded) {
  return per_row<int64_t>(targets.size, padded, -1, [&](int64_t i) {
    const int64_t slot = integer_at(targets, i);
    return slot >= 0 && slot < capacity ? slot : -1;
  });
}

// Where the targets of one panel's rows stand in a tile, as lanes to compare with: -1 where they do not.
template <class T>
struct PanelTargets {
  using Integer = typename Lanes<T>::Integer;
  IntVec<T> lane[panel_vectors];

  PanelTargets(const Tile<T>& tile, const int64_t* targets) {
    Integer found[panel_rows<T>];
    for (int64_t r = 0; r < panel_rows<T>; r++) found[r] = static_cast<Integer>(tile.find(targets[r]));
    for (int v = 0; v < panel_vectors; v++) lane[v] = ivload<T>(found + v * lanes<T>);
  }

  IntVec<T> at(int v, int64_t t) const { return lane[v] == static_cast<Integer>(t); }
};

// The hard-negative form on y = s cos: where y > s tau_i, s h = a y + s b + (g / s) y^2 and h' = a + 2 (g / s) y.
template <class T>
struct HardForm {
  bool present;
  T a = 1, b = 0, g = 0;
  Buffer<T> tau;  // s tau_i per row

  HardForm(const Vector& threshold, const Vector& coefficients, double scale, int64_t padded)
      : present(static_cast<bool>(threshold) || threshold.size > 0) {
    if (!present) return;
    const T s = static_cast<T>(scale);
    a = floating_at<T>(coefficients, 0);
    b = s * floating_at<T>(coefficients, 1);
    g = floating_at<T>(coefficients, 2) / s;
    tau = per_row<T>(threshold.size, padded, T(0), [&](int64_t i) { return s * floating_at<T>(threshold, i); });
  }

  Vec<T> logit(Vec<T> y, Vec<T> threshold) const { return y > threshold ? (y * g + a) * y + b : y; }
  Vec<T> slope(Vec<T> y, Vec<T> threshold) const { return y > threshold ? y * (2 * g) + a : broadcast<T>(1); }
};

}  // namespace protomem::PROTOMEM_ISA
