#include "margin_softmax_logits.cuh"

#include <algorithm>
#include <tuple>

#include "base/call.cuh"

namespace protomem::cuda {
namespace {

// Writes the logits, or G h', of `width` slots from `first` on.
template <class T>
void launch_logits(const Call& call, Logits& args, int64_t first, int64_t width, const Processors& processors) {
  call.fill(args, first, width);
  args.x = rows_of<float>(call.x);
  args.prototypes = call.streamed<T>(first);
  constexpr int TILE = sizeof(T) == 2 ? 32 : 16;
  with_shape<LogitsTask, T, TILE>(call.dim, call.aligned<T>(), processors, [&](auto shape) {
    using S = decltype(shape);
    const unsigned row_blocks = blocks(call.batch, S::ROWS);
    const Splits splits(width, row_blocks, processors.count);
    args.per_split = splits.size;
    LAUNCH(logits_kernel<S>, dim3(row_blocks, static_cast<unsigned>(splits.count)), S::THREADS,
           Layout<LogitsTask<S>>::BYTES, call.stream, args);
  });
}

Tensor forward(const Tensor& x, const Tensor& prototypes, const Tensor& targets, const Tensor& target_logits,
               const OptionalTensor& occupied, const OptionalTensor& threshold, const OptionalTensor& coefficients,
               double scale, bool normalize_prototypes) {
  check_columns(x);
  const OnDevice device(x);
  const int64_t B = x.size(0), M = prototypes.size(0);
  Tensor logits = empty(x, {B, M}, ScalarType::Float);
  if (B == 0 || M == 0) return logits;
  const Call call(x, prototypes, targets, occupied, threshold, coefficients, scale, normalize_prototypes,
                  device.stream());
  const OptionalTensor at_targets = as_type(target_logits, ScalarType::Float);
  const Processors processors(x);
  with_factor(prototypes, [&](auto zero) {
    Logits args;
    args.target_logits = strided<float>(at_targets);
    args.logits_ptr = data<float>(logits);
    args.row_stride = M;
    launch_logits<decltype(zero)>(call, args, 0, M, processors);
  });
  return logits;
}

template <class T>
void launch_backward(const Call& call, const Tensor& grad, Tensor& grad_x, Tensor& grad_prototypes,
                     Tensor& grad_target_logits, bool need_prototypes) {
  const Processors processors(call.x);
  const int64_t B = call.batch, M = call.capacity, D = call.dim;
  const Rows<const float> given = rows_of<float>(grad);
  int64_t chunk = M;
  OptionalTensor slopes;
  if (call.has_form()) {
    chunk = std::clamp<int64_t>(processors.scratch_bytes / (4 * B) / 128 * 128, 128, (M + 127) / 128 * 128);
    slopes = empty(call.x, {B, chunk}, ScalarType::Float);
  }

  OptionalTensor samples, sound;
  auto prototypes_pass = [&](const Rows<const float>& h, int64_t first, int64_t width) {
    with_plain_shape<PrototypesTask, T>(D, true, processors, [&](auto shape) {
      using S = decltype(shape);
      if (!samples) {
        samples = empty(call.x, {B, S::COLUMNS}, call.prototypes.scalar_type());
        sound = empty(call.x, {B}, ScalarType::Bool);
        LAUNCH(logits_samples_kernel<T>, blocks(B, 1), samples_threads, 0, call.stream, rows_of<float>(call.x),
               static_cast<int>(D), S::COLUMNS, data<T>(*samples), data<bool>(*sound));
      }
      LogitsPrototypes<T> args;
      call.fill(args, first, width);
      args.samples = {data<T>(*samples), S::COLUMNS, 1, 0};
      args.sound_ptr = data<bool>(*sound);
      args.prototypes = call.rows<T>(first);
      args.grad = h;
      args.grad_prototypes_ptr = data<T>(grad_prototypes) + first * D;
      LAUNCH(logits_prototypes_kernel<S>, blocks(width, S::ROWS), S::THREADS, Layout<PrototypesTask<S>>::BYTES,
             call.stream, args);
    });
  };

  with_plain_shape<EmbeddingsTask, T>(D, call.aligned<T>(), processors, [&](auto shape) {
    using S = decltype(shape);
    const unsigned row_blocks = blocks(B, S::ROWS);
    const Splits splits(std::min(chunk, M), row_blocks, processors.count);
    Tensor moments = empty(call.x, {splits.count, B, S::COLUMNS}, ScalarType::Float);
    for (int64_t first = 0; first < M; first += chunk) {
      const int64_t width = std::min(chunk, M - first);
      Rows<const float> h = {given.data + first * given.column_stride, given.row_stride, given.column_stride};
      if (slopes) {
        Logits args;
        args.grad = {h, aligned_rows(h, B)};
        args.logits_ptr = data<float>(*slopes);
        args.row_stride = chunk;
        launch_logits<T>(call, args, first, width, processors);
        h = rows_of<float>(*slopes);
      }
      LogitsEmbeddings args;
      call.fill(args, first, width);
      args.prototypes = call.streamed<T>(first);
      args.per_split = splits.size;
      args.grad = {h, aligned_rows(h, B)};
      args.continues = first > 0;
      args.moments_ptr = data<float>(moments);
      LAUNCH(logits_embeddings_kernel<S>, dim3(row_blocks, static_cast<unsigned>(splits.count)), S::THREADS,
             Layout<EmbeddingsTask<S>>::BYTES, call.stream, args);
      if (need_prototypes) prototypes_pass(h, first, width);
    }
    LogitsSums sums;
    sums.batch = B;
    sums.dim = static_cast<int>(D);
    sums.columns = S::COLUMNS;
    sums.splits = static_cast<int>(splits.count);
    sums.moments_ptr = data<float>(moments);
    sums.targets = slots_of(call.targets, "targets", M);
    sums.grad = given;
    sums.grad_x_ptr = data<float>(grad_x);
    sums.grad_target_logits_ptr = data<float>(grad_target_logits);
    LAUNCH(logits_sums_kernel, blocks(B, 1), sums_threads, 0, call.stream, sums);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& prototypes,
                                            const Tensor& targets, const OptionalTensor& occupied,
                                            const OptionalTensor& threshold, const OptionalTensor& coefficients,
                                            double scale, bool normalize_prototypes, bool need_prototypes) {
  check_columns(x);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, "grad must be float32");
  const OnDevice device(x);
  const int64_t B = x.size(0), M = prototypes.size(0), D = x.size(1);
  Tensor grad_x = empty(x, {B, D}, ScalarType::Float), grad_target_logits = empty(x, {B}, ScalarType::Float);
  Tensor grad_prototypes =
      need_prototypes ? empty(prototypes, {M, D}, prototypes.scalar_type()) : empty(x, {0, 0}, ScalarType::Float);
  if (B == 0 || M == 0) {
    for (Tensor* tensor : {&grad_x, &grad_prototypes, &grad_target_logits}) torch::stable::zero_(*tensor);
    return {grad_x, grad_prototypes, grad_target_logits};
  }
  const Call call(x, prototypes, targets, occupied, threshold, coefficients, scale, normalize_prototypes,
                  device.stream());
  with_factor(prototypes, [&](auto zero) {
    launch_backward<decltype(zero)>(call, grad, grad_x, grad_prototypes, grad_target_logits, need_prototypes);
  });
  return {grad_x, grad_prototypes, grad_target_logits};
}

STABLE_TORCH_LIBRARY_IMPL(PROTOMEM_OPERATORS, PROTOMEM_DEVICE, m) {
  m.impl("margin_softmax_logits", TORCH_BOX(&forward));
  m.impl("margin_softmax_logits_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace protomem::cuda
