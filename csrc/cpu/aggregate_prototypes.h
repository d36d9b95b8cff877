// aggregate_prototypes: the quality-weighted prototype of every identity in a batch, and its backward pass.
//
// e_i (D numbers) is the embedding of sample i < B, q_i its weight, x_i = e_i / |e_i| (or e_i itself without
// `normalize`). For each of the P identities c, over its samples i in batch order,
//
//   mass_c = sum q_i        (if that is 0, every q_i counts as 1 in what follows)
//   m_c = sum q_i x_i       p_c = m_c / |m_c|
//
// p_c is zero, and so is the stored |m_c|, where |m_c| <= 1e-6 sum q_i |x_i| or anything is not finite. Backward, with
// g_c and h_c the gradients of p_c and mass_c,
//
//   t_c = (g_c - (g_c . p_c) p_c) / |m_c|
//   a_i = x_i . t_c
//   de_i = q_i (t_c - a_i x_i) / |e_i|   (q_i t_c without `normalize`)       dq_i = a_i + h_c   (h_c where mass_c = 0)
//
// How: the labels are sorted once (stable radix sort of (label, sample) pairs), which numbers the identities and puts
// each one's samples side by side in batch order. Then every embedding is read from memory once, in that order, fetched
// some rows ahead: the processor cannot guess where the next one lies. Its length and its share of the sum are two
// passes over the row while it lies in L1; m_c grows in a row of scratch, two samples at a time, and is written once.
// Forward reads B D and writes P D numbers, backward reads B D + 2 P D and writes B D; beyond that, some rows per
// thread.
//
// Deterministic: a row of the output belongs to one thread, which adds in batch order; the number of threads changes
// no bit. One identity's samples are never split over threads.
#pragma once

#include "../views.h"
#include "base/parallel.h"

namespace protomem {

// The samples sorted by identity: identity `identities[c]` has the samples order[starts[c]] .. order[starts[c + 1] -
// 1].
struct Groups {
  static int64_t scratch_size(int64_t samples) { return 3 * samples + 1; }
  Groups(int64_t* scratch, int64_t samples)
      : identities(scratch), order(scratch + samples), starts(scratch + 2 * samples) {}

  int64_t count = 0;
  int64_t* identities;  // ascending, none negative
  int64_t* order;
  int64_t* starts;  // count + 1 of them
};

struct AggregateArgs {
  Matrix embeddings;  // (B, D)
  Vector weights;     // (B,), null: all 1
  bool normalize;
  Groups groups;  // from group_samples
  // Outputs of K >= groups.count rows, or of fewer: then the last identities are left out.
  Matrix prototypes;  // (K, D) contiguous, in the accumulation type, like mass and norm
  Array<int64_t> identities;
  Array<int64_t> index;  // (B,)
  Vector mass;
  Vector norm;
};

struct AggregateBackwardArgs {
  Matrix grad_prototypes;  // (K, D)
  Vector grad_mass;        // (K,)
  Matrix embeddings;
  Vector weights;
  Vector index;  // (B,) int64, below K
  Matrix prototypes;
  Vector mass;
  Vector norm;
  bool normalize;
  Matrix grad_embeddings;  // (B, D)
  Vector grad_weights;     // (B,)
};

}  // namespace protomem
