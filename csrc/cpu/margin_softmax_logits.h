// margin_softmax_logits on the CPU: the (B, M) logits themselves.
//
// Column j of sample i holds z_i at i's target (given), s h_ij at a negative (h as in negative_logsumexp), and -inf
// at an empty slot. One product per tile (stream.h); a panel [slot][row] is reshaped in L1 and written out row by row,
// so the 4 B M bytes of output are touched once.
//
// Backward, with G = dL/dlogits read once: H_ij = s G_ij h'_ij (0 at targets and empty slots), then
//   dL/dx_i = sum_j H_ij w_j      dL/dw_j = sum_i H_ij x_i      dL/dz_i = G at the target.
// The slopes h' are 1 without a hard-negative form, and then no cosine is computed again. Chunks of the memory depend
// on B, M and D alone and are added in order: the result does not depend on the number of threads.
#pragma once

#include "../views.h"
#include "base/parallel.h"

namespace protomem {

struct LogitsInputs {
  Matrix x;                        // (B, D) float32 or float64, contiguous; its dtype is "acc"
  Matrix prototypes;               // (M, D) any floating
  Vector targets;                  // (B,) int32 or int64
  const bool* occupied = nullptr;  // (M,), or null: all
  Vector threshold, coefficients;  // (B,) and (3,) floating, or none
  double scale = 1;
  bool normalize = false;  // scale prototypes to unit length first
};

struct MarginSoftmaxLogits : LogitsInputs {
  Vector target_logits;    // (B,) floating
  void* logits = nullptr;  // (B, M) acc, contiguous
};

struct MarginSoftmaxLogitsBackward : LogitsInputs {
  Matrix grad;                         // (B, M) acc, any strides
  void* grad_x = nullptr;              // (B, D) acc
  Matrix grad_prototypes;              // (M, D) contiguous, in the dtype of the prototypes; or null: not wanted
  void* grad_target_logits = nullptr;  // (B,) acc
};

}  // namespace protomem
