// Streaming the memory past the batch: the three matrix products that every operator on batch x memory is made of.
//
// With x_i (i < B) the rows of the batch and w_j (j < M) the prototypes, the memory is walked in tiles of some hundred
// slots. Per tile, and per panel of `panel_rows` rows of the batch, in the order of use:
//
//   products      S[j][i]  = sum_d w_j[d] x_i[d]        every number one chain of fused multiply-adds over d
//   add_moments   O[d][i] += sum_j w_j[d] E[j][i]       E is made from S while it lies in L1
//   slot_sums     G[j][d]  = sum_i P[j][i] x_i[d]       for the prototypes' gradient
//
// All three are one micro-kernel. Its vector lanes run over the rows of the batch (over d in the third product), the
// other operand is broadcast. So one packed tile serves the first two products, nothing is transposed in an inner
// loop, and a row's result does not depend on its neighbours or on how rows are split over threads: lanes never meet.
//
// Sizes: a tile's packed prototypes live in L2 and a panel of S or E in L1; the panels of the batch stream from L2.
// The memory is read once: 4 D bytes per slot for 4 B D operations (products and add_moments).
#pragma once

#include <numeric>

#include "row_reader.h"

namespace protomem::PROTOMEM_ISA {

// Accumulators of the micro-kernel: `step` x `panel_vectors` vectors, as many as the register file holds.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t step = 8, panel_vectors = 3;  // of 32 registers
#else
constexpr int64_t step = 6, panel_vectors = 2;  // of 16 registers
#endif
template <class T>
constexpr int64_t panel_rows = panel_vectors * lanes<T>;

// c[r][:] = (add ? c[r][:] : 0) + sum_k a_k[r] b[k][:] for r < step and k < count, V vectors wide. The rows of b are
// `panel_rows` apart, those of c `c_row`. a_k[r] = a[k / block * a_block + k % block * a_step + r * a_row]: contiguous
// pieces of `block` values of k.
template <class T, int V>
[[gnu::always_inline]] inline void accumulate(int64_t count, int64_t block, const T* __restrict a, int64_t a_block,
                                              int64_t a_step, int64_t a_row, const T* __restrict b, T* __restrict c,
                                              int64_t c_row, bool add) {
  Vec<T> sum[step][V];
  PROTOMEM_UNROLL
  for (int64_t r = 0; r < step; r++) {
    PROTOMEM_UNROLL
    for (int v = 0; v < V; v++) sum[r][v] = Vec<T>{};
  }
  for (; count > 0; count -= block, a += a_block) {
    const T* from = a;
    for (int64_t k = min_of(block, count); k > 0; k--, from += a_step, b += panel_rows<T>) {
      Vec<T> row[V];
      PROTOMEM_UNROLL
      for (int v = 0; v < V; v++) row[v] = vload<T>(b + v * lanes<T>);
      PROTOMEM_UNROLL
      for (int64_t r = 0; r < step; r++) {
        const Vec<T> factor = broadcast<T>(from[r * a_row]);
        PROTOMEM_UNROLL
        for (int v = 0; v < V; v++) sum[r][v] += factor * row[v];
      }
    }
  }
  PROTOMEM_UNROLL
  for (int64_t r = 0; r < step; r++) {
    PROTOMEM_UNROLL
    for (int v = 0; v < V; v++) {
      T* to = c + r * c_row + v * lanes<T>;
      vstore<T>(to, add ? vload<T>(to) + sum[r][v] : sum[r][v]);
    }
  }
}

// The three uses, each with its strides as constants; `vectors` of the panel hold rows.
enum class Use { products, moments, slot_sums };
template <class T, Use USE, int V>
[[gnu::noinline]] void multiply_panel(int64_t count, const T* a, int64_t a_block, const T* b, T* c, int64_t c_row,
                                      bool add) {
  if constexpr (USE == Use::products) {
    accumulate<T, V>(count, count, a, a_block, step, 1, b, c, c_row, add);
  } else if constexpr (USE == Use::moments) {
    accumulate<T, V>(count, step, a, a_block, 1, step, b, c, c_row, add);
  } else {
    accumulate<T, V>(count, panel_rows<T>, a, a_block, 1, panel_rows<T>, b, c, c_row, add);
  }
}
template <class T, Use USE>
inline void multiply(int vectors, int64_t count, const T* a, int64_t a_block, const T* b, T* c, int64_t c_row,
                     bool add) {
  switch (vectors) {
    case 1: return multiply_panel<T, USE, 1>(count, a, a_block, b, c, c_row, add);
    case 2: return multiply_panel<T, USE, 2>(count, a, a_block, b, c, c_row, add);
    default: return multiply_panel<T, USE, panel_vectors>(count, a, a_block, b, c, c_row, add);
  }
}

// A matrix (N, K) cut into panels of `panel_rows` of its rows, each stored [k][row]; missing rows are zero.
// panels(x): rows of the batch side by side, for products. panels(x^T): for slot_sums.
template <class T>
struct Panels {
  int64_t rows, depth, count;  // N, K, panels
  Buffer<T> data;

