#include "hardest_negatives.h"

#include <tuple>

#include "base/tensors.h"
#include "capability.h"

namespace protomem {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& prototypes, const Tensor& targets,
                                   const OptionalTensor& occupied, int64_t k, bool normalize_prototypes) {
  const Tensor own_x = as_contiguous(x);
  const OptionalTensor own_occupied = as_contiguous(occupied);
  Tensor cosines = empty({x.size(0), k}, x.scalar_type()), slots = empty({x.size(0), k}, ScalarType::Long);
  HardestNegatives in;
  in.x = matrix(own_x, "x");
  in.prototypes = matrix(prototypes, "prototypes");
  in.targets = vector(targets, "targets");
  in.occupied = array<bool>(own_occupied, "occupied").data;
  in.k = k;
  in.normalize = normalize_prototypes;
  in.cosines = cosines.mutable_data_ptr();
  in.slots = slots.mutable_data_ptr<int64_t>();
  kernels().hardest_negatives(in, parallel());
  return {cosines, slots};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_cosines, const Tensor& x, const Tensor& prototypes,
                                    const Tensor& slots, bool normalize_prototypes, bool need_prototypes) {
  const Tensor own_grad = as_contiguous(grad_cosines), own_x = as_contiguous(x);
  const Tensor own_slots = as_contiguous(slots);
  Tensor grad_x = empty({x.size(0), x.size(1)}, x.scalar_type());
  Tensor grad_prototypes = need_prototypes ? empty({prototypes.size(0), prototypes.size(1)}, prototypes.scalar_type())
                                           : empty({0, 0}, prototypes.scalar_type());
  HardestNegativesBackward in;
  in.grad = own_grad.const_data_ptr();
  in.x = matrix(own_x, "x");
  in.prototypes = matrix(prototypes, "prototypes");
  in.slots = own_slots.const_data_ptr<int64_t>();
  in.k = slots.size(1);
  in.normalize = normalize_prototypes;
  in.grad_x = grad_x.mutable_data_ptr();
  if (need_prototypes) in.grad_prototypes = mutable_matrix(grad_prototypes, "grad_prototypes");
  kernels().hardest_negatives_backward(in, parallel());
  return {grad_x, grad_prototypes};
}

STABLE_TORCH_LIBRARY_IMPL(protomem_cpu, CPU, m) {
  m.impl("hardest_negatives", TORCH_BOX(&forward));
  m.impl("hardest_negatives_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace protomem
