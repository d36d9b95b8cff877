// Kernels of every kind the package has, right ones and the same with one defect planted: test_specimens.py.
//
//   specimens                    lists what there is
//   specimens SEED               runs all right kernels; prints "ok: NAME" for each
//   specimens SEED NAME DEFECT   runs one with a defect; prints what was found, "wrong result" or "ok: NAME"
//
// Arrays of global memory are std::vector: an allocation each, of exactly their size.
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/cuda/base/memory.cuh"
#include "../../csrc/cuda/base/mma.cuh"
#include "../../csrc/cuda/base/warp.cuh"

extern "C" void cuda_host_seed(uint64_t seed);

namespace protomem::cuda {
namespace {

enum class Defect {
  none,
  missing_barrier,
  missing_second_barrier,
  missing_syncwarp,
  skipped_barrier,
  different_barriers,
  past_shared,
  past_global,
  before_global,
  misaligned,
  mask_without_lane,
  mask_with_absent_lane,
  lane_outside_mask,
  different_operations,
  missing_wait,
  wait_for_too_few,
  missing_commit,
  copy_from_outside,
  plain_instead_of_atomic,
  atomic_and_plain,
  uninitialised_shared,
  missing_release_fence,
  missing_acquire_fence,
  fence_after_ticket,
  release_of_others,
  acquire_of_others,
  every_block_is_last,
  other_counter,
};
using enum Defect;

std::mt19937 random_numbers(1);

// Small integers, so that sums in float are exact in any order.
std::vector<float> integers(int64_t n) {
  std::vector<float> x(n);
  for (float& value : x) value = static_cast<float>(static_cast<int>(random_numbers() % 17) - 8);
  return x;
}

// ---------------------------------------------------------------------------------------------- Warp shuffle sum

// One warp per row of 32.
template <Defect DEFECT>
KERNEL(64)
void shuffle_sum(const float* x_ptr, int64_t rows, float* sums_ptr) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 2 + warp_index();
  if (row >= rows) return;  // a whole warp
  const int lane = lane_index();
  float sum = x_ptr[row * 32 + lane];
  for (int offset = 16; offset > 0; offset /= 2) {
    if (DEFECT == mask_without_lane) {
      if (__any_sync(0x7fffffffu, sum > 0)) sum += __shfl_xor_sync(all_lanes, sum, offset);
    } else if (DEFECT == lane_outside_mask) {
      sum += __shfl_xor_sync(lane < 16 ? 0x0000ffffu : 0xffff0000u, sum, offset);
    } else if (DEFECT == mask_with_absent_lane) {
      if (lane == 31) return;
      sum += __shfl_xor_sync(all_lanes, sum, offset);
    } else if (DEFECT == different_operations) {
      sum += lane < 16 ? __shfl_xor_sync(all_lanes, sum, offset) : __shfl_down_sync(all_lanes, sum, offset);
    } else {
      sum += __shfl_xor_sync(all_lanes, sum, offset);
    }
  }
  if (lane == 0) sums_ptr[row] = sum;
}

template <Defect DEFECT>
bool run_shuffle_sum() {
  const int64_t rows = 5;
  const std::vector<float> x = integers(rows * 32);
  std::vector<float> sums(rows), expected(rows);
  for (int64_t i = 0; i < rows * 32; i++) expected[i / 32] += x[i];
  LAUNCH(shuffle_sum<DEFECT>, 3, 64, 0, nullptr, x.data(), rows, sums.data());
  return sums == expected;
}

// ---------------------------------------------------------------------------------------------- Block reduction

// Sums in shared memory by halving, then one atomic per block.
template <Defect DEFECT>
KERNEL(256)
void block_reduction(const int* x_ptr, int64_t n, int* sum_ptr) {
  SMEM(partial, int[256]);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + thread;
  if (DEFECT != uninitialised_shared || i < n) partial[thread] = i < n ? x_ptr[i] : 0;
  for (int half = 128; half > 0; half /= 2) {
    if (DEFECT == missing_barrier && half == 32) {
      __syncwarp();
    } else if (DEFECT == skipped_barrier && half == 1) {
      if (thread == 200) return;
      __syncthreads();
    } else if (DEFECT == different_barriers && half == 64) {
      // clang-format off
      if (thread < 128) __syncthreads(); else __syncthreads();  // on one line, and yet two
      // clang-format on
    } else {
      __syncthreads();
    }
    const int other = thread + half;
    if (thread < half) partial[thread] += partial[other];
  }
  if (thread != 0) return;
  if (DEFECT == plain_instead_of_atomic) {
    *sum_ptr += partial[0];
  } else {
    atomicAdd(sum_ptr, partial[0]);
    if (DEFECT == atomic_and_plain && *sum_ptr == 12345678) *sum_ptr = 0;
  }
}

template <Defect DEFECT>
bool run_block_reduction() {
  std::vector<int> x(700), sum(1);
  int expected = 0;
  for (int& value : x) expected += value = static_cast<int>(random_numbers() % 1000);
  LAUNCH(block_reduction<DEFECT>, 3, 256, 0, nullptr, x.data(), static_cast<int64_t>(x.size()), sum.data());
  return sum[0] == expected;
}

// ---------------------------------------------------------------------------------------------- Hash insert

// The distinct keys, each once, in a hash table of shared memory with linear probing; then their number.
template <Defect DEFECT>
KERNEL(128)
void hash_insert(const int* keys_ptr, int64_t n, int* table_ptr, int* distinct_ptr) {
  constexpr int slots = 256, empty = -1;
  SMEM(table, int[slots]);
  SMEM(distinct, int);
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < slots; i += 128) table[i] = empty;
  if (thread == 0) distinct = 0;
  if (DEFECT != missing_barrier) __syncthreads();
  for (int64_t i = thread; i < n; i += 128) {
    const int key = keys_ptr[i];
    int slot = static_cast<int>(static_cast<unsigned>(key) * 2654435761u >> 24) % slots;
    for (;; slot = (slot + 1) % slots) {
      int old;
      if (DEFECT == plain_instead_of_atomic) {
        old = table[slot];
        if (old == empty) table[slot] = key;
      } else {
        old = atomicCAS(&table[slot], empty, key);
      }
      if (old == empty) atomicAdd(&distinct, 1);
      if (old == empty || old == key) break;
    }
  }
  __syncthreads();
  for (int i = thread; i < slots; i += 128) table_ptr[i] = table[i];
  if (thread == 0) *distinct_ptr = distinct;
}

