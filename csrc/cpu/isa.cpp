// Every kernel, compiled once per instruction set: the build sets PROTOMEM_ISA to baseline, avx2 or avx512 and passes
// the compiler's flags for it. Whatever is defined here must be in namespace protomem::PROTOMEM_ISA, or static: of a
// function that several files define, the linker keeps any one, perhaps one that the machine cannot run.
//
// A new kernel adds an #include, and a line to the table in the order of struct Kernels.
#include "kernels.h"

#include "aggregate_prototypes.kernel.h"
#include "base/simd.h"
#include "enqueue.kernel.h"
#include "hardest_negatives.kernel.h"
#include "margin_softmax_logits.kernel.h"
#include "negative_logsumexp.kernel.h"

#if defined(__AVX512F__)
#define PROTOMEM_CAPABILITY "avx512"
#elif defined(__AVX2__)
#define PROTOMEM_CAPABILITY "avx2"
#else
#define PROTOMEM_CAPABILITY "default"
#endif

#define PROTOMEM_JOIN(a, b) a##b
#define PROTOMEM_TABLE_OF(isa) PROTOMEM_JOIN(kernels_, isa)

namespace protomem {

const Kernels& PROTOMEM_TABLE_OF(PROTOMEM_ISA)() {
  static constexpr Kernels table = {
      PROTOMEM_CAPABILITY,
      PROTOMEM_ISA::vector_bytes,
      PROTOMEM_ISA::group_samples,
      PROTOMEM_ISA::aggregate_prototypes,
      PROTOMEM_ISA::aggregate_prototypes_backward,
      PROTOMEM_ISA::enqueue,
      PROTOMEM_ISA::negative_logsumexp,
      PROTOMEM_ISA::negative_logsumexp_backward,
      PROTOMEM_ISA::hardest_negatives,
      PROTOMEM_ISA::hardest_negatives_backward,
      PROTOMEM_ISA::margin_softmax_logits,
      PROTOMEM_ISA::margin_softmax_logits_backward,
  };
  return table;
}

}  // namespace protomem
