// Runs a program of memory accesses and synchronisations that a test made up: test_race_oracle.py.
#include "../../csrc/cuda/base/kernel.cuh"
#include "driver.h"

namespace protomem::cuda {
namespace {

enum Step { read = 1, write, add, barrier, sync_warp, fence, ticket };

// steps[block][step][thread] = {what, argument}; a barrier is for all threads of the block.
KERNEL(64)
void program(const int* steps_ptr, int64_t steps, int* data_ptr, int* tickets_ptr, int* sums_ptr) {
  int sum = 0;
  for (int64_t step = 0; step < steps; step++) {
    const int* const own = steps_ptr + 2 * ((blockIdx.x * steps + step) * 64 + threadIdx.x);
    const int what = own[0], argument = own[1];
    if (what == read) sum += data_ptr[argument];
    if (what == write) data_ptr[argument] = 1;
    if (what == add) atomicAdd(data_ptr + argument, 1);
    if (what == barrier) __syncthreads();
    if (what == sync_warp) __syncwarp(static_cast<unsigned>(argument));
    if (what == fence) __threadfence();
    if (what == ticket) atomicAdd(tickets_ptr + argument, 1);
  }
  sums_ptr[blockIdx.x * 64 + threadIdx.x] = sum;  // or the reads would be left out
}

}  // namespace
}  // namespace protomem::cuda

EXPORT const char* program_int32(const int* steps_ptr, int64_t blocks, int64_t steps, int* data_ptr, int* tickets_ptr,
                                 int* sums_ptr) {
  using namespace protomem::cuda;
  return guarded([&] { LAUNCH(program, blocks, 64, 0, nullptr, steps_ptr, steps, data_ptr, tickets_ptr, sums_ptr); });
}
