// The stream that the operators on batch x memory share: rows of one side stay in registers, the other side passes by.
//
// With r_i the R resident rows of a block and s_j the streamed rows (D numbers each), per tile of TILE streamed rows
//
//     v_ij = r_i . s_j                         the first product, if the operator wants one
//     p_ij = Task::weigh(v_ij)                 the operator: exponentials, maxima, logits; exact float32
//     m_i += sum_j p_ij s_j                    the second product, if the operator wants one
//
// negative_logsumexp keeps samples resident and streams the memory (m is the embeddings' gradient); its backward keeps
// slots resident and streams the batch (m is the slots' gradient, complete when written). Without the first product
// nothing is resident but m, and p is what the operator loads.
//
// **Who computes what.** A block has ACROSS x DOWN warps. Warp (a, d) owns the rows d of WARP_ROWS and the columns a of
// WARP_COLUMNS, in both products: it multiplies its columns of r with its columns of s, ACROSS such parts of v are
// added up through shared memory in the order of a, and it accumulates its columns of m. So a warp meets the same R x D
// numbers in every tile, and they stay where the tensor cores want them, in registers: 64 a thread, beside 64 of m, at
// 32 rows of 64 columns a warp. Were they in shared memory, reading them again and again would cost more of its
// bandwidth than all the rest; so it is left to the tiles, three of which are in flight.
//
// **Per tile** (bfloat16, D = 512, 32 x 32, 8 warps): 32 KiB arrive by cp.async, 16 bytes at a time; 3 x 1 MFLOP (x is
// high + low, so the first product counts twice); a warp issues 96 mma, 24 ldmatrix and 8 cp.async a thread; 64 KiB of
// parts of v go through shared memory. Two barriers. In all, every block of R rows reads the streamed side once.
//
// **Products.** bfloat16 and float16 as they are (exact in float32, m16n8k16); a float32 resident side is cut into
// TERMS such numbers. float32 through tf32 (m16n8k8), a b = a_h b_h + a_h b_l + a_l b_h with a_h = a rounded to 11 bits
// and a_l the rest, cut to 11: left out are a_l b_l, 2^-22 of |a b| at most, and what a_l and b_l lose, 2^-23 each, of
// either sign. Both have the same layout of bytes, 32 of columns per step, so one body serves them.
//
// **Swizzle.** Rows of a tile are 16-byte chunks; chunk c of row i lies at place c ^ (i mod 8), so that eight rows of
// one chunk, which is what ldmatrix reads, lie in eight different bank groups, and so do the eight columns of four row
// pairs that the second product reads of float32.
//
// Deterministic: every sum has one fixed order. No atomics. Idea of accumulating the second product next to the first:
// flash attention (Dao et al., arXiv 2205.14135); of resident registers split over the depth: ours.
#pragma once

#include "factors.cuh"
#include "warp.cuh"

