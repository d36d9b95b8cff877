#include "aggregate_prototypes.h"

#include <tuple>
#include <vector>

#include "base/tensors.h"
#include "capability.h"

namespace protomem {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& labels,
                                                           const OptionalTensor& weights, bool normalize,
                                                           std::optional<int64_t> max_identities) {
  const int64_t batch = labels.size(0);
  std::vector<int64_t> scratch(Groups::scratch_size(batch));
  Groups groups(scratch.data(), batch);
  kernels().group_samples(vector(labels, "labels"), groups);

  const int64_t rows = max_identities.value_or(groups.count);
  const ScalarType dtype = accumulation_type(embeddings);
  Tensor prototypes = empty({rows, embeddings.size(1)}, dtype), identities = empty({rows}, ScalarType::Long);
  Tensor index = empty({batch}, ScalarType::Long), mass = empty({rows}, dtype), norm = empty({rows}, dtype);
  kernels().aggregate_prototypes(
      {
          matrix(embeddings, "embeddings"),
          vector(weights, "weights"),
          normalize,
          groups,
          mutable_matrix(prototypes, "prototypes"),
          mutable_array<int64_t>(identities, "identities"),
          mutable_array<int64_t>(index, "index"),
          mutable_vector(mass, "mass"),
          mutable_vector(norm, "norm"),
      },
      parallel());
  return {prototypes, identities, index, mass, norm};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_prototypes, const Tensor& grad_mass, const Tensor& embeddings,
                                    const OptionalTensor& weights, const Tensor& index, const Tensor& prototypes,
                                    const Tensor& mass, const Tensor& norm, bool normalize) {
  const int64_t batch = embeddings.size(0);
  Tensor grad_embeddings = empty({batch, embeddings.size(1)}, embeddings.scalar_type());
  Tensor grad_weights = empty({batch}, weights ? weights->scalar_type() : accumulation_type(embeddings));
  kernels().aggregate_prototypes_backward(
      {
          matrix(grad_prototypes, "grad_prototypes"),
          vector(grad_mass, "grad_mass"),
          matrix(embeddings, "embeddings"),
          vector(weights, "weights"),
          vector(index, "index"),
          matrix(prototypes, "prototypes"),
          vector(mass, "mass"),
          vector(norm, "norm"),
          normalize,
          mutable_matrix(grad_embeddings, "grad_embeddings"),
          mutable_vector(grad_weights, "grad_weights"),
      },
      parallel());
  return {grad_embeddings, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(protomem_cpu, CPU, m) {
  m.impl("aggregate_prototypes", TORCH_BOX(&forward));
  m.impl("aggregate_prototypes_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace protomem
