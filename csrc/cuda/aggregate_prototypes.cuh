// aggregate_prototypes: the quality-weighted prototype of every identity in a batch, and its backward pass.
//
// e_i (D numbers) is the embedding of sample i < B, q_i its weight, x_i = e_i / |e_i| (or e_i itself without
// `normalize`). For each identity c, over its samples i in batch order,
//
//   mass_c = sum q_i        (if that is 0, every q_i counts as 1 in what follows)
//   m_c = sum q_i x_i       p_c = m_c / |m_c|
//
// p_c is zero, and so is the stored |m_c|, where |m_c| <= 1e-6 sum q_i |x_i| or anything is not finite. Backward, with
// g_c and h_c the gradients of p_c and mass_c,
//
//   t_c = (g_c - (g_c . p_c) p_c) / |m_c|
//   a_i = x_i . t_c = (x_i . g_c - (g_c . p_c) (x_i . p_c)) / |m_c|
//   de_i = q_i (t_c - a_i x_i) / |e_i|   (q_i t_c without `normalize`)       dq_i = a_i + h_c   (h_c where mass_c = 0)
//
// Two launches forward:
//
// 1. order_kernel: one warp per two samples counts their positions in the stable order of the labels (ranks.cuh). At
// the
//    position of an identity's first sample stand how many samples it has, and a flag; elsewhere 0: a segment.
// 2. sum_kernel: one block per position. Blocks in the middle of a segment end there; the others count the flags before
//    their own (one byte each, 16 at a time), which is their identity's number c: no scan between the launches. Then a
//    tile of samples at a time: each warp measures the length of one sample, and each thread adds up its columns over
//    the tile in batch order. The second read of a row hits the L1 cache.
//
// One launch backward: one warp per sample takes the dot products of e, g and p in one pass, and writes in a second
// one, which hits the L1 cache; p_c and g_c come from L2 but for the first sample of an identity.
//
// Bytes: forward reads B D and writes P D numbers, backward reads B D + 2 P D and writes B D, 16 bytes at a time where
// rows are aligned. FLOPs: 4 B D and 10 B D. Registers hold 8 columns per thread, hence D <= 1024.
//
// Deterministic: one block adds up one identity in batch order; reductions over columns are trees of fixed shape. One
// identity's samples are never split over blocks: a batch of one single identity is walked by one block. Labels,
// weights and an index, whatever they hold, lead to no access out of bounds.
#pragma once

#include "base/ranks.cuh"

namespace protomem::cuda {

constexpr int order_threads = 128, order_rows = 2;  // rows per warp
constexpr int sum_threads = 128;
constexpr int backward_threads = 128;
constexpr int sample_tile = 16;
constexpr int64_t most_columns = columns_per_thread * sum_threads;

// Flags are read 16 at a time.
inline int64_t padded_flags(int64_t B) { return (B + 15) / 16 * 16; }

// `order_ptr` and `length_ptr` have B elements, `head_ptr` padded_flags(B), aligned to 16 bytes.
KERNEL(order_threads)
void order_kernel(Vector labels, int B, int* order_ptr, int* length_ptr, unsigned char* head_ptr, int64_t* index_ptr) {
  const int row = (blockIdx.x * (order_threads / warp_lanes) + warp_index()) * order_rows;
  const int padding = B + static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0 && padding < (B + 15) / 16 * 16) head_ptr[padding] = 0;
  Rank ranks[order_rows];
  rank_rows(labels, B, row, ranks);
#pragma unroll
  for (int r = 0; r < order_rows; r++) {
    if (lane_index() == r && row + r < B) {
      const int position = ranks[r].less + ranks[r].before;
      const bool first = ranks[r].key >= 0 && ranks[r].before == 0;
      order_ptr[position] = row + r;
      length_ptr[position] = first ? ranks[r].equal : 0;
      head_ptr[position] = first;
      index_ptr[row + r] = -1;  // the second launch knows better for all that belong somewhere
    }
  }
}

// The flags among 4 that stand before the first `count` of them end.
DEVICE int flags_before(unsigned flags, int count) {
  return count >= 4 ? __popc(flags) : count <= 0 ? 0 : __popc(flags & ((1u << (8 * count)) - 1));
}

// 1 if there are none, 0 in place of negative and non-finite ones.
template <class A>
DEVICE A weight_of(const Vector& weights, int64_t sample) {
  if (weights.data == nullptr) return A(1);
  const A weight = number_at<A>(weights, sample);
  return weight > 0 && weight < infinity<A> ? weight : A(0);
}