namespace protomem::cuda {

// How the blocks of a kernel are cut. See above; TILE is at most 32. ALIGNED: the streamed rows can be copied 16 bytes
// at a time (unit column stride, every row on a multiple of 16 bytes); else element by element, with any strides.
template <class Element_, int WARP_ROWS_, int WARP_COLUMNS_, int ACROSS_, int DOWN_, int TILE_, int STAGES_,
          bool ALIGNED_>
struct Shape {
  using Element = Element_;
  static constexpr bool ALIGNED = ALIGNED_;
  static constexpr int WARP_ROWS = WARP_ROWS_, WARP_COLUMNS = WARP_COLUMNS_, ACROSS = ACROSS_, DOWN = DOWN_;
  static constexpr int TILE = TILE_, STAGES = STAGES_;
  static constexpr int ROWS = DOWN * WARP_ROWS, COLUMNS = ACROSS * WARP_COLUMNS;  // COLUMNS: D, padded
  static constexpr int THREADS = 32 * ACROSS * DOWN;
  static constexpr int PER_ROW = THREADS / ROWS;                          // threads that weigh one row of a tile
  static constexpr int OWN = TILE / PER_ROW;                              // numbers that each of them weighs
  static constexpr int GROUP = OWN < 4 ? OWN : 4;                         // of which so many lie side by side
  static constexpr int STEPS = WARP_COLUMNS * int(sizeof(Element)) / 32;  // of the tensor cores through its columns
  static constexpr int TILE_STEPS = TILE * int(sizeof(Element)) / 32;
  static_assert(STEPS % 2 == 0 && WARP_ROWS % 16 == 0 && TILE % 8 == 0 && TILE_STEPS >= 1 && TILE <= 32);
  static_assert(PER_ROW * OWN == TILE && 32 % PER_ROW == 0 && STAGES >= 2);
};

// The streamed rows, in TERMS matrices whose sum they are.
struct Streamed {
  const void* data = nullptr;
  int64_t row_stride = 0, column_stride = 1, term_stride = 0;
};

// Shared memory of a block, in bytes and in this order.
template <class Task>
struct Layout {
  using S = typename Task::Shape;
  static constexpr int ELEMENT = sizeof(typename S::Element);
  static constexpr int STAGE_ROWS = S::TILE * Task::STREAMED_TERMS;
  static constexpr int TILES = S::STAGES * STAGE_ROWS * S::COLUMNS * ELEMENT;
  static constexpr int PARTS = S::ACROSS * S::ROWS * (Task::FIRST ? S::TILE : 1) * 4;
  static constexpr int WEIGHTS = Task::SECOND ? S::ROWS * S::TILE * ELEMENT : 0;
  static constexpr int FACTORS = S::ROWS * 4;
  static constexpr int BYTES = TILES + PARTS + WEIGHTS + FACTORS + S::STAGES * 4;
};

// The kernel's body. A Task is constructed by each thread for the row that it weighs, and has
// - Args, Shape, FIRST and SECOND (whether there are these products), ALWAYS_ALIGNED (no other shapes are wanted);
// - RESIDENT_TERMS, STREAMED_TERMS: in the first product; the second takes the first of the streamed ones;
// - resident(row, column): a number of the resident side, 0 outside;
// - streams(j): whether the streamed row j takes part; it counts as zeros otherwise;
// - prepare(j, column_of): fetch what belongs to streamed rows; j is the tile's first one;
// - weigh(values, present, column_of): turn the thread's products (zeros without FIRST) into weights; returns what m
//   shrinks by first;
// - close(): after the last tile;
// - projects(): whether `store` is to know along = m . r, for each row;
// - store(row, column, m, m', along): for two neighbouring columns.
template <class Task>
DEVICE void stream(const typename Task::Args& args) {
  using S = typename Task::Shape;
  using L = Layout<Task>;
  using T = typename S::Element;
  using F = Factor<T>;
  constexpr int E = sizeof(T), PER_CHUNK = 16 / E, CHUNKS = S::COLUMNS * E / 16, WARP_CHUNKS = S::WARP_COLUMNS * E / 16;
  constexpr int ROW_TILES = S::WARP_ROWS / 16, SLOT_TILES = S::TILE / 8, COLUMN_TILES = S::WARP_COLUMNS / 8;
  constexpr int TERMS = Task::RESIDENT_TERMS;

  DYN_SMEM(shared);
  T* tiles = reinterpret_cast<T*>(shared);
  float* parts = reinterpret_cast<float*>(shared + L::TILES);
  T* weights = reinterpret_cast<T*>(shared + L::TILES + L::PARTS);
  float* factors = reinterpret_cast<float*>(shared + L::TILES + L::PARTS + L::WEIGHTS);
  uint32_t* present = reinterpret_cast<uint32_t*>(shared + L::TILES + L::PARTS + L::WEIGHTS + L::FACTORS);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int across = warp % S::ACROSS, down = warp / S::ACROSS;
  const int group = lane / 4, pair = lane % 4;  // a fragment's row and its two columns
  const int64_t first_row = int64_t(blockIdx.x) * S::ROWS;
  const int own_row = thread / S::PER_ROW, own_column = thread % S::PER_ROW * S::GROUP;

  Task task(args, first_row, own_row);
  const int64_t first = task.first(), last = task.last();
  const int tile_count = static_cast<int>((last - first + S::TILE - 1) / S::TILE);

  // Columns j of a thread's own row are own_column + j, group after group.
  auto column_of = [&](int j) { return j / S::GROUP * (S::GROUP * S::PER_ROW) + own_column + j % S::GROUP; };
  // Parts lie row by row; this much is added to a column, modulo TILE, so that fragments go to different banks.
  auto twist = [](int row) { return row / (32 / S::TILE) % (S::TILE / 8) * 8; };

  // Tiles are asked for two or more ahead; whether their rows take part, one ahead of that (lane l: row l of a tile).
  auto look = [&](int tile) {
    const int64_t j = first + int64_t(tile) * S::TILE + lane;
    return lane < S::TILE && j < last && task.streams(j);
  };
  auto fetch = [&](int tile, bool takes_part) {
    if (tile < tile_count) {
      const int stage = tile % S::STAGES;
      const uint32_t bits = __ballot_sync(all_lanes, takes_part);
      if (thread == 0) present[stage] = bits;
      // A thread copies one chunk of every TOGETHER-th row.
      constexpr int TOGETHER = S::THREADS / CHUNKS;
      static_assert(S::THREADS % CHUNKS == 0 && S::TILE % TOGETHER == 0);
      const Streamed& from = task.streamed();
      const int own = computed_here(thread), own_chunk = own % CHUNKS, own_row = own / CHUNKS;
      const int column = own_chunk * PER_CHUNK, count = min(max(task.dim() - column, 0), PER_CHUNK);
      const T* start = static_cast<const T*>(from.data) + (first + int64_t(tile) * S::TILE + own_row) * from.row_stride;
      start += column * from.column_stride;
      T* to = tiles + stage * L::STAGE_ROWS * S::COLUMNS;
#pragma unroll
      for (int term = 0; term < Task::STREAMED_TERMS; term++) {
        const T* row = start + term * from.term_stride;
        auto copy = [&](int j) {
          T* chunk = to + swizzled<T, CHUNKS>(term * S::TILE + j + own_row, own_chunk);
          const int kept = bits >> (j + own_row) & 1u ? count : 0;
          if constexpr (S::ALIGNED) {
            // A good address even where nothing is read.
            cp_async_16(chunk, kept > 0 ? row : from.data, kept * E);
          } else {
            Vector16<T> values;
#pragma unroll
            for (int i = 0; i < PER_CHUNK; i++) values[i] = i < kept ? row[i * from.column_stride] : narrow<T>(0.0f);
            store_16(chunk, values);
          }
          row += TOGETHER * from.row_stride;
        };
        if constexpr (S::ALIGNED) {
#pragma unroll
          for (int j = 0; j < S::TILE; j += TOGETHER) copy(j);
        } else {
#pragma unroll 1
          for (int j = 0; j < S::TILE; j += TOGETHER) copy(j);
        }
      }
    }
    cp_async_commit();  // a group per tile, empty past the last one: waiting counts groups
  };

  uint32_t resident[TERMS][ROW_TILES][S::STEPS][4];
  if constexpr (Task::FIRST) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int k = 0; k < S::STEPS; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int64_t row = first_row + down * S::WARP_ROWS + m * 16 + group + i % 2 * 8;
          const int column = across * S::WARP_COLUMNS + (k * 2 + i / 2) * PER_CHUNK + pair * (4 / E);
          float rest[4 / E];
#pragma unroll
          for (int n = 0; n < 4 / E; n++) rest[n] = task.resident(row, column + n);
#pragma unroll
          for (int term = 0; term < TERMS; term++) resident[term][m][k][i] = F::cut(rest);
        }
      }
    }
  }

  float moment[ROW_TILES][COLUMN_TILES][4] = {};
  bool ahead = look(0);
  for (int tile = 0; tile < S::STAGES - 1; tile++) {
    fetch(tile, ahead);
    ahead = look(tile + 1);
  }
  cp_async_wait<S::STAGES - 2>();
  __syncthreads();

  for (int tile = 0; tile < tile_count; tile++) {
    const int stage = tile % S::STAGES;
    const T* streamed = tiles + stage * L::STAGE_ROWS * S::COLUMNS;
    const int lane = computed_here(threadIdx.x) % 32;  // addresses cost less to compute than to keep
    task.prepare(first + int64_t(tile) * S::TILE, column_of);

    if constexpr (Task::FIRST) {
      float acc[ROW_TILES][SLOT_TILES][4] = {};
#pragma unroll
      for (int k = 0; k < S::STEPS; k += 2) {  // two steps: an ldmatrix fetches 64 bytes of eight streamed rows
        uint32_t b[L::STAGE_ROWS / 8][4];
#pragma unroll
        for (int n = 0; n < L::STAGE_ROWS / 8; n++) {
          ldmatrix_x4(b[n], streamed + swizzled<T, CHUNKS>(n * 8 + lane % 8, across * WARP_CHUNKS + k * 2 + lane / 8));
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          typename F::A a[TERMS][ROW_TILES];
#pragma unroll
          for (int term = 0; term < TERMS; term++) {
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) a[term][m] = F::a(resident[term][m][k + half]);
          }
#pragma unroll
          for (int n = 0; n < L::STAGE_ROWS / 8; n++) {
            const typename F::B factor = F::b(b[n][2 * half], b[n][2 * half + 1]);
#pragma unroll
            for (int term = TERMS - 1; term >= 0; term--) {  // small terms first
#pragma unroll
              for (int m = 0; m < ROW_TILES; m++) F::multiply(acc[m][n % SLOT_TILES], a[term][m], factor);
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int n = 0; n < SLOT_TILES; n++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int row = down * S::WARP_ROWS + m * 16 + group + half * 8;
            float* to = parts + (across * S::ROWS + row) * S::TILE + ((n * 8 + pair * 2) ^ twist(row));
            *reinterpret_cast<float2*>(to) = make_float2(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
          }
        }
      }
    }
    __syncthreads();  // the parts are there; and nobody reads the tile before this one any more

    fetch(tile + S::STAGES - 1, ahead);
    ahead = look(tile + S::STAGES);
    float value[S::OWN] = {};
    if constexpr (Task::FIRST) {
#pragma unroll
      for (int part = 0; part < S::ACROSS; part++) {
#pragma unroll
        for (int j = 0; j < S::OWN; j += S::GROUP) {
          float own[S::GROUP];
          load_neighbours(own, parts + (part * S::ROWS + own_row) * S::TILE + (column_of(j) ^ twist(own_row)));
#pragma unroll
          for (int i = 0; i < S::GROUP; i++) value[j + i] += own[i];
        }
      }
    }
    const float factor = task.weigh(value, present[stage], column_of);
    if constexpr (Task::SECOND) {
#pragma unroll
      for (int j = 0; j < S::OWN; j++) {
        const int place = F::place(column_of(j));
        weights[swizzled<T, S::TILE * E / 16>(own_row, place / PER_CHUNK) + place % PER_CHUNK] = narrow<T>(value[j]);
      }
      if (task.shrinks() && own_column == 0) factors[own_row] = factor;
    }
    if constexpr (S::STAGES > 2) {  // the next tile is there, as far as this thread copied,
      cp_async_wait<S::STAGES - 2>();
    }
    __syncthreads();  // and for the others; the weights are there, and the parts can be written again

    if constexpr (Task::SECOND) {
      if (task.shrinks()) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
          const int row = down * S::WARP_ROWS + m * 16 + group;
          const float upper = factors[row], lower = factors[row + 8];
          if (__any_sync(all_lanes, upper != 1.0f || lower != 1.0f)) {
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
              for (int i = 0; i < 4; i++) moment[m][n][i] *= i < 2 ? upper : lower;
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k < S::TILE_STEPS; k++) {
        typename F::A a[ROW_TILES];
#pragma unroll
        for (int m = 0; m < ROW_TILES; m++) {
          uint32_t raw[4];
          const int row = down * S::WARP_ROWS + m * 16 + lane % 16;
          ldmatrix_x4(raw, weights + swizzled<T, S::TILE * E / 16>(row, k * 2 + lane / 16));
          a[m] = F::a(raw);
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n += 2) {
          uint32_t b[4];
          F::template transposed<CHUNKS>(b, streamed, k, across * S::WARP_COLUMNS + n * 8, lane);
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const typename F::B factor_b = F::b(b[2 * half], b[2 * half + 1]);
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++) F::multiply(moment[m][n + half], a[m], factor_b);
          }
        }
      }
    }
    if constexpr (S::STAGES == 2) {  // the other stage was asked for only a moment ago
      cp_async_wait<0>();
      __syncthreads();
    }
  }

  task.close();
  if constexpr (Task::SECOND) {
    if (task.projects()) {  // each warp its columns, then the warps in order
      __syncthreads();      // the last parts have been read
#pragma unroll
      for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int row = down * S::WARP_ROWS + m * 16 + group + half * 8;
          float sum = 0;
#pragma unroll
          for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
              sum += moment[m][n][2 * half + i] *
                     task.resident(first_row + row, across * S::WARP_COLUMNS + n * 8 + pair * 2 + i);
            }
          }
          sum = warp_sum<4>(sum);
          if (pair == 0) parts[across * S::ROWS + row] = sum;
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = down * S::WARP_ROWS + m * 16 + group + half * 8;
        float along = 0;
        if (task.projects()) {
#pragma unroll
          for (int part = 0; part < S::ACROSS; part++) along += parts[part * S::ROWS + row];
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
          task.store(first_row + row, across * S::WARP_COLUMNS + n * 8 + pair * 2, moment[m][n][2 * half],
                     moment[m][n][2 * half + 1], along);
        }
      }
    }
  }
}

