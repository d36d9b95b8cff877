#include "enqueue.cuh"

#include <algorithm>
#include <string>
#include <tuple>

#include "base/tensors.cuh"

namespace protomem::cuda {
namespace {

Notes take_notes(Scratch& scratch, int64_t P, int64_t M, bool lru) {
  Notes notes = {};
  notes.state = scratch.take<State>(1);
  notes.ordered = scratch.take<int64_t>(P);
  notes.found = scratch.take<long long>(P);
  notes.victims = scratch.take<int64_t>(P);
  for (int** array : {&notes.order, &notes.length, &notes.leader, &notes.usable, &notes.entering_at, &notes.entering}) {
    *array = scratch.take<int>(P);
  }
  if (lru) {
    notes.keys = scratch.take<Key>(P);
    notes.kept = scratch.take<unsigned>((M + 31) / 32);
    notes.histogram = scratch.take<unsigned>(digits);
  }
  return notes;
}

bool takes_pairs(const Vector& x) { return x.stride == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0; }

std::tuple<Tensor, Tensor, Tensor, Tensor> enqueue(const Tensor& memory_prototypes, const Tensor& memory_identities,
                                                   const Tensor& stamps, const Tensor& cursor, const Tensor& clock,
                                                   const Tensor& given_prototypes, const Tensor& identities,
                                                   double refresh_ratio, const std::string& policy,
                                                   bool keep_previous) {
  const int64_t P = identities.size(0), M = memory_prototypes.size(0), D = memory_prototypes.size(1);
  STD_TORCH_CHECK(D <= most_enqueue_columns, "memory_prototypes must have at most ", most_enqueue_columns,
                  " columns, got ", D);
  STD_TORCH_CHECK(P < int64_t{1} << 30, "prototypes must have fewer than 2^30 rows");
  const OnDevice device(memory_prototypes);
  const cudaStream_t stream = device.stream();
  const bool lru = policy == "lru";

  Tensor prototypes = as_type(given_prototypes, accumulation_type(memory_prototypes));
  if (P > 0 && overlap(prototypes, memory_prototypes)) prototypes = torch::stable::clone(prototypes);
  Tensor slots = empty(identities, {P}, ScalarType::Long), evicted = empty(identities, {P}, ScalarType::Long);
  Tensor known = empty(identities, {P}, ScalarType::Bool);
  Tensor previous = keep_previous ? empty(identities, {P, D}, memory_prototypes.scalar_type())
                                  : empty(identities, {0, 0}, memory_prototypes.scalar_type());
  Scratch sizes;
  take_notes(sizes, P, M, lru);
  Tensor scratch = empty(identities, {sizes.used()}, ScalarType::Byte);
  Scratch arrays(data<unsigned char>(scratch));
  const Notes notes = take_notes(arrays, P, M, lru);

  const Memory memory = {
      mutable_matrix(memory_prototypes, "memory_prototypes"),
      mutable_vector(memory_identities, "memory_identities"),
      mutable_vector(stamps, "stamps"),
      data<int64_t>(cursor),
      data<int64_t>(clock),
  };
  const Outputs outputs = {
      data<int64_t>(slots),
      data<int64_t>(evicted),
      data<bool>(known),
      keep_previous && P > 0 ? mutable_matrix(previous, "previous") : Matrix{},
  };
  const Matrix p = matrix(prototypes, "prototypes");
  const Vector identity = vector(identities, "identities");

  with_type(memory.rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    with_bool(takes_vectors<A, width_of<A, true>>(p), [&](auto vectors) {
      LAUNCH((prepare_kernel<T, vectors.value>), std::max(1u, blocks(P, prepare_threads / warp_lanes)), prepare_threads,
             0, stream, memory, p, identity, notes, outputs);
    });
  });
  if (P == 0) return {slots, evicted, known, previous};

  const unsigned streams = std::min<unsigned>(blocks(M, slots_per_step), most_blocks);
  const int bits = hash_bits(P);
  with_bool(takes_pairs(memory.identities) && takes_pairs(memory.stamps), [&](auto pairs) {
    if (!lru) {
      LAUNCH((find_kernel<pairs.value, false>), streams, find_threads, std::size_t{1} << (bits - 3), stream, memory,
             notes, static_cast<int>(P), bits);
      return;
    }
    LAUNCH((find_kernel<pairs.value, true>), streams, find_threads, std::size_t{1} << (bits - 3), stream, memory, notes,
           static_cast<int>(P), bits);
    for (int i = 0; i < narrowings(M); i++) {
      LAUNCH((narrow_kernel<pairs.value>), streams, find_threads, 0, stream, memory, notes);
    }
    LAUNCH((collect_kernel<pairs.value>), streams, find_threads, 0, stream, memory, notes);
  });

  with_type(memory.rows.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    constexpr int width = width_of<T, true>;
    with_bool(takes_vectors<T, width>(memory.rows) && takes_vectors<A, width>(p), [&](auto vectors) {
      with_bool(lru, [&](auto by_age) {
        LAUNCH((write_kernel<T, vectors.value, by_age.value>), static_cast<unsigned>(2 * P), write_threads, 0, stream,
               memory, p, notes, outputs, refresh_ratio);
      });
    });
  });
  return {slots, evicted, known, previous};
}

STABLE_TORCH_LIBRARY_IMPL(PROTOMEM_OPERATORS, PROTOMEM_DEVICE, m) { m.impl("enqueue_", TORCH_BOX(&enqueue)); }

}  // namespace
}  // namespace protomem::cuda
