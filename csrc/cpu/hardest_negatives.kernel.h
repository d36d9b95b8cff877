#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "base/logits.h"
#include "base/scatter.h"
#include "hardest_negatives.h"

namespace protomem::PROTOMEM_ISA {

template <class T>
struct Candidate {
  T cosine;
  int64_t slot;

  bool operator<(const Candidate& other) const {  // stands before
    return cosine != other.cosine ? cosine > other.cosine : slot < other.slot;
  }
};

// Each row's candidates from one chunk of the memory.
template <class T>
class CandidateLists {
 public:
  CandidateLists(int64_t rows, int64_t k, int64_t slots)
      : k_(k), room_(room(k, slots)), count_(rows), list_(rows * room_) {
    std::fill_n(count_.get(), rows, 0);
  }

  static int64_t bytes(int64_t rows, int64_t k, int64_t slots) {
    return rows * room(k, slots) * int64_t{sizeof(Candidate<T>)};
  }

  int64_t count(int64_t row) const { return count_[row]; }
  const Candidate<T>* list(int64_t row) const { return list_.get() + row * room_; }

  // Takes a cosine above the bar; raises the bar when the list is full.
  void add(int64_t row, T cosine, int64_t slot, T& bar) {
    list_[row * room_ + count_[row]++] = {cosine, slot};
    if (count_[row] < room_) return;
    keep_best(row);
    bar = list_[row * room_ + k_ - 1].cosine;
  }

  void keep_best(int64_t row) {
    if (count_[row] <= k_) return;
    Candidate<T>* list = list_.get() + row * room_;
    std::nth_element(list, list + k_ - 1, list + count_[row]);
    count_[row] = k_;
  }

 private:
  static int64_t room(int64_t k, int64_t slots) { return min_of(2 * k + 64, slots + 1); }

  int64_t k_, room_;
  Buffer<int64_t> count_;
  Buffer<Candidate<T>> list_;
};

// A thread's bars: k slots that it has met had at least this cosine. It meets the slots in ascending order, so one that
// only equals the bar loses to those before it, whatever chunk they belong to. The rows that fill up a panel take none.
template <class T>
inline Buffer<T> lowest_bars(int64_t batch, int64_t padded) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  return per_row<T>(batch, padded, infinity, [](int64_t) { return -infinity; });
}

// Adds what exceeds the bars in a panel of cosines [slot][row] to the lists of its rows.
template <class T>
inline void add_panel(const Tile<T>& tile, const Panels<T>& rows, int64_t p, const int64_t* targets, const T* cosines,
                      const Buffer<T>& bars, CandidateLists<T>& lists) {
  for (int64_t t = 0; t < tile.count(); t++)
    for (int v = 0; v < rows.vectors(p); v++) {
      const int64_t first = rows.first(p) + v * lanes<T>;
      const T* of_slot = cosines + t * panel_rows<T> + v * lanes<T>;
      uint32_t above = lane_bits<T>(vload<T>(of_slot) > vload<T>(bars.get() + first));
      for (; above != 0; above &= above - 1) {
        const int64_t lane = std::countr_zero(above), row = first + lane, slot = tile.slot(t);
        if (slot != targets[row]) lists.add(row, of_slot[lane], slot, bars[row]);
      }
    }
}

template <class T>
inline void hardest_negatives_as(const HardestNegatives& in, const Parallel& parallel) {
  const int64_t batch = in.x.rows, dim = in.x.cols, capacity = in.prototypes.rows;
  const T* x = static_cast<const T*>(in.x.data);
  const Panels<T> rows = pack_rows(x, batch, dim, T(1), parallel);
  const Buffer<int64_t> targets = valid_targets(in.targets, capacity, padded_rows<T>(batch));

  // The selection is exact however the memory is cut; lists cost memory per chunk.
  const int64_t padded = padded_rows<T>(batch);
  const Cut cut(capacity, tile_slots<T>(dim), 4 * parallel.threads(), CandidateLists<T>::bytes(padded, in.k, capacity),
                int64_t{32} << 20, rows.count, parallel.threads());
  std::vector<CandidateLists<T>> lists;
  for (int64_t c = 0; c < cut.chunks; c++) lists.emplace_back(padded, in.k, cut.chunk_slots);
  stream_memory<T>(
      cut, in.prototypes, in.normalize, rows.count, parallel,
      [&](int64_t j) { return in.occupied == nullptr || in.occupied[j]; },
      [&] { return lowest_bars<T>(batch, padded); },
      [&](const Buffer<T>& bars, const Tile<T>& tile, T* cosines, int64_t chunk, int64_t p) {
        tile.products(rows.panel(p), rows.vectors(p), cosines);
        add_panel(tile, rows, p, targets.get(), cosines, bars, lists[chunk]);
      });

  parallel.each(
      batch, [&] { return Buffer<Candidate<T>>(cut.chunks * in.k); },
      [&](const Buffer<Candidate<T>>& best, int64_t i) {
        int64_t found = 0;
        for (int64_t c = 0; c < cut.chunks; c++) {
          lists[c].keep_best(i);
          found = std::copy_n(lists[c].list(i), lists[c].count(i), best.get() + found) - best.get();
        }
        const int64_t kept = min_of(found, in.k);
        std::partial_sort(best.get(), best.get() + kept, best.get() + found);
        const bool broken = !is_finite(x + i * dim, dim);
        for (int64_t k = 0; k < in.k; k++) {
          const bool there = k < kept && !broken;
          in.slots[i * in.k + k] = there ? best[k].slot : -1;
          static_cast<T*>(in.cosines)[i * in.k + k] = there    ? best[k].cosine
                                                      : broken ? std::numeric_limits<T>::quiet_NaN()
                                                               : -std::numeric_limits<T>::infinity();
        }
      });
}

inline void hardest_negatives(const HardestNegatives& in, const Parallel& parallel) {
  in.x.dtype == Dtype::float64 ? hardest_negatives_as<double>(in, parallel) : hardest_negatives_as<float>(in, parallel);
}

template <class T>
inline void hardest_negatives_backward_as(const HardestNegativesBackward& in, const Parallel& parallel) {
  const int64_t dim = in.x.cols;
  const T* grad = static_cast<const T*>(in.grad);
  parallel.each(
      in.x.rows, [&] { return RowReader<T>(in.prototypes, in.normalize); },
      [&](const RowReader<T>& reader, int64_t i) {
        T* to = static_cast<T*>(in.grad_x) + i * dim;
        std::fill_n(to, dim, T(0));
        for (int64_t k = i * in.k; k < (i + 1) * in.k; k++)
          if (in.slots[k] >= 0) add_scaled(to, grad[k], reader.read(in.slots[k]), dim);
      });
  if (in.grad_prototypes)
    scatter_rows(in.grad_prototypes, in.prototypes, in.normalize, static_cast<const T*>(in.x.data), in.slots, grad,
                 in.x.rows, in.k, parallel);
}

inline void hardest_negatives_backward(const HardestNegativesBackward& in, const Parallel& parallel) {
  in.x.dtype == Dtype::float64 ? hardest_negatives_backward_as<double>(in, parallel)
                               : hardest_negatives_backward_as<float>(in, parallel);
}

}  // namespace protomem::PROTOMEM_ISA