// What tasks have in common whose resident rows are samples, while the memory passes by. Args has batch, capacity, dim,
// x, targets, occupied, inverse_ptr (1 / |w|, or null), prototypes (Streamed) and per_split: the slots, a multiple of
// every tile, that one row of blocks streams.
template <class Shape_, class Args_>
struct SamplesTask {
  using Shape = Shape_;
  using T = typename Shape::Element;
  using Args = Args_;
  static constexpr int STREAMED_TERMS = 1;
  static constexpr bool ALWAYS_ALIGNED = false;

  const Args& args;
  int64_t row, target = -1;

  DEVICE SamplesTask(const Args& args_, int64_t first_row, int own_row) : args(args_), row(first_row + own_row) {
    if (row < args.batch) target = args.targets[row];
  }
  DEVICE int64_t first() const { return blockIdx.y * args.per_split; }
  DEVICE int64_t last() const {
    return first() + args.per_split < args.capacity ? first() + args.per_split : args.capacity;
  }
  DEVICE const Streamed& streamed() const { return args.prototypes; }
  DEVICE int dim() const { return args.dim; }
  DEVICE bool streams(int64_t slot) const { return args.occupied.data == nullptr || args.occupied[slot]; }
  DEVICE float resident(int64_t i, int column) const {
    return i < args.batch && column < args.dim ? Factor<T>::LIFT * args.x(i, column) : 0.0f;
  }
  // 1 / |w| of the thread's slots of the tile that begins at `slot`; 1 where prototypes are taken as they are.
  template <class Columns>
  DEVICE void load_inverses(float (&inverse)[Shape::OWN], int64_t slot, Columns column_of) const {
#pragma unroll
    for (int j = 0; j < Shape::OWN; j++) {
      const int64_t at = slot + column_of(j);
      inverse[j] = args.inverse_ptr == nullptr ? 1.0f : at < args.capacity ? args.inverse_ptr[at] : 0.0f;
    }
  }
};

}  // namespace protomem::cuda
