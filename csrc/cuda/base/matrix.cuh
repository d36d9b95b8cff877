// Launching the kernels on batch x memory: which shape serves a call, how the memory is cut, views of tensors.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "chosen_rows.cuh"
#include "stream.cuh"
#include "tensors.cuh"

namespace protomem::cuda {

constexpr int64_t most_columns_of_products = 1024;

// What a launch depends on besides the tensors.
struct Processors {
  int count;                                  // multiprocessors
  int shared_bytes;                           // that one block may have
  int64_t scratch_bytes = int64_t{64} << 20;  // that what grows with batch x memory may take at a time

  explicit Processors(const Tensor& tensor) {
#ifdef PROTOMEM_HOST
    static_cast<void>(tensor);
    const char* bytes = std::getenv("PROTOMEM_HOST_SHARED_BYTES");  // of another GPU
    const char* scratch = std::getenv("PROTOMEM_HOST_SCRATCH_BYTES");
    count = 2;
    shared_bytes = bytes != nullptr ? std::atoi(bytes) : 163 * 1024;
    if (scratch != nullptr) scratch_bytes = std::atoi(scratch);
#else
    const int device = tensor.get_device_index();
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "processors");
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory");
#endif
  }
};

template <class T>
Rows<const T> rows_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1)};
}

inline Slots slots_of(const Tensor& tensor, const char* name, int64_t capacity) {
  const bool matrix = tensor.dim() == 2, wide = dtype_of(tensor, name) == Dtype::int64;
  STD_TORCH_CHECK(wide || dtype_of(tensor, name) == Dtype::int32, name, " must be int32 or int64");
  return {tensor.const_data_ptr(), matrix ? tensor.stride(0) : 0, tensor.stride(matrix ? 1 : 0), wide, capacity};
}

template <class T>
Strided<const T> strided(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return {static_cast<const T*>(tensor->const_data_ptr()), tensor->stride(0)};
}

// Whether rows of T can be copied 16 bytes at a time.
template <class T>
bool aligned_rows(const Rows<const T>& rows, int64_t count) {
  return rows.column_stride == 1 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 &&
         (count < 2 || rows.row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
}

inline OptionalTensor as_float(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_type(*tensor, ScalarType::Float)) : std::nullopt;
}

inline void check_columns(const Tensor& x) {
  STD_TORCH_CHECK(x.size(1) <= most_columns_of_products, "embeddings must have at most ", most_columns_of_products,
                  " columns, got ", x.size(1));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
}

// The slots sorted, stably, and where each came from. By PyTorch: on the device, without waiting for it.
inline std::pair<Tensor, Tensor> sorted(const Tensor& slots) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(slots),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Writes all of `grad_prototypes` from the gradients (B, K) of each sample's chosen slots (B, K), contiguous both.
template <class T>
void add_chosen_rows(Tensor& grad_prototypes, const Tensor& grads, const Tensor& slots, const Tensor& x,
                     const Tensor& prototypes, bool normalize, cudaStream_t stream) {
  torch::stable::zero_(grad_prototypes);
  const int64_t entries = slots.numel();
  if (entries == 0 || grad_prototypes.numel() == 0) return;
  const auto [ascending, order] = sorted(torch::stable::view(slots, {entries}));
  ChosenRows<T> args;
  args.sorted_ptr = data<int64_t>(ascending);
  args.order_ptr = data<int64_t>(order);
  args.grads_ptr = data<float>(grads);
  args.entries = entries;
  args.capacity = prototypes.size(0);
  args.chosen = static_cast<int>(slots.size(1));
  args.dim = static_cast<int>(x.size(1));
  args.x = rows_of<float>(x);
  args.prototypes = rows_of<T>(prototypes);
  args.aligned = aligned_rows(args.x, x.size(0)) && aligned_rows(args.prototypes, prototypes.size(0));
  args.normalize = normalize;
  args.grad_prototypes_ptr = data<T>(grad_prototypes);
  LAUNCH(chosen_rows_kernel<T>, blocks(entries, chosen_rows_per_block), chosen_rows_per_block * warp_lanes, 0, stream,
         args);
}

// Calls f(T()) for the dtypes that the tensor cores multiply.
template <class F>
void with_factor(const Tensor& prototypes, F f) {
  switch (dtype_of(prototypes, "prototypes")) {
    case Dtype::float32: f(float()); break;
    case Dtype::bfloat16: f(bfloat16()); break;
    case Dtype::float16: f(float16()); break;
    default: STD_TORCH_CHECK(false, "prototypes must be float32, bfloat16 or float16");
  }
}

// 1 / |w_j| of every slot, if prototypes are to be scaled to unit length.
inline OptionalTensor inverse_lengths(const Tensor& prototypes, bool normalize, cudaStream_t stream) {
  if (!normalize) return std::nullopt;
  const int64_t capacity = prototypes.size(0);
  Tensor inverse = empty(prototypes, {capacity}, ScalarType::Float);
  with_factor(prototypes, [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> rows = rows_of<T>(prototypes);
    LAUNCH(inverse_lengths_kernel<T>, blocks(capacity, 8), 256, 0, stream, rows, aligned_rows(rows, capacity), capacity,
           static_cast<int>(prototypes.size(1)), data<float>(inverse));
  });
  return inverse;
}