template <Defect DEFECT>
bool run_hash_insert() {
  std::vector<int> keys(300), table(256), distinct(1);
  for (int& key : keys) key = static_cast<int>(random_numbers() % 150);
  LAUNCH(hash_insert<DEFECT>, 1, 128, 0, nullptr, keys.data(), static_cast<int64_t>(keys.size()), table.data(),
         distinct.data());
  const std::set<int> expected(keys.begin(), keys.end());
  std::multiset<int> inserted;
  for (const int key : table) {
    if (key != -1) inserted.insert(key);
  }
  return distinct[0] == static_cast<int>(expected.size()) &&
         inserted == std::multiset<int>(expected.begin(), expected.end());
}

// ---------------------------------------------------------------------------------------------- Segment sum

// Sums of rows first[s] .. first[s + 1], a block per segment, 16 bytes per thread and row.
template <Defect DEFECT>
KERNEL(32)
void segment_sum(const float* x_ptr, const int64_t* first_ptr, int64_t D, float* sums_ptr) {
  const int64_t segment = blockIdx.x;
  for (int64_t d = 4 * threadIdx.x; d < D; d += 4 * 32) {
    float4 sum = make_float4(0, 0, 0, 0);
    const int64_t shift = DEFECT == misaligned ? 2 : DEFECT == past_global ? 4 : DEFECT == before_global ? -4 : 0;
    for (int64_t row = first_ptr[segment]; row < first_ptr[segment + 1]; row++) {
      const float4 x = *reinterpret_cast<const float4*>(x_ptr + row * D + d + shift);
      sum.x += x.x;
      sum.y += x.y;
      sum.z += x.z;
      sum.w += x.w;
    }
    *reinterpret_cast<float4*>(sums_ptr + segment * D + d) = sum;
  }
}

