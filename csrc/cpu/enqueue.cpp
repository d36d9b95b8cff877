#include "enqueue.h"

#include <string>
#include <tuple>

#include "base/tensors.h"
#include "capability.h"

namespace protomem {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> enqueue(const Tensor& memory_prototypes, const Tensor& memory_identities,
                                                   const Tensor& stamps, const Tensor& cursor, const Tensor& clock,
                                                   const Tensor& prototypes, const Tensor& identities,
                                                   double refresh_ratio, const std::string& policy,
                                                   bool keep_previous) {
  const int64_t rows = identities.size(0), dim = memory_prototypes.size(1);
  const bool aliased = prototypes.numel() > 0 && overlap(prototypes, memory_prototypes);
  const Tensor own_prototypes = aliased ? torch::stable::clone(prototypes) : prototypes;
  Tensor slots = empty({rows}, ScalarType::Long), evicted = empty({rows}, ScalarType::Long);
  Tensor known = empty({rows}, ScalarType::Bool);
  Tensor previous = keep_previous ? empty({rows, dim}, memory_prototypes.scalar_type())
                                  : empty({0, 0}, memory_prototypes.scalar_type());
  kernels().enqueue(
      {
          mutable_matrix(memory_prototypes, "memory_prototypes"),
          mutable_vector(memory_identities, "memory_identities"),
          mutable_vector(stamps, "stamps"),
          mutable_array<int64_t>(cursor, "cursor").data,
          mutable_array<int64_t>(clock, "clock").data,
          matrix(own_prototypes, "prototypes"),
          vector(identities, "identities"),
          refresh_ratio,
          policy == "lru",
          mutable_array<int64_t>(slots, "slots"),
          mutable_array<int64_t>(evicted, "evicted"),
          mutable_array<bool>(known, "known"),
          keep_previous ? mutable_matrix(previous, "previous") : Matrix{},
      },
      parallel());
  return {slots, evicted, known, previous};
}

STABLE_TORCH_LIBRARY_IMPL(protomem_cpu, CPU, m) { m.impl("enqueue_", TORCH_BOX(&enqueue)); }

}  // namespace
}  // namespace protomem