// Outputs have `rows` rows and are contiguous.
template <class T, bool VECTOR>
KERNEL(sum_threads, 8)
void sum_kernel(Matrix embeddings, Vector labels, Vector weights, bool normalize, const int* order_ptr,
                const int* length_ptr, const unsigned char* head_ptr, Accumulator<T>* prototypes_ptr,
                int64_t* identities_ptr, int64_t* index_ptr, Accumulator<T>* mass_ptr, Accumulator<T>* norm_ptr,
                int rows) {
  using A = Accumulator<T>;
  constexpr int WIDTH = width_of<T, VECTOR>, GROUPS = columns_per_thread / WIDTH;
  constexpr A antipodal = A(1e-6);  // |m_c| at or below this share of sum q_i |x_i| has no direction worth keeping
  const int B = static_cast<int>(embeddings.rows), D = static_cast<int>(embeddings.cols);
  const int position = static_cast<int>(blockIdx.x);
  const int length = position < B ? length_ptr[position] : 0;
  if (length == 0 && position >= rows) return;

  int64_t heads = 0;  // in the lower half those before this position, in the upper half all
  for (int at = static_cast<int>(threadIdx.x) * 16; at < B; at += sum_threads * 16) {
    const uint4 flags = bit_cast<uint4>(load_16_readonly(head_ptr + at));
    const int all = __popc(flags.x) + __popc(flags.y) + __popc(flags.z) + __popc(flags.w);
    const int before = flags_before(flags.x, position - at) + flags_before(flags.y, position - at - 4) +
                       flags_before(flags.z, position - at - 8) + flags_before(flags.w, position - at - 12);
    heads += static_cast<int64_t>(all) << 32 | before;
  }
  heads = block_sum<sum_threads>(heads);
  const int number = static_cast<int>(heads & 0xffffffff), count = static_cast<int>(heads >> 32);

  if (position >= count && position < rows) {  // an unused row
    for_own_columns<sum_threads, WIDTH>(D, [&](int, int column) {
      const A zeros[WIDTH] = {};
      store_columns<VECTOR>(prototypes_ptr + static_cast<int64_t>(position) * D, 1, column, zeros);
    });
    if (threadIdx.x == 0) {
      identities_ptr[position] = -1;
      mass_ptr[position] = 0;
      norm_ptr[position] = 0;
    }
  }
  if (length == 0 || number >= rows) return;

  A mass = A(length);
  if (weights.data != nullptr) {
    A partial = 0;
    for (int k = threadIdx.x; k < length; k += sum_threads) partial += weight_of<A>(weights, order_ptr[position + k]);
    mass = block_sum<sum_threads>(partial);
  }
  const bool weighted = mass > 0;
  if (threadIdx.x == 0) mass_ptr[number] = mass;

  SMEM(tile_sample, int[sample_tile]);
  SMEM(tile_scale, A[sample_tile]);
  SMEM(tile_factor, A[sample_tile]);
  SMEM(tile_budget, A[sample_tile]);
  A total[GROUPS][WIDTH] = {};
  A budget = 0;
  for (int start = 0; start < length; start += sample_tile) {
    const int tile = length - start < sample_tile ? length - start : sample_tile;
    __syncthreads();  // the tile before has been added up
    for (int k = warp_index(); k < tile; k += sum_threads / warp_lanes) {
      const int sample = order_ptr[position + start + k];
      const Length<A> size = warp_row_length<VECTOR>(row_of<const T>(embeddings, sample), embeddings.col_stride, D);
      if (lane_index() == 0) {
        tile_sample[k] = sample;
        const A weight = weighted ? weight_of<A>(weights, sample) : A(1);
        const bool zero = size.root == 0;
        const Inverse<A> inverse(normalize && !zero ? size : Length<A>{1, {1, 1}});
        tile_scale[k] = inverse.scale;
        tile_factor[k] = weight * inverse.rest;
        tile_budget[k] = weight * (normalize ? A(!zero) : size.value());
        index_ptr[sample] = number;
      }
    }
    __syncthreads();
    for (int k = 0; k < tile; k++) {
      const T* const row = row_of<const T>(embeddings, tile_sample[k]);
      const A scale = tile_scale[k], factor = tile_factor[k];
      budget += tile_budget[k];
      for_own_columns<sum_threads, WIDTH>(D, [&](int group, int column) {
        A x[WIDTH];
        load_columns<VECTOR>(row, embeddings.col_stride, column, x);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) total[group][i] += x[i] * scale * factor;
      });
    }
  }

  const Length<A> size = block_row_length<sum_threads>(total);
  const A norm = size.value();
  const bool exists = norm < infinity<A> && norm > antipodal * budget;  // false for NaN
  const Inverse<A> inverse(size);
  for_own_columns<sum_threads, WIDTH>(D, [&](int group, int column) {
    A p[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; i++) p[i] = exists ? inverse(total[group][i]) : A(0);
    store_columns<VECTOR>(prototypes_ptr + static_cast<int64_t>(number) * D, 1, column, p);
  });
  if (threadIdx.x == 0) {
    identities_ptr[number] = integer_at(labels, tile_sample[0]);
    norm_ptr[number] = exists ? norm : A(0);
  }
}

