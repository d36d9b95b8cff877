#include "negative_logsumexp.cuh"

#include <optional>
#include <tuple>

#include "base/call.cuh"

namespace protomem::cuda {
namespace {

template <class T>
LogsumexpChosen<T> chosen(const Call& call, const Tensor& negatives, bool normalize) {
  LogsumexpChosen<T> args;
  call.fill(args);
  args.x = rows_of<float>(call.x);
  args.prototypes = call.rows<T>();
  args.aligned = aligned_rows(args.x, call.batch) && call.aligned<T>();
  args.normalize = normalize;
  args.negatives = slots_of(negatives, "negatives", call.capacity);
  args.count = static_cast<int>(negatives.size(1));
  return args;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs forward(const Tensor& x, const Tensor& prototypes, const Tensor& targets, const OptionalTensor& occupied,
                const OptionalTensor& negatives, const OptionalTensor& threshold, const OptionalTensor& coefficients,
                double scale, std::optional<double> offset, bool normalize_prototypes, bool with_gradient,
                int64_t /*kept_rows*/) {
  check_columns(x);
  const OnDevice device(x);
  const int64_t B = x.size(0), D = x.size(1), M = prototypes.size(0);
  Tensor cosine = empty(x, {B}, ScalarType::Float), n = empty(x, {B}, ScalarType::Float);
  Tensor target_rows = empty(x, {B, D}, ScalarType::Float);
  Tensor o = empty(x, {with_gradient ? B : 0, with_gradient ? D : 0}, ScalarType::Float);
  Tensor kept = empty(prototypes, {0, 0}, prototypes.scalar_type());  // a product costs less than keeping it
  if (B == 0) return {cosine, n, target_rows, o, kept};

  const Call call(x, prototypes, targets, occupied, threshold, coefficients, scale, normalize_prototypes && !negatives,
                  device.stream());
  if (negatives) {
    with_factor(prototypes, [&](auto zero) {
      using T = decltype(zero);
      auto args = chosen<T>(call, *negatives, normalize_prototypes);
      args.cosine_ptr = data<float>(cosine);
      args.n_ptr = data<float>(n);
      args.target_rows_ptr = data<float>(target_rows);
      args.o_ptr = with_gradient ? data<float>(o) : nullptr;
      LAUNCH(logsumexp_chosen_kernel<T>, blocks(B, 1), chosen_threads, 0, device.stream(), args);
    });
    return {cosine, n, target_rows, o, kept};
  }

  const Processors processors(x);
  LogsumexpForward args;
  call.fill(args);
  args.x = rows_of<float>(x);
  // With lengths divided out, exponentials times 1 / |w| know no bound; and float16 ends at 2^-24.
  args.running = !offset || normalize_prototypes || prototypes.scalar_type() == ScalarType::Half;
  args.offset = static_cast<float>(args.running ? 0 : *offset);
  with_factor(prototypes, [&](auto zero) {
    using T = decltype(zero);
    constexpr int TILE = sizeof(T) == 2 ? 32 : 16;
    args.prototypes = call.streamed<T>();
    with_shape<ForwardTask, T, TILE>(D, call.aligned<T>(), processors, [&](auto shape) {
      using S = decltype(shape);
      const unsigned row_blocks = blocks(B, S::ROWS);
      const Splits splits(M, row_blocks, processors.count);
      // One allocation: totals, maxima and moments of every split.
      const int64_t lines = splits.count * B, head = (lines + 3) / 4 * 4;
      Tensor scratch = empty(x, {2 * head + lines * S::COLUMNS}, ScalarType::Float);
      args.per_split = splits.size;
      args.totals_ptr = data<float>(scratch);
      args.maxima_ptr = args.totals_ptr + head;
      args.moments_ptr = args.maxima_ptr + head;
      LAUNCH(logsumexp_stream_kernel<S>, dim3(row_blocks, static_cast<unsigned>(splits.count)), S::THREADS,
             Layout<ForwardTask<S>>::BYTES, device.stream(), args);

      LogsumexpReduction<T> reduction;
      reduction.batch = B;
      reduction.dim = static_cast<int>(D);
      reduction.columns = S::COLUMNS;
      reduction.splits = static_cast<int>(splits.count);
      reduction.totals_ptr = args.totals_ptr;
      reduction.maxima_ptr = args.running ? args.maxima_ptr : nullptr;
      reduction.moments_ptr = args.moments_ptr;
      reduction.x = args.x;
      reduction.prototypes = call.rows<T>();
      reduction.targets = args.targets;
      reduction.normalize = normalize_prototypes;
      reduction.scale = args.scale;
      reduction.offset = args.offset;
      reduction.cosine_ptr = data<float>(cosine);
      reduction.n_ptr = data<float>(n);
      reduction.target_rows_ptr = data<float>(target_rows);
      reduction.o_ptr = with_gradient ? data<float>(o) : nullptr;
      LAUNCH(logsumexp_reduction_kernel<T>, blocks(B, 1), reduction_threads, 0, device.stream(), reduction);
    });
  });
  return {cosine, n, target_rows, o, kept};
}

void backward_(Tensor grad_prototypes, const Tensor& grad_cosine, const Tensor& grad_n, const Tensor& x,
               const Tensor& prototypes, const Tensor& targets, const OptionalTensor& occupied,
               const OptionalTensor& negatives, const OptionalTensor& threshold, const OptionalTensor& coefficients,
               const Tensor& n, double scale, std::optional<double> /*offset*/, bool normalize_prototypes,
               int64_t kept_rows) {
  check_columns(x);
  STD_TORCH_CHECK(grad_prototypes.is_contiguous(), "grad_prototypes must be contiguous");
  STD_TORCH_CHECK(kept_rows == 0, "kept_rows must be 0, got ", kept_rows);
  const OnDevice device(x);
  const int64_t B = x.size(0), D = x.size(1), M = prototypes.size(0);
  if (M == 0 || D == 0) return;
  const Call call(x, prototypes, targets, occupied, threshold, coefficients, scale, normalize_prototypes && !negatives,
                  device.stream());
  const Tensor own_grad_cosine = torch::stable::contiguous(grad_cosine), own_grad_n = torch::stable::contiguous(grad_n);
  const Tensor own_n = torch::stable::contiguous(n);
  if (negatives) {
    const int64_t entries = negatives->size(1) + 1;
    Tensor slots = empty(x, {B, entries}, ScalarType::Long), grads = empty(x, {B, entries}, ScalarType::Float);
    with_factor(prototypes, [&](auto zero) {
      using T = decltype(zero);
      auto args = chosen<T>(call, *negatives, normalize_prototypes);
      args.n_ptr = data<float>(own_n);
      args.grad_n_ptr = data<float>(own_grad_n);
      args.grad_cosine_ptr = data<float>(own_grad_cosine);
      args.slots_ptr = data<int64_t>(slots);
      args.grads_ptr = data<float>(grads);
      LAUNCH(logsumexp_chosen_backward_kernel<T>, blocks(B, 1), chosen_threads, 0, device.stream(), args);
      add_chosen_rows<T>(grad_prototypes, grads, slots, x, prototypes, normalize_prototypes, device.stream());
    });
    return;
  }

  const Processors processors(x);
  const Rows<const float> samples = rows_of<float>(x);
  with_factor(prototypes, [&](auto zero) {
    using T = decltype(zero);
    LogsumexpBackward<T> args;
    call.fill(args);
    args.prototypes = call.rows<T>();
    args.n_ptr = data<float>(own_n);
    args.grad_n_ptr = data<float>(own_grad_n);
    args.grad_cosine_ptr = data<float>(own_grad_cosine);
    args.grad_prototypes_ptr = data<T>(grad_prototypes);
    args.x = {samples.data, samples.row_stride, samples.column_stride, 0};
    args.streamed_dim = args.dim;
    const bool aligned = sizeof(T) == 2 || aligned_rows(samples, B);
    with_shape<BackwardTask, T, 16>(D, aligned, processors, [&](auto shape) {
      using S = decltype(shape);
      std::optional<Tensor> halves;
      if constexpr (sizeof(T) == 2) {
        halves = empty(x, {2, B, S::COLUMNS}, prototypes.scalar_type());
        args.x = {data<T>(*halves), S::COLUMNS, 1, B * S::COLUMNS};
        args.streamed_dim = S::COLUMNS;
        LAUNCH(halves_kernel<T>, blocks(B, 1), 128, 0, device.stream(), samples, B, args.dim, S::COLUMNS,
               data<T>(*halves));
      }
      LAUNCH(logsumexp_backward_kernel<S>, blocks(M, S::ROWS), S::THREADS, Layout<BackwardTask<S>>::BYTES,
             device.stream(), args);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(PROTOMEM_OPERATORS, PROTOMEM_DEVICE, m) {
  m.impl("negative_logsumexp", TORCH_BOX(&forward));
  m.impl("negative_logsumexp_backward_", TORCH_BOX(&backward_));
}

}  // namespace
}  // namespace protomem::cuda
