// negative_logsumexp on the CPU.
//
// What is computed, h, n, o and dL/dw, is derived in protomem_kernels/backends/reference/negative_logsumexp.py.
//
// Forward. The memory is cut into chunks, each streamed in tiles (stream.h); a chunk keeps its own sum and moment
// sum_j e^{s h - shift} h' w_j per row, and chunks are added in order at the end. The cut depends on B, M and D alone,
// hence so does the result, whatever the number of threads. Per tile and row panel the logits go from the first product
// through exp into the second one without leaving L1. Sum and embeddings' gradient cost two products, 4 B M D
// operations, and 4 M D bytes of reading; besides outputs and the packed batch there are the chunks' moments (at most
// 16 MiB, or one batch) and a tile per thread.
//
// The exponents need no running maximum where the caller has found a constant `offset` that keeps all of them in range;
// otherwise each row keeps its maximum, and what has been summed is rescaled when that rises.
//
// Backward, for the prototypes: class-stationary. Tiles are independent; each takes its probabilities from what forward
// kept, or forms them again from n, and multiplies them with the batch. One product for samples that were kept, two for
// the others; nothing is added up across tiles, no atomics. What forward keeps of a slot lies in the row of memory that
// will be its gradient: a tile's probabilities are read before its gradient is written, so that keeping up to D samples
// takes no memory of its own.
//
// With `negatives` given only those slots count: rows are gathered, no product is formed.
#pragma once

#include "../views.h"
#include "base/parallel.h"

namespace protomem {

struct LogsumexpInputs {
  Matrix x;           // (B, D) float32 or float64, contiguous; its dtype is that of the accumulation ("acc")
  Matrix prototypes;  // (M, D) any floating
  Vector targets;     // (B,) int32 or int64
  const bool* occupied = nullptr;  // (M,), or null: all
  Matrix negatives;                // (B, k) int64, used if `chosen`
  bool chosen = false;             // only `negatives` count, not all slots
  Vector threshold, coefficients;  // (B,) and (3,) floating, or none
  double scale = 1;
  bool normalize = false;  // scale prototypes to unit length first
  double offset = 0;       // subtracted from all exponents, unless maxima run
  int64_t kept_rows = 0;   // K <= D: see `kept`
};

struct NegativeLogsumexp : LogsumexpInputs {
  bool running = false;         // keep running maxima instead of the offset
  void* cosine = nullptr;       // (B,) acc
  void* n = nullptr;            // (B,) acc
  void* target_rows = nullptr;  // (B, D) acc
  bool with_gradient = false;
  void* o = nullptr;     // (B, D) acc, if with_gradient
  void* kept = nullptr;  // (M, D) acc: in its first K columns e^{s h - offset} h' of the first K samples, 0 at targets
};

struct NegativeLogsumexpBackward : LogsumexpInputs {
  const void* grad_cosine = nullptr;  // (B,) acc
  const void* grad_n = nullptr;       // (B,) acc
  const void* n = nullptr;            // (B,) acc
  Matrix grad_prototypes;  // (M, D) contiguous, in the dtype of the prototypes; holds `kept` before, the result after
};

}  // namespace protomem
