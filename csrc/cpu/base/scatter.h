// Gradients of few prototypes out of many: rows of the batch added up slot by slot.
#pragma once

#include <algorithm>
#include <cstring>

#include "row_reader.h"

namespace protomem::PROTOMEM_ISA {

// out[j] = sum over the entries (i, k) with slots[i][k] = j of grad[i][k] x_i, in the order of (i, k); 0 where there is
// none. `slots` and `grad` are (batch, count), a negative slot takes no part; `out` (M, D) is contiguous. With
// `normalize`, the gradient goes on to the raw prototypes. The entries are sorted by slot, so every row is written by
// one thread and the order of its sum is fixed.
template <class T>
inline void scatter_rows(const Matrix& out, const Matrix& prototypes, bool normalize, const T* x, const int64_t* slots,
                         const T* grad, int64_t batch, int64_t count, const Parallel& parallel) {
  struct Entry {
    int64_t slot, index;
    bool operator<(const Entry& other) const { return slot != other.slot ? slot < other.slot : index < other.index; }
  };
  Buffer<Entry> entries(batch * count);
  int64_t used = 0;
  for (int64_t index = 0; index < batch * count; index++)
    if (slots[index] >= 0) entries[used++] = {slots[index], index};
  std::sort(entries.get(), entries.get() + used);
  Buffer<int64_t> first(used + 1);  // of every slot's entries
  int64_t distinct = 0;
  for (int64_t e = 0; e < used; e++)
    if (e == 0 || entries[e].slot != entries[e - 1].slot) first[distinct++] = e;
  first[distinct] = used;

  const int64_t dim = prototypes.cols, row_bytes = dim * element_size(out.dtype), block = 1024;
  parallel.each(div_up(out.rows, block), [&](int64_t item) {
    std::memset(static_cast<char*>(out.data) + item * block * row_bytes, 0,
                static_cast<std::size_t>(min_of(block, out.rows - item * block) * row_bytes));
  });
  struct Worker {
    RowReader<T> raw, unit;
    Buffer<T> sum;
  };
  parallel.each(
      distinct, [&] { return Worker{RowReader<T>(prototypes, false), RowReader<T>(prototypes, true), Buffer<T>(dim)}; },
      [&](const Worker& worker, int64_t segment) {
        std::fill_n(worker.sum.get(), dim, T(0));
        for (int64_t e = first[segment]; e < first[segment + 1]; e++)
          add_scaled(worker.sum.get(), grad[entries[e].index], x + entries[e].index / count * dim, dim);
        const int64_t slot = entries[first[segment]].slot;
        if (normalize) unit_backward(worker.sum.get(), worker.raw.read(slot), worker.unit.read(slot), dim);
        store_row(out, slot, worker.sum.get());
      });
}

}  // namespace protomem::PROTOMEM_ISA