template <Defect DEFECT>
bool run_segment_sum() {
  const int64_t D = 196;
  const std::vector<int64_t> first = {0, 3, 3, 4, 11};
  const std::vector<float> x = integers(first.back() * D);
  std::vector<float> sums((first.size() - 1) * D, -1.f), expected(sums.size());
  for (std::size_t s = 0; s + 1 < first.size(); s++) {
    for (int64_t i = first[s] * D; i < first[s + 1] * D; i++) expected[s * D + i % D] += x[i];
  }
  LAUNCH(segment_sum<DEFECT>, static_cast<unsigned>(first.size() - 1), 32, 0, nullptr, x.data(), first.data(), D,
         sums.data());
  return sums == expected;
}

// ---------------------------------------------------------------------------------------------- Ballot compaction

// Of each 32 numbers the positive ones, in order, and how many there are; reversed through shared memory once.
template <Defect DEFECT>
KERNEL(64)
void compaction(const int* x_ptr, int* y_ptr, int* counts_ptr) {
  SMEM(kept, int[2][32]);
  const int lane = lane_index(), warp = warp_index();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 2 + warp;
  const int x = x_ptr[row * 32 + lane];
  const unsigned positive = __ballot_sync(all_lanes, x > 0);
  const int rank = __popc(positive & ((1u << lane) - 1)), count = __popc(positive);
  kept[warp][lane] = 0;
  if (DEFECT != missing_barrier) __syncwarp();
  if (x > 0) kept[warp][rank + (DEFECT == past_shared && warp == 1 ? 33 - count : 0)] = x;
  if (DEFECT != missing_syncwarp) {
    __syncwarp();
  } else {
    __shfl_sync(all_lanes, x, 0);  // all lanes come here, but memory is not ordered
  }
  y_ptr[row * 32 + lane] = kept[warp][lane];
  if (lane == 0) counts_ptr[row] = count;
}

template <Defect DEFECT>
bool run_compaction() {
  const int rows = 6;
  std::vector<int> x(rows * 32), y(rows * 32), counts(rows), expected(rows * 32), expected_counts(rows);
  for (int i = 0; i < rows * 32; i++) {
    x[i] = static_cast<int>(random_numbers() % 200) - 80;
    if (x[i] > 0) expected[i / 32 * 32 + expected_counts[i / 32]++] = x[i];
  }
  LAUNCH(compaction<DEFECT>, rows / 2, 64, 0, nullptr, x.data(), y.data(), counts.data());
  return y == expected && counts == expected_counts;
}

// ---------------------------------------------------------------------------------------------- Matrix product

// c (M x N) = a (M x K) b^T for b (N x K), bfloat16: ldmatrix, mma, two stages of cp.async. M, N, K: multiples of the
// tile.
constexpr int BLOCK_M = 64, BLOCK_N = 16, BLOCK_K = 16, PITCH = BLOCK_K + 8;  // rows of 48 bytes: no bank conflicts
struct Stage {
  bfloat16 a[BLOCK_M][PITCH];
  bfloat16 b[BLOCK_N][PITCH];
};

