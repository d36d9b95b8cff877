// The table of kernels. isa.cpp fills one table per instruction set; the glue (<operator>.cpp) turns tensors into
// arguments and calls the table that fits the machine (capability.h). No PyTorch in here.
//
// One operator is three files: <operator>.h (arguments and the design note), <operator>.kernel.h (the body, compiled
// once per instruction set), <operator>.cpp (glue to PyTorch's stable ABI, compiled once).
#pragma once

#include "aggregate_prototypes.h"
#include "base/parallel.h"
#include "enqueue.h"
#include "hardest_negatives.h"
#include "margin_softmax_logits.h"
#include "negative_logsumexp.h"

namespace protomem {

struct Kernels {
  const char* capability;  // "default", "avx2" or "avx512"
  int64_t vector_bytes;
  void (*group_samples)(const Vector& labels, Groups& groups);
  void (*aggregate_prototypes)(const AggregateArgs&, const Parallel&);
  void (*aggregate_prototypes_backward)(const AggregateBackwardArgs&, const Parallel&);
  void (*enqueue)(const EnqueueArgs&, const Parallel&);
  void (*negative_logsumexp)(const NegativeLogsumexp&, const Parallel&);
  void (*negative_logsumexp_backward)(const NegativeLogsumexpBackward&, const Parallel&);
  void (*hardest_negatives)(const HardestNegatives&, const Parallel&);
  void (*hardest_negatives_backward)(const HardestNegativesBackward&, const Parallel&);
  void (*margin_softmax_logits)(const MarginSoftmaxLogits&, const Parallel&);
  void (*margin_softmax_logits_backward)(const MarginSoftmaxLogitsBackward&, const Parallel&);
};

// One per instruction set that the build has (CMakeLists.txt); only capability.cpp calls them.
const Kernels& kernels_baseline();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

}  // namespace protomem