// Both gradients of a sample; `grad_prototypes` and `prototypes` have the dtype of accumulation.
template <class T, bool VECTOR>
KERNEL(backward_threads)
void backward_kernel(Matrix grad_prototypes, Vector grad_mass, Matrix embeddings, Vector weights, Vector index,
                     Matrix prototypes, Vector mass, Vector norm, bool normalize, T* grad_embeddings_ptr,
                     Vector grad_weights) {
  using A = Accumulator<T>;
  constexpr int WIDTH = width_of<T, VECTOR>;
  const int D = static_cast<int>(embeddings.cols);
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * (backward_threads / warp_lanes) + warp_index();
  if (sample >= embeddings.rows) return;

  int64_t row = integer_at(index, sample);
  if (row >= prototypes.rows) row = -1;
  const A length = row < 0 ? A(0) : number_at<A>(norm, row);
  const bool lives = length > 0;  // a zero row passes nothing, and its embeddings, finite or not, are not even read
  const bool weighted = row >= 0 && number_at<A>(mass, row) > 0;
  const A q = weighted ? weight_of<A>(weights, sample) : A(1);

  const T* const e_ptr = row_of<const T>(embeddings, sample);
  const A* const p_ptr = row_of<const A>(prototypes, row < 0 ? 0 : row);
  const A* const g_ptr = row_of<const A>(grad_prototypes, row < 0 ? 0 : row);
  // Dot products, with e multiplied by size.scale.down to keep its squares in range.
  Length<A> size = {0, {1, 1}};
  A gp = 0, eg = 0, ep = 0;
  if (lives) {
    size = length_of<A>([&](A scale, A& largest) {
      A ee = 0, most = 0;
      gp = eg = ep = 0;
      for_lane_columns<WIDTH>(D, [&](int column) {
        A e[WIDTH], p[WIDTH], g[WIDTH];
        load_columns<VECTOR>(e_ptr, embeddings.col_stride, column, e);
        load_columns<VECTOR>(p_ptr, prototypes.col_stride, column, p);
        load_columns<VECTOR>(g_ptr, grad_prototypes.col_stride, column, g);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
          most = std::fabs(e[i]) > most ? std::fabs(e[i]) : most;
          const A y = e[i] * scale;
          ee += y * y;
          gp += g[i] * p[i];
          eg += y * g[i];
          ep += y * p[i];
        }
      });
      largest = warp_max(most);
      return warp_sum(ee);
    });
    gp = warp_sum(gp);
    eg = warp_sum(eg);
    ep = warp_sum(ep);
  }
  const bool passes = lives && !(normalize && size.root == 0);  // a zero embedding has no direction
  const Inverse<A> by_length(passes ? length : A(1)), by_size(passes ? size : Length<A>{1, {1, 1}});
  const A along = passes ? by_length(eg - gp * ep) * (normalize ? by_size.rest : size.scale.up) : A(0);
  for_lane_columns<WIDTH>(D, [&](int column) {
    A out[WIDTH] = {};
    if (passes) {
      A e[WIDTH], p[WIDTH], g[WIDTH];
      load_columns<VECTOR>(p_ptr, prototypes.col_stride, column, p);
      load_columns<VECTOR>(g_ptr, grad_prototypes.col_stride, column, g);
      if (normalize) load_columns<VECTOR>(e_ptr, embeddings.col_stride, column, e);
#pragma unroll
      for (int i = 0; i < WIDTH; i++) {
        const A t = by_length(g[i] - gp * p[i]);
        out[i] = q * (normalize ? by_size(t - along * by_size(e[i])) : t);
      }
    }
    store_columns<VECTOR>(grad_embeddings_ptr + sample * D, 1, column, out);
  });

  if (lane_index() == 0) {
    A grad = (weighted ? along : A(0)) + (row < 0 ? A(0) : number_at<A>(grad_mass, row));
    if (weights.data != nullptr) {
      const A given = number_at<A>(weights, sample);
      if (!(given >= 0 && given < infinity<A>)) grad = 0;
    }
    put_number(grad_weights, sample, grad);
  }
}

}  // namespace protomem::cuda