template <Defect DEFECT>
KERNEL(128)
void matrix_product(const bfloat16* a_ptr, const bfloat16* b_ptr, float* c_ptr, int64_t N, int64_t K) {
  DYN_SMEM(bytes);
  Stage* const stages = reinterpret_cast<Stage*>(bytes);
  const int lane = lane_index(), warp = warp_index(), thread = static_cast<int>(threadIdx.x);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * BLOCK_M, column = static_cast<int64_t>(blockIdx.y) * BLOCK_N;
  const int64_t tiles = K / BLOCK_K;
  const auto issue = [&](int64_t tile) {
    Stage& stage = stages[tile % 2];
    const int64_t k = tile * BLOCK_K + 8 * (thread % 2), beyond = DEFECT == copy_from_outside ? BLOCK_K : 0;
    cp_async_16(&stage.a[thread / 2][8 * (thread % 2)], a_ptr + (row + thread / 2) * K + k + beyond);
    if (thread < 2 * BLOCK_N) {
      cp_async_16(&stage.b[thread / 2][8 * (thread % 2)], b_ptr + (column + thread / 2) * K + k);
    }
  };

  float sums[2][4] = {};
  issue(0);
  if (DEFECT != missing_commit) cp_async_commit();
  for (int64_t tile = 0; tile < tiles; tile++) {
    if (tile + 1 < tiles) issue(tile + 1);
    if (DEFECT != missing_commit) cp_async_commit();
    if (DEFECT != missing_wait) cp_async_wait<DEFECT == wait_for_too_few ? 2 : 1>();
    if (DEFECT != missing_barrier) __syncthreads();
    const Stage& stage = stages[tile % 2];
    uint32_t a[4], b[4];
    ldmatrix_x4(a, &stage.a[16 * warp + lane % 16][8 * (lane / 16)]);
    ldmatrix_x4(b, &stage.b[lane % 8 + 8 * (lane / 16)][8 * (lane / 8 % 2)]);
    mma_m16n8k16<bfloat16>(sums[0], a, {b[0], b[1]});
    mma_m16n8k16<bfloat16>(sums[1], a, {b[2], b[3]});
    if (DEFECT != missing_second_barrier) __syncthreads();  // the stage may be filled again
  }
  cp_async_wait<0>();
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 4; j++) {
      c_ptr[(row + 16 * warp + lane / 4 + 8 * (j / 2)) * N + column + 8 * i + 2 * (lane % 4) + j % 2] = sums[i][j];
    }
  }
}

template <Defect DEFECT>
bool run_matrix_product() {
  const int64_t M = 128, N = 32, K = 80;
  const std::vector<float> a = integers(M * K), b = integers(N * K);
  std::vector<bfloat16> a_half(M * K), b_half(N * K);
  for (int64_t i = 0; i < M * K; i++) a_half[i] = narrow<bfloat16>(a[i]);
  for (int64_t i = 0; i < N * K; i++) b_half[i] = narrow<bfloat16>(b[i]);
  std::vector<float> c(M * N), expected(M * N);
  for (int64_t i = 0; i < M * N; i++) {
    for (int64_t k = 0; k < K; k++) expected[i] += a[i / N * K + k] * b[i % N * K + k];
  }
  LAUNCH(matrix_product<DEFECT>, dim3(M / BLOCK_M, N / BLOCK_N), 128, 2 * sizeof(Stage), nullptr, a_half.data(),
         b_half.data(), c.data(), N, K);
  return c == expected;
}

// ---------------------------------------------------------------------------------------------- Last block done

