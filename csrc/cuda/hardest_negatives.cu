#include "hardest_negatives.cuh"

#include <algorithm>
#include <tuple>

#include "base/call.cuh"

namespace protomem::cuda {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& prototypes, const Tensor& targets,
                                   const OptionalTensor& occupied, int64_t k, bool normalize_prototypes) {
  check_columns(x);
  const OnDevice device(x);
  const int64_t B = x.size(0), D = x.size(1), M = prototypes.size(0);
  STD_TORCH_CHECK(k < (int64_t{1} << 31) / group_slots, "k must be less than 2^24, got ", k);
  Tensor cosines = empty(x, {B, k}, ScalarType::Float), slots = empty(x, {B, k}, ScalarType::Long);
  if (B == 0) return {cosines, slots};
  if (M == 0) {  // nothing to choose from; a broken embedding is told from the others all the same
    HardestResult result;
    result.dim = static_cast<int>(D);
    result.k = static_cast<int>(k);
    result.x = rows_of<float>(x);
    result.cosines_ptr = data<float>(cosines);
    result.slots_ptr = data<int64_t>(slots);
    LAUNCH(hardest_result_kernel, blocks(B, 1), selection_threads, 0, device.stream(), result);
    return {cosines, slots};
  }
  const int64_t groups = (M + group_slots - 1) / group_slots, chosen = std::min(k, groups), found = std::min(k, M);
  const Call call(x, prototypes, targets, occupied, std::nullopt, std::nullopt, 1,
                  normalize_prototypes && chosen < groups, device.stream());
  auto fill = [&](auto& args) {
    call.fill(args);
    args.groups = groups;
    args.x = rows_of<float>(x);
  };
  const Processors processors(x);
  with_factor(prototypes, [&](auto zero) {
    using T = decltype(zero);

    Tensor best = empty(x, {B, chosen}, ScalarType::Int);
    const int* best_ptr = nullptr;
    if (chosen < groups) {
      HardestMaxima args;
      fill(args);
      Tensor maxima = empty(x, {B, groups}, ScalarType::Float);
      args.prototypes = call.streamed<T>();
      args.maxima_ptr = data<float>(maxima);
      with_shape<MaximaTask, T, 16>(D, call.aligned<T>(), processors, [&](auto shape) {
        using S = decltype(shape);
        const unsigned row_blocks = blocks(B, S::ROWS);
        const Splits splits(M, row_blocks, processors.count, group_slots);
        args.per_split = splits.size;
        LAUNCH(hardest_maxima_kernel<S>, dim3(row_blocks, static_cast<unsigned>(splits.count)), S::THREADS,
               Layout<MaximaTask<S>>::BYTES, device.stream(), args);
      });
      LAUNCH(hardest_groups_kernel, blocks(B, 1), selection_threads, 0, device.stream(), args.maxima_ptr, groups,
             static_cast<int>(chosen), data<int>(best));
      best_ptr = data<int>(best);
    }

    const int64_t together = std::clamp<int64_t>(processors.scratch_bytes / (chosen * group_slots * 4), 1, B);
    Tensor candidates = empty(x, {together, chosen * group_slots}, ScalarType::Float);
    Tensor columns = empty(x, {together, found}, ScalarType::Int);
    for (int64_t first = 0; first < B; first += together) {
      HardestCandidates<T> args;
      fill(args);
      args.prototypes = call.rows<T>();
      args.aligned = aligned_rows(args.x, B) && call.aligned<T>();
      args.normalize = normalize_prototypes;
      args.best_ptr = best_ptr;
      args.first_row = first;
      args.chosen = static_cast<int>(chosen);
      args.candidates_ptr = data<float>(candidates);
      const unsigned here = blocks(std::min(together, B - first), 1);
      LAUNCH(hardest_candidates_kernel<T>, blocks(here * chosen, 1), candidate_threads, 0, device.stream(), args);

      HardestResult result;
      fill(result);
      result.best_ptr = best_ptr;
      result.first_row = first;
      result.chosen = static_cast<int>(chosen);
      result.found = static_cast<int>(found);
      result.k = static_cast<int>(k);
      result.candidates_ptr = data<float>(candidates);
      result.columns_ptr = data<int>(columns);
      result.cosines_ptr = data<float>(cosines);
      result.slots_ptr = data<int64_t>(slots);
      LAUNCH(hardest_result_kernel, here, selection_threads, 0, device.stream(), result);
    }
  });
  return {cosines, slots};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_cosines, const Tensor& x, const Tensor& prototypes,
                                    const Tensor& slots, bool normalize_prototypes, bool need_prototypes) {
  check_columns(x);
  const OnDevice device(x);
  const int64_t B = x.size(0), D = x.size(1), M = prototypes.size(0), k = slots.size(1);
  const Tensor grad = torch::stable::contiguous(grad_cosines), chosen = torch::stable::contiguous(slots);
  Tensor grad_x = empty(x, {B, D}, ScalarType::Float);
  Tensor grad_prototypes =
      empty(prototypes, {need_prototypes ? M : 0, need_prototypes ? D : 0}, prototypes.scalar_type());
  with_factor(prototypes, [&](auto zero) {
    using T = decltype(zero);
    HardestGradient<T> args;
    args.grad = rows_of<float>(grad);
    args.prototypes = rows_of<T>(prototypes);
    args.slots = slots_of(chosen, "slots", M);
    args.aligned = aligned_rows(args.prototypes, M);
    args.normalize = normalize_prototypes;
    args.dim = static_cast<int>(D);
    args.k = static_cast<int>(k);
    args.grad_x_ptr = data<float>(grad_x);
    LAUNCH(hardest_gradient_kernel<T>, blocks(B, 1), candidate_threads, 0, device.stream(), args);
    if (need_prototypes) {
      add_chosen_rows<T>(grad_prototypes, grad, chosen, x, prototypes, normalize_prototypes, device.stream());
    }
  });
  return {grad_x, grad_prototypes};
}

STABLE_TORCH_LIBRARY_IMPL(PROTOMEM_OPERATORS, PROTOMEM_DEVICE, m) {
  m.impl("hardest_negatives", TORCH_BOX(&forward));
  m.impl("hardest_negatives_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace protomem::cuda