  Panels(int64_t rows_, int64_t depth_)
      : rows(rows_),
        depth(depth_),
        count((rows_ + panel_rows<T> - 1) / panel_rows<T>),
        data(count * panel_rows<T> * depth_) {}

  T* panel(int64_t p) const { return data.get() + p * panel_rows<T> * depth; }
  int64_t first(int64_t p) const { return p * panel_rows<T>; }
  int64_t filled(int64_t p) const { return min_of(panel_rows<T>, rows - first(p)); }
  int vectors(int64_t p) const { return static_cast<int>((filled(p) + lanes<T> - 1) / lanes<T>); }
};

// factor * x, x contiguous (B, D), with the lanes over the rows of the batch.
template <class T>
inline Panels<T> pack_rows(const T* x, int64_t batch, int64_t dim, T factor, const Parallel& parallel) {
  Panels<T> packed(batch, dim);
  parallel.each(packed.count, [&](int64_t p) {
    T* to = packed.panel(p);
    const int64_t filled = packed.filled(p);
    for (int64_t r = 0; r < panel_rows<T>; r++) {
      const T* row = x + (packed.first(p) + r) * dim;
      for (int64_t d = 0; d < dim; d++) to[d * panel_rows<T> + r] = r < filled ? factor * row[d] : T(0);
    }
  });
  return packed;
}

// x, contiguous (B, D), with the lanes over d; rows that are not alive(i) are zero.
template <class T, class Alive>
inline Panels<T> pack_columns(const T* x, int64_t batch, int64_t dim, const Alive& alive, const Parallel& parallel) {
  Panels<T> packed(dim, batch);
  parallel.each(packed.count, [&](int64_t p) {
    T* to = packed.panel(p);
    const int64_t filled = packed.filled(p);
    for (int64_t i = 0; i < batch; i++)
      for (int64_t c = 0; c < panel_rows<T>; c++)
        to[i * panel_rows<T> + c] = c < filled && alive(i) ? x[i * dim + packed.first(p) + c] : T(0);
  });
  return packed;
}

// How many slots a tile spans: its packed prototypes take about a quarter of a MiB, its panel of logits fits L1. Whole
// steps, and a row of its logits whole cache lines.
template <class T>
inline int64_t tile_slots(int64_t dim) {
  constexpr int64_t size = sizeof(T), multiple = std::lcm(step, 64 / size);
  const int64_t fitting = (int64_t{1} << 18) / (max_of(dim, 1) * size);
  return round_up(max_of(32, min_of(128, fitting)), multiple);
}

// Some slots of the memory, packed for the micro-kernel: [slot / step][d][slot % step], in T, of unit length if asked.
// Empty slots are passed over, whatever they hold, so a half-empty memory costs half.
template <class T>
class Tile {
 public:
  using Integer = typename Lanes<T>::Integer;

  Tile(const Matrix& prototypes, bool normalize)
      : capacity(tile_slots<T>(prototypes.cols)),
        dim(prototypes.cols),
        padded_dim(round_up(prototypes.cols, step)),
        rows_(prototypes, normalize, step),
        packed_(capacity * padded_dim),
        slots_(capacity) {}

  const int64_t capacity, dim, padded_dim;

  int64_t count() const { return count_; }
  int64_t slot(int64_t t) const { return slots_[t]; }

  // Where a slot stands in the tile, or -1.
  int64_t find(int64_t slot) const {
    if (count_ == 0 || slot < slots_[0] || slot > slots_[count_ - 1]) return -1;
    int64_t low = 0, high = count_ - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      (slots_[middle] < slot ? low : high) = slots_[middle] < slot ? middle + 1 : middle;
    }
    return slots_[low] == slot ? low : -1;
  }

  // Takes the next slots of [from, to) for which present(slot), at most `capacity`; returns where to go on.
  template <class Present>
  int64_t take(int64_t from, int64_t to, const Present& present) {
    for (count_ = 0; from < to && count_ < capacity; from++)
      if (present(from)) slots_[count_++] = from;
    return from;
  }

  // Reads the prototypes of the slots, for products and add_moments.
  void pack() {
    for (int64_t t = 0; t < count_; t += step) pack(t);
  }

  // S[j][i] for the padded count of slots, into out[slot][panel_rows].
  void products(const T* panel, int vectors, T* out) const {
    for (int64_t t = 0; t < count_; t += step)
      multiply<T, Use::products>(vectors, dim, packed_.get() + t * padded_dim, 0, panel, out + t * panel_rows<T>,
                                 panel_rows<T>, false);
  }

  // O[d][i] += sum_j w_j[d] e[j][i], for the padded dim.
  void add_moments(const T* e, int vectors, T* moments) const {
    for (int64_t d = 0; d < padded_dim; d += step)
      multiply<T, Use::moments>(vectors, count_, packed_.get() + d * step, padded_dim * step, e,
                                moments + d * panel_rows<T>, panel_rows<T>, true);
  }

