#include "margin_softmax_logits.h"

#include <tuple>

#include "base/tensors.h"
#include "capability.h"

namespace protomem {
namespace {

void fill(LogitsInputs& in, const Tensor& x, const Tensor& prototypes, const Tensor& targets,
          const OptionalTensor& occupied, const OptionalTensor& threshold, const OptionalTensor& coefficients,
          double scale, bool normalize) {
  in.x = matrix(x, "x");
  in.prototypes = matrix(prototypes, "prototypes");
  in.targets = vector(targets, "targets");
  in.occupied = array<bool>(occupied, "occupied").data;
  in.threshold = vector(threshold, "threshold");
  in.coefficients = vector(coefficients, "coefficients");
  in.scale = scale;
  in.normalize = normalize;
}

Tensor forward(const Tensor& x, const Tensor& prototypes, const Tensor& targets, const Tensor& target_logits,
               const OptionalTensor& occupied, const OptionalTensor& threshold, const OptionalTensor& coefficients,
               double scale, bool normalize_prototypes) {
  const Tensor own_x = as_contiguous(x);
  const OptionalTensor own_occupied = as_contiguous(occupied);
  Tensor logits = empty({x.size(0), prototypes.size(0)}, x.scalar_type());
  MarginSoftmaxLogits in;
  fill(in, own_x, prototypes, targets, own_occupied, threshold, coefficients, scale, normalize_prototypes);
  in.target_logits = vector(target_logits, "target_logits");
  in.logits = logits.mutable_data_ptr();
  kernels().margin_softmax_logits(in, parallel());
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& prototypes,
                                            const Tensor& targets, const OptionalTensor& occupied,
                                            const OptionalTensor& threshold, const OptionalTensor& coefficients,
                                            double scale, bool normalize_prototypes, bool need_prototypes) {
  const Tensor own_x = as_contiguous(x);
  const OptionalTensor own_occupied = as_contiguous(occupied);
  Tensor grad_x = empty({x.size(0), x.size(1)}, x.scalar_type());
  Tensor grad_prototypes = need_prototypes ? empty({prototypes.size(0), prototypes.size(1)}, prototypes.scalar_type())
                                           : empty({0, 0}, x.scalar_type());
  Tensor grad_target_logits = empty({x.size(0)}, x.scalar_type());
  MarginSoftmaxLogitsBackward in;
  fill(in, own_x, prototypes, targets, own_occupied, threshold, coefficients, scale, normalize_prototypes);
  in.grad = matrix(grad, "grad");
  in.grad_x = grad_x.mutable_data_ptr();
  if (need_prototypes) in.grad_prototypes = mutable_matrix(grad_prototypes, "grad_prototypes");
  in.grad_target_logits = grad_target_logits.mutable_data_ptr();
  kernels().margin_softmax_logits_backward(in, parallel());
  return {grad_x, grad_prototypes, grad_target_logits};
}

STABLE_TORCH_LIBRARY_IMPL(protomem_cpu, CPU, m) {
  m.impl("margin_softmax_logits", TORCH_BOX(&forward));
  m.impl("margin_softmax_logits_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace protomem