// Shared memory that a block needs, with 2 KiB for what a task declares by itself.
template <class Task>
constexpr int needed_bytes = Layout<Task>::BYTES + 2048;

// What the GPUs with the least of it give a block (8.6, 8.9, 12.x). They are asked for no more than 512 columns
// (too_wide_for in protomem_kernels/backends/cuda.py); wider ones go to those with 163 KiB and more.
constexpr int least_shared_bytes = 99 * 1024;

// Calls f(Deep()) where shared memory allows, else f(Shallow()); of which no code is made if it always does.
template <template <class> class Task, class Deep, class Shallow, class F>
void with_deepest(const Processors& processors, F f) {
  if constexpr (needed_bytes<Task<Deep>> > least_shared_bytes) {
    if (needed_bytes<Task<Deep>> > processors.shared_bytes) return f(Shallow());
  }
  f(Deep());
}

template <template <class> class Task, class Widest>
void check_fits(int64_t dim, const Processors& processors) {
  STD_TORCH_CHECK(needed_bytes<Task<Widest>> <= processors.shared_bytes, "embeddings of ", dim, " columns need ",
                  Layout<Task<Widest>>::BYTES, " bytes of shared memory, this GPU has ", processors.shared_bytes);
}

// Calls f(Shape()) with the shape for embeddings of `dim` columns: 8 warps, of 32 x 64 rows and columns each, or 16 x
// 128 for the widest; tiles of 32 rows for samples that meet a 16-bit memory, else of 16. Three tiles are in flight
// where shared memory allows, else two.
template <template <class> class Task, class T, int TILE, class F>
void with_shape(int64_t dim, bool aligned, const Processors& processors, F f) {
  using Deep = Shape<T, 32, 64, 8, 1, TILE, 3, true>;
  using Shallow = Shape<T, 32, 64, 8, 1, TILE, 2, true>;
  using Widest = Shape<T, 16, 128, 8, 1, 16, 2, true>;
  if (dim > 512) check_fits<Task, Widest>(dim, processors);
  if constexpr (!Task<Shallow>::ALWAYS_ALIGNED) {
    if (!aligned) {
      if (dim <= 128) return f(Shape<T, 32, 64, 2, 4, 16, 2, false>());
      if (dim <= 512) return f(Shape<T, 32, 64, 8, 1, 16, 2, false>());
      return f(Shape<T, 16, 128, 8, 1, 16, 2, false>());
    }
  }
  if (dim <= 128) return f(Shape<T, 32, 64, 2, 4, 16, 3, true>());
  if (dim <= 256) return f(Shape<T, 32, 64, 4, 2, TILE, 3, true>());
  if (dim <= 512) return with_deepest<Task, Deep, Shallow>(processors, f);
  f(Widest());
}

// The same for tasks without a first product: 8 warps, of 32 x 64 or, as they have registers to spare, of 32 x 128 for
// the widest and 64 x 64 for 16-bit rows of up to 512 columns; a tile is at most 32 KiB.
template <template <class> class Task, class T, class F>
void with_plain_shape(int64_t dim, bool aligned, const Processors& processors, F f) {
  constexpr int TILE = 64 / sizeof(T), ROWS = 128 / sizeof(T);
  using Deep = Shape<T, ROWS, 64, 8, 1, TILE, 3, true>;
  using Shallow = Shape<T, ROWS, 64, 8, 1, TILE, 2, true>;
  using Widest = Shape<T, 32, 128, 8, 1, TILE / 2, 3, true>;
  if (dim > 512) check_fits<Task, Widest>(dim, processors);
  if constexpr (!Task<Shallow>::ALWAYS_ALIGNED) {
    if (!aligned) {
      if (dim <= 128) return f(Shape<T, 32, 64, 2, 4, TILE, 2, false>());
      if (dim <= 512) return f(Shape<T, ROWS, 64, 8, 1, TILE, 2, false>());
      return f(Shape<T, 32, 128, 8, 1, TILE / 2, 2, false>());
    }
  }
  if (dim <= 128) return f(Shape<T, 32, 64, 2, 4, TILE, 3, true>());
  if (dim <= 256) return f(Shape<T, 32, 64, 4, 2, TILE, 3, true>());
  if (dim <= 512) return with_deepest<Task, Deep, Shallow>(processors, f);
  f(Widest());
}

// Cuts `items` into splits, each a multiple of unit: the fewest that keep 90 % of the processors busy until the end,
// given `blocks` per split; where no number does, the one that keeps most. Every split costs a pass of its results.
struct Splits {
  int64_t count, size;

  Splits(int64_t items, int64_t blocks, int processors, int64_t unit = 32) {
    const int64_t units = std::max<int64_t>(1, (items + unit - 1) / unit);
    const int64_t most = std::min(units, std::max<int64_t>(1, 4 * processors / std::max<int64_t>(blocks, 1)));
    int64_t best = 1;
    double best_busy = 0;
    for (int64_t splits = 1; splits <= most && best_busy < 0.9; splits++) {
      const int64_t waves = (blocks * splits + processors - 1) / processors;
      const double busy = double(blocks * splits) / double(waves * processors);
      if (busy > best_busy + 1e-9) best = splits, best_busy = busy;
    }
    size = (units + best - 1) / best * unit;
    count = std::max<int64_t>(1, (units * unit + size - 1) / size);
  }
};

}  // namespace protomem::cuda