// The sum, its second step by the block that finishes last; the counter is left at zero. Either one thread writes for
// the block, or all do; one fences and draws the ticket.
template <Defect DEFECT, bool ALL_WRITE>
KERNEL(64)
void ticket_sum(const float* x_ptr, int64_t n, float* partial_ptr, int* counters_ptr, float* sum_ptr) {
  SMEM(is_last, bool);
  const int thread = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 64 + thread;
  const float x = i < n ? x_ptr[i] : 0.f;
  if (ALL_WRITE) {
    partial_ptr[i] = x;
    if (DEFECT == release_of_others) __threadfence();
    if (DEFECT != missing_barrier) __syncthreads();
  } else {
    const float sum = block_sum<64>(x);
    if (thread == 0) partial_ptr[blockIdx.x] = sum;
  }
  if (thread == 0) {
    if (DEFECT != missing_release_fence && DEFECT != fence_after_ticket && DEFECT != release_of_others) __threadfence();
    int* const counter = counters_ptr + (DEFECT == other_counter ? blockIdx.x % 2 : 0);
    const int ticket = atomicAdd(counter, 1);
    if (DEFECT == fence_after_ticket) __threadfence();
    is_last = DEFECT == every_block_is_last || ticket == (DEFECT == other_counter ? blocks / 2 : blocks) - 1;
    if (DEFECT != missing_acquire_fence && DEFECT != acquire_of_others) __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  if (DEFECT == acquire_of_others) __threadfence();
  float sum = 0;
  for (int64_t j = thread; j < (ALL_WRITE ? 64 * blocks : blocks); j += 64) sum += partial_ptr[j];
  sum = block_sum<64>(sum);
  if (thread != 0) return;
  *sum_ptr = sum;
  if (DEFECT != every_block_is_last) counters_ptr[0] = 0;
}

template <Defect DEFECT, bool ALL_WRITE>
bool run_ticket_sum() {
  const std::vector<float> x = integers(600);
  std::vector<float> partial(640), sum(1);
  std::vector<int> counters(2);
  float expected = 0;
  for (const float value : x) expected += value;
  for (int launch = 0; launch < 2; launch++) {
    LAUNCH((ticket_sum<DEFECT, ALL_WRITE>), 10, 64, 0, nullptr, x.data(), static_cast<int64_t>(x.size()),
           partial.data(), counters.data(), sum.data());
  }
  return sum[0] == expected && counters[0] == 0;
}
template <Defect DEFECT>
bool run_ticket_one() {
  return run_ticket_sum<DEFECT, false>();
}
template <Defect DEFECT>
bool run_ticket_all() {
  return run_ticket_sum<DEFECT, true>();
}

// ---------------------------------------------------------------------------------------------- What the race check
// tells apart

// Every thread its own byte; the neighbour's after a barrier.
template <Defect DEFECT>
KERNEL(64)
void bytes(const char* x_ptr, char* y_ptr) {
  SMEM(of_thread, char[64]);
  const int thread = static_cast<int>(threadIdx.x);
  of_thread[thread] = x_ptr[thread];
  of_thread[thread] += 1;
  if (DEFECT != missing_barrier) __syncthreads();
  y_ptr[thread] = of_thread[thread ^ 1];
}

template <Defect DEFECT>
bool run_bytes() {
  std::vector<char> x(64), y(64), expected(64);
  for (int i = 0; i < 64; i++) x[i] = static_cast<char>(i);
  for (int i = 0; i < 64; i++) expected[i] = static_cast<char>((i ^ 1) + 1);
  LAUNCH(bytes<DEFECT>, 1, 64, 0, nullptr, x.data(), y.data());
  return y == expected;
}

// Halves of a warp on paths of their own, each with a mask of its own; then one lane of each, whom the others are
// ordered before through them.
template <Defect DEFECT>
KERNEL(32)
void half_warps(const int* x_ptr, int* y_ptr) {
  SMEM(values, int[32]);
  const int lane = lane_index();
  values[lane] = x_ptr[lane];
  if (lane < 16) {
    __syncwarp(0x0000ffffu);
    y_ptr[lane] = values[lane ^ (DEFECT == lane_outside_mask ? 31 : 15)];
  } else {
    __syncwarp(0xffff0000u);
    y_ptr[lane] = values[lane ^ 15] + 1;
  }
  if (DEFECT != missing_syncwarp && lane % 16 == 0) __syncwarp(0x00010001u);
  if (lane == 0) y_ptr[32] = values[31];
}

template <Defect DEFECT>
bool run_half_warps() {
  std::vector<int> x(32), y(33), expected(33);
  for (int i = 0; i < 32; i++) x[i] = 3 * i + 1;
  for (int i = 0; i < 32; i++) expected[i] = x[i ^ 15] + (i >= 16);
  expected[32] = x[31];
  LAUNCH(half_warps<DEFECT>, 1, 32, 0, nullptr, x.data(), y.data());
  return y == expected;
}

// All threads read what one writes afterwards, a barrier between; the writer's warp reads first, others last or first.
template <Defect DEFECT>
KERNEL(128)
void write_after_reads(int* x_ptr, int* y_ptr) {
  const int thread = static_cast<int>(threadIdx.x);
  if (DEFECT != missing_barrier || thread / 32 != 2) y_ptr[thread] = x_ptr[0];
  if (DEFECT == missing_barrier && thread / 32 == 1) return;
  if (DEFECT == missing_barrier) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (thread == 0) x_ptr[0] = 5;
}

template <Defect DEFECT>
bool run_write_after_reads() {
  std::vector<int> x(1, 4), y(128);
  LAUNCH(write_after_reads<DEFECT>, 1, 128, 0, nullptr, x.data(), y.data());
  return x[0] == 5 && y == std::vector<int>(128, 4);
}

// Two blocks write the same place.
template <Defect DEFECT>
KERNEL(32)
void blocks_apart(int* x_ptr) {
  const int place = DEFECT == plain_instead_of_atomic ? 0 : static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) x_ptr[place] = 7;
}