 private:
  void pack(int64_t t) {
    T* to = packed_.get() + t * padded_dim;
    const int64_t filled = min_of(step, count_ - t);
    const T* from[step];
    for (int64_t r = 0; r < step; r++) from[r] = rows_.read(slots_[t + min_of(r, filled - 1)], min_of(r, filled - 1));
    for (int64_t d = 0; d < dim; d++) {
      PROTOMEM_UNROLL
      for (int64_t r = 0; r < step; r++) to[d * step + r] = from[r][d];
    }
    for (int64_t d = dim * step; d < padded_dim * step; d++) to[d] = 0;
  }

  RowReader<T> rows_;
  Buffer<T> packed_;
  Buffer<int64_t> slots_;
  int64_t count_ = 0;
};

// How the memory is cut for the threads: `chunks` of consecutive slots, each with partial results of its own, times
// `groups` of row panels. Where partial results are sums, the number of chunks must not depend on the threads: the
// order of additions would. The groups never matter to a result.
struct Cut {
  int64_t capacity, chunks, chunk_slots, groups;

  // At most `most` chunks, of 512 slots at least and of whole tiles, whose partial results of `bytes` each stay within
  // `budget`.
  Cut(int64_t capacity_, int64_t tile, int64_t most, int64_t bytes, int64_t budget, int64_t panels, int64_t threads)
      : capacity(capacity_),
        chunks(max_of(1, min_of(min_of(most, budget / max_of(bytes, 1)), div_up(capacity, 512)))),
        chunk_slots(round_up(div_up(capacity, chunks), tile)),
        groups(chunks >= 2 * threads || threads == 1 ? 1 : max_of(1, min_of(div_up(4 * threads, chunks), panels / 4))) {
  }

  int64_t first(int64_t chunk) const { return min_of(chunk * chunk_slots, capacity); }
  int64_t first_panel(int64_t group, int64_t panels) const { return panels * group / groups; }
};

// Streams the memory past the panels of the batch: consume(state, tile, scratch, chunk, p) for every tile of the slots
// that are present and every panel p of `panels`; `scratch` holds one panel of the tile's logits, [slot][row]. Each
// thread makes its own state, and meets the slots in ascending order.
template <class T, class Present, class MakeState, class Consume>
inline void stream_memory(const Cut& cut, const Matrix& prototypes, bool normalize, int64_t panels,
                          const Parallel& parallel, const Present& present, const MakeState& make_state,
                          const Consume& consume) {
  struct Worker {
    Tile<T> tile;
    Buffer<T> scratch;
    decltype(make_state()) state;
    Worker(const Matrix& prototypes, bool normalize, const MakeState& make_state)
        : tile(prototypes, normalize), scratch(tile.capacity * panel_rows<T>), state(make_state()) {}
  };
  parallel.each(
      cut.chunks * cut.groups, [&] { return Worker(prototypes, normalize, make_state); },
      [&](Worker& worker, int64_t item) {
        const int64_t chunk = item / cut.groups, group = item % cut.groups;
        const int64_t first = cut.first_panel(group, panels), last = cut.first_panel(group + 1, panels);
        for (int64_t slot = cut.first(chunk); slot < cut.first(chunk + 1);) {
          slot = worker.tile.take(slot, cut.first(chunk + 1), present);
          worker.tile.pack();
          for (int64_t p = first; p < last && worker.tile.count() > 0; p++)
            consume(worker.state, worker.tile, worker.scratch.get(), chunk, p);
        }
      });
}

// The same without a state.
template <class T, class Present, class Consume>
inline void stream_memory(const Cut& cut, const Matrix& prototypes, bool normalize, int64_t panels,
                          const Parallel& parallel, const Present& present, const Consume& consume) {
  stream_memory<T>(
      cut, prototypes, normalize, panels, parallel, present, [] { return 0; },
      [&](int, const Tile<T>& tile, T* scratch, int64_t chunk, int64_t p) { consume(tile, scratch, chunk, p); });
}

// Stores n numbers at `to`, from(i) being the vector that begins with the i-th; whole vectors past the caches if so
// asked, for which `to` must be aligned.
template <class T, class From>
inline void store_vectors(T* to, int64_t n, bool past_cache, const From& from) {
  for (int64_t i = 0; i < n; i += lanes<T>) {
    const int64_t left = min_of(n - i, lanes<T>);
    if (past_cache && left == lanes<T>) {
      vstore_past_cache<T>(to + i, from(i));
    } else {
      vstore_first<T>(to + i, from(i), left);
    }
  }
}

// `size` zeros, written by all threads.
template <class T>
inline Buffer<T> zeroed(int64_t size, const Parallel& parallel) {
  constexpr int64_t block = 1 << 18;
  Buffer<T> buffer(size);
  parallel.each(div_up(size, block), [&](int64_t item) {
    std::fill_n(buffer.get() + item * block, min_of(block, size - item * block), T(0));
  });
  return buffer;
}

}  // namespace protomem::PROTOMEM_ISA
