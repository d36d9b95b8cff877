// hardest_negatives on the CPU: the exact k largest cosines of each sample to the memory, no B x M logits.
//
// With cos_ij = x_i . w_j, row i keeps a list of candidates (cos_ij, j) per chunk of the memory, and a bar per thread:
// the k-th best of what the thread has met. The memory is streamed in tiles (stream.h, one product, 2 B M D operations,
// 4 M D bytes read); a panel of cosines is compared with the bars while it lies in L1 and only what exceeds them is
// appended. A full list is cut down to its k best, which raises the bar. On data in random order each thread appends
// some k (1 + ln(slots / k)) candidates per row (1,000 of 100,000 for k = 64 and two threads: a tenth of the product's
// time); in the worst order (ascending) it stays linear in M.
//
// The usual two-level way (a maximum per row and tile, then the best tiles once more) reads the memory in part a second
// time and stores B M / 128 maxima; this one does neither.
//
// The result is exact and does not depend on the cut into chunks or on threads: a cosine is one chain of additions over
// d wherever its slot falls, and ties go to the lower slot. A cosine that is NaN is never chosen; a sample with a
// non-finite entry gets (NaN, -1).
//
// Backward touches the B k chosen rows only.
#pragma once

#include "../views.h"
#include "base/parallel.h"

namespace protomem {

struct HardestNegatives {
  Matrix x;                        // (B, D) float32 or float64, contiguous; its dtype is "acc"
  Matrix prototypes;               // (M, D) any floating
  Vector targets;                  // (B,) int32 or int64
  const bool* occupied = nullptr;  // (M,), or null: all
  int64_t k = 0;
  bool normalize = false;    // scale prototypes to unit length first
  void* cosines = nullptr;   // (B, k) acc, descending; -inf where there are fewer
  int64_t* slots = nullptr;  // (B, k); -1 where there are fewer
};

struct HardestNegativesBackward {
  const void* grad = nullptr;  // (B, k) acc
  Matrix x;
  Matrix prototypes;
  const int64_t* slots = nullptr;  // (B, k)
  int64_t k = 0;
  bool normalize = false;
  void* grad_x = nullptr;  // (B, D) acc
  Matrix grad_prototypes;  // (M, D) contiguous, in the dtype of the prototypes; or null: not wanted
};

}  // namespace protomem