template <Defect DEFECT>
bool run_blocks_apart() {
  std::vector<int> x(3, 7);
  LAUNCH(blocks_apart<DEFECT>, 3, 32, 0, nullptr, x.data());
  return x == std::vector<int>(3, 7);
}

// ----------------------------------------------------------------------------------------------

using Runs = std::map<std::string, bool (*)()>;
#define RUN(name, defect) {#defect, run_##name<Defect::defect>}
const std::map<std::string, Runs> specimens = {
    {"shuffle_sum",
     {RUN(shuffle_sum, none), RUN(shuffle_sum, mask_without_lane), RUN(shuffle_sum, lane_outside_mask),
      RUN(shuffle_sum, mask_with_absent_lane), RUN(shuffle_sum, different_operations)}},
    {"block_reduction",
     {RUN(block_reduction, none), RUN(block_reduction, missing_barrier), RUN(block_reduction, skipped_barrier),
      RUN(block_reduction, different_barriers), RUN(block_reduction, plain_instead_of_atomic),
      RUN(block_reduction, atomic_and_plain), RUN(block_reduction, uninitialised_shared)}},
    {"hash_insert",
     {RUN(hash_insert, none), RUN(hash_insert, missing_barrier), RUN(hash_insert, plain_instead_of_atomic)}},
    {"segment_sum",
     {RUN(segment_sum, none), RUN(segment_sum, past_global), RUN(segment_sum, before_global),
      RUN(segment_sum, misaligned)}},
    {"compaction",
     {RUN(compaction, none), RUN(compaction, missing_barrier), RUN(compaction, missing_syncwarp),
      RUN(compaction, past_shared)}},
    {"matrix_product",
     {RUN(matrix_product, none), RUN(matrix_product, missing_barrier), RUN(matrix_product, missing_second_barrier),
      RUN(matrix_product, missing_wait), RUN(matrix_product, wait_for_too_few), RUN(matrix_product, missing_commit),
      RUN(matrix_product, copy_from_outside)}},
    {"bytes", {RUN(bytes, none), RUN(bytes, missing_barrier)}},
    {"half_warps", {RUN(half_warps, none), RUN(half_warps, lane_outside_mask), RUN(half_warps, missing_syncwarp)}},
    {"write_after_reads", {RUN(write_after_reads, none), RUN(write_after_reads, missing_barrier)}},
    {"blocks_apart", {RUN(blocks_apart, none), RUN(blocks_apart, plain_instead_of_atomic)}},
    {"ticket_one",
     {RUN(ticket_one, none), RUN(ticket_one, missing_release_fence), RUN(ticket_one, missing_acquire_fence),
      RUN(ticket_one, fence_after_ticket), RUN(ticket_one, every_block_is_last), RUN(ticket_one, other_counter)}},
    {"ticket_all",
     {RUN(ticket_all, none), RUN(ticket_all, missing_release_fence), RUN(ticket_all, missing_acquire_fence),
      RUN(ticket_all, fence_after_ticket), RUN(ticket_all, missing_barrier), RUN(ticket_all, release_of_others),
      RUN(ticket_all, acquire_of_others)}},
};

int run(const std::string& name, const std::string& defect) {
  try {
    const bool right = specimens.at(name).at(defect)();
    std::printf("%s: %s\n", right ? "ok" : "wrong result", name.c_str());
    return !right;
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace protomem::cuda

int main(int count, char** arguments) {
  if (count == 1) {
    for (const auto& [name, runs] : protomem::cuda::specimens) {
      for (const auto& [defect, run] : runs) std::printf("%s %s\n", name.c_str(), defect.c_str());
    }
    return 0;
  }
  if (count != 2 && count != 4) return 2;
  cuda_host_seed(std::stoull(arguments[1]));
  if (count == 4) return protomem::cuda::run(arguments[2], arguments[3]);
  int wrong = 0;
  for (const auto& [name, runs] : protomem::cuda::specimens) wrong |= protomem::cuda::run(name, "none");
  return wrong;
}
