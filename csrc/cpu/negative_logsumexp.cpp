#include "negative_logsumexp.h"

#include <algorithm>
#include <tuple>

#include "base/tensors.h"
#include "capability.h"

namespace protomem {
namespace {

// Contiguous copies of what the kernels want contiguous (no more than B x D, or M flags); the views point into them.
struct Inputs {
  Tensor x;
  OptionalTensor occupied;

  Inputs(const Tensor& x_, const OptionalTensor& occupied_)
      : x(as_contiguous(x_)), occupied(as_contiguous(occupied_)) {}

  void fill(LogsumexpInputs& to, const Tensor& prototypes, const Tensor& targets, const OptionalTensor& negatives,
            const OptionalTensor& threshold, const OptionalTensor& coefficients, double scale,
            std::optional<double> offset, bool normalize) const {
    to.x = matrix(x, "x");
    to.prototypes = matrix(prototypes, "prototypes");
    to.targets = vector(targets, "targets");
    to.occupied = array<bool>(occupied, "occupied").data;
    to.negatives = matrix(negatives, "negatives");
    to.chosen = negatives.has_value();
    to.threshold = vector(threshold, "threshold");
    to.coefficients = vector(coefficients, "coefficients");
    to.scale = scale;
    to.offset = offset.value_or(0);
    to.normalize = normalize;
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs forward(const Tensor& x, const Tensor& prototypes, const Tensor& targets, const OptionalTensor& occupied,
                const OptionalTensor& negatives, const OptionalTensor& threshold, const OptionalTensor& coefficients,
                double scale, std::optional<double> offset, bool normalize_prototypes, bool with_gradient,
                int64_t kept_rows) {
  const Inputs inputs(x, occupied);
  NegativeLogsumexp in;
  inputs.fill(in, prototypes, targets, negatives, threshold, coefficients, scale, offset, normalize_prototypes);
  const int64_t batch = x.size(0), dim = x.size(1);
  const ScalarType dtype = x.scalar_type();
  Tensor cosine = empty({batch}, dtype), n = empty({batch}, dtype), target_rows = empty({batch, dim}, dtype);
  Tensor o = with_gradient ? empty({batch, dim}, dtype) : empty({0, 0}, dtype);
  const bool keep = kept_rows > 0;
  Tensor kept = empty({keep ? prototypes.size(0) : 0, keep ? prototypes.size(1) : 0}, prototypes.scalar_type());
  STD_TORCH_CHECK(!keep || (prototypes.scalar_type() == dtype && kept_rows <= std::min(batch, dim)),
                  "kept_rows must be 0, or at most min(x.shape) with prototypes in the dtype of x, got ", kept_rows);
  in.running = !offset.has_value();
  in.cosine = cosine.mutable_data_ptr();
  in.n = n.mutable_data_ptr();
  in.target_rows = target_rows.mutable_data_ptr();
  in.with_gradient = with_gradient;
  in.o = o.mutable_data_ptr();
  in.kept = kept.mutable_data_ptr();
  in.kept_rows = kept_rows;
  kernels().negative_logsumexp(in, parallel());
  return {cosine, n, target_rows, o, kept};
}

void backward_(Tensor grad_prototypes, const Tensor& grad_cosine, const Tensor& grad_n, const Tensor& x,
               const Tensor& prototypes, const Tensor& targets, const OptionalTensor& occupied,
               const OptionalTensor& negatives, const OptionalTensor& threshold, const OptionalTensor& coefficients,
               const Tensor& n, double scale, std::optional<double> offset, bool normalize_prototypes,
               int64_t kept_rows) {
  const Inputs inputs(x, occupied);
  const Tensor own_grad_cosine = as_contiguous(grad_cosine), own_grad_n = as_contiguous(grad_n);
  const Tensor own_n = as_contiguous(n);
  STD_TORCH_CHECK(grad_prototypes.is_contiguous(), "grad_prototypes must be contiguous");
  NegativeLogsumexpBackward in;
  inputs.fill(in, prototypes, targets, negatives, threshold, coefficients, scale, offset, normalize_prototypes);
  in.kept_rows = kept_rows;
  in.grad_cosine = own_grad_cosine.const_data_ptr();
  in.grad_n = own_grad_n.const_data_ptr();
  in.n = own_n.const_data_ptr();
  in.grad_prototypes = mutable_matrix(grad_prototypes, "grad_prototypes");
  kernels().negative_logsumexp_backward(in, parallel());
}

STABLE_TORCH_LIBRARY_IMPL(protomem_cpu, CPU, m) {
  m.impl("negative_logsumexp", TORCH_BOX(&forward));
  m.impl("negative_logsumexp_backward_", TORCH_BOX(&backward_));
}

}  // namespace
}  // namespace protomem
