#include "aggregate_prototypes.cuh"

#include <algorithm>
#include <tuple>

#include "base/tensors.cuh"

namespace protomem::cuda {
namespace {

void check_sizes(const Tensor& embeddings) {
  STD_TORCH_CHECK(embeddings.size(1) <= most_columns, "embeddings must have at most ", most_columns, " columns, got ",
                  embeddings.size(1));
  STD_TORCH_CHECK(embeddings.size(0) < int64_t{1} << 30, "embeddings must have fewer than 2^30 rows");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& embeddings, const Tensor& labels,
                                                           const OptionalTensor& weights, bool normalize,
                                                           std::optional<int64_t> max_identities) {
  check_sizes(embeddings);
  const OnDevice device(embeddings);
  const int64_t B = embeddings.size(0), D = embeddings.size(1);
  const Matrix e = matrix(embeddings, "embeddings");
  const Vector label = vector(labels, "labels"), weight = vector(weights, "weights");

  Tensor index = empty(embeddings, {B}, ScalarType::Long);
  const int64_t flags = padded_flags(B);
  Tensor scratch = empty(embeddings, {flags + 8 * B}, ScalarType::Byte);
  unsigned char* const head = data<unsigned char>(scratch);
  int* const order = reinterpret_cast<int*>(head + flags);
  int* const length = order + B;
  LAUNCH(order_kernel, blocks(B, order_threads / warp_lanes * order_rows), order_threads, 0, device.stream(), label,
         static_cast<int>(B), order, length, head, data<int64_t>(index));

  int64_t rows = 0;
  if (max_identities) {
    rows = *max_identities;
  } else if (B > 0) {  // the one documented read-back
    for (const unsigned char flag : read_back(head, B, device.stream())) rows += flag;
  }
  const ScalarType dtype = accumulation_type(embeddings);
  Tensor prototypes = empty(embeddings, {rows, D}, dtype), identities = empty(embeddings, {rows}, ScalarType::Long);
  Tensor mass = empty(embeddings, {rows}, dtype), norm = empty(embeddings, {rows}, dtype);
  with_type(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    with_bool(takes_vectors<T, width_of<T, true>>(e), [&](auto vector) {
      LAUNCH((sum_kernel<T, vector.value>), rows > 0 ? blocks(std::max(B, rows), 1) : 0, sum_threads, 0,
             device.stream(), e, label, weight, normalize, order, length, head, data<A>(prototypes),
             data<int64_t>(identities), data<int64_t>(index), data<A>(mass), data<A>(norm), static_cast<int>(rows));
    });
  });
  return {prototypes, identities, index, mass, norm};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_prototypes, const Tensor& grad_mass, const Tensor& embeddings,
                                    const OptionalTensor& weights, const Tensor& index, const Tensor& prototypes,
                                    const Tensor& mass, const Tensor& norm, bool normalize) {
  check_sizes(embeddings);
  const OnDevice device(embeddings);
  const int64_t B = embeddings.size(0), D = embeddings.size(1);
  const ScalarType dtype = accumulation_type(embeddings);
  const Tensor gradients = as_type(grad_prototypes, dtype), rows = as_type(prototypes, dtype);
  Tensor grad_embeddings = empty(embeddings, {B, D}, embeddings.scalar_type());
  Tensor grad_weights = empty(embeddings, {B}, weights ? weights->scalar_type() : grad_mass.scalar_type());
  const Matrix e = matrix(embeddings, "embeddings"), g = matrix(gradients, "grad_prototypes"),
               p = matrix(rows, "prototypes");
  with_type(e.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    constexpr int width = width_of<T, true>;
    const bool aligned = takes_vectors<T, width>(e) && takes_vectors<A, width>(g) && takes_vectors<A, width>(p);
    with_bool(aligned, [&](auto vectors) {
      LAUNCH((backward_kernel<T, vectors.value>), blocks(B, backward_threads / warp_lanes), backward_threads, 0,
             device.stream(), g, vector(grad_mass, "grad_mass"), e, vector(weights, "weights"), vector(index, "index"),
             p, vector(mass, "mass"), vector(norm, "norm"), normalize, data<T>(grad_embeddings),
             mutable_vector(grad_weights, "grad_weights"));
    });
  });
  return {grad_embeddings, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(PROTOMEM_OPERATORS, PROTOMEM_DEVICE, m) {
  m.impl("aggregate_prototypes", TORCH_BOX(&forward));
  m.impl("aggregate_prototypes_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace protomem::cuda
