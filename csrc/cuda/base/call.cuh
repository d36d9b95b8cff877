// A call of an operator on batch x memory, as its kernels want to have it.
#pragma once

#include "matrix.cuh"

namespace protomem::cuda {

// What a call reads, converted where a kernel takes one dtype alone. It refers to the tensors it is made of.
struct Call {
  const Tensor &x, &prototypes, &targets;
  const OptionalTensor& occupied;
  OptionalTensor threshold, coefficients, inverse;
  double scale;
  cudaStream_t stream;
  int64_t batch, capacity, dim;

  // `unit_length`: whether the kernels need 1 / |w_j|.
  Call(const Tensor& x_, const Tensor& prototypes_, const Tensor& targets_, const OptionalTensor& occupied_,
       const OptionalTensor& threshold_, const OptionalTensor& coefficients_, double scale_, bool unit_length,
       cudaStream_t stream_)
      : x(x_),
        prototypes(prototypes_),
        targets(targets_),
        occupied(occupied_),
        threshold(as_float(threshold_)),
        coefficients(as_float(coefficients_)),
        inverse(inverse_lengths(prototypes_, unit_length, stream_)),
        scale(scale_),
        stream(stream_),
        batch(x_.size(0)),
        capacity(prototypes_.size(0)),
        dim(x_.size(1)) {}

  bool has_form() const { return threshold && coefficients; }
  HardForm form() const {
    return has_form() ? HardForm{strided<float>(threshold), strided<float>(coefficients)} : HardForm{};
  }

  // The memory from slot `first` on, to be gathered or to be streamed.
  template <class T>
  Rows<const T> rows(int64_t first = 0) const {
    Rows<const T> all = rows_of<T>(prototypes);
    return {all.data + first * all.row_stride, all.row_stride, all.column_stride};
  }
  template <class T>
  Streamed streamed(int64_t first = 0) const {
    const Rows<const T> all = rows<T>(first);
    return {all.data, all.row_stride, all.column_stride, 0};
  }
  template <class T>
  bool aligned() const {
    return aligned_rows(rows<T>(), capacity);
  }

  // Fills in what arguments of kernels have in common, as far as these have it; `args.form` where there is a form.
  template <class Args>
  void fill(Args& args) const {
    fill(args, 0, capacity);
  }
  // The same for a chunk of the memory, `width` slots from `first` on; targets are those of the whole memory.
  template <class Args>
  void fill(Args& args, int64_t first, int64_t width) const {
    args.batch = batch;
    args.capacity = width;
    args.dim = static_cast<int>(dim);
    args.targets = slots_of(targets, "targets", capacity);
    args.occupied = strided<bool>(occupied);
    if (occupied) args.occupied.data += first * args.occupied.stride;
    if constexpr (requires { args.first_slot; }) args.first_slot = first;
    if constexpr (requires { args.inverse_ptr; }) {
      if (inverse) args.inverse_ptr = data<float>(*inverse) + first;
    }
    if constexpr (requires { args.form; }) args.form = form();
    if constexpr (requires { args.scale; }) args.scale = static_cast<float>(scale);
  }
};

}  // namespace protomem::cuda
