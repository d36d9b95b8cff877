// "Last block done": work for one block after all the others, without another launch.
#pragma once

#include "kernel.cuh"

namespace protomem::cuda {

// Whether this block is the last of the grid to come here; it then sees what every block wrote before. Every thread of
// every block calls it once. `ticket` is 0 before the launch; the caller sets it back if it is needed again.
DEVICE bool is_last_block(unsigned* ticket) {
  SMEM(last, bool);
  __threadfence();  // what this thread wrote comes before the ticket,
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();  // and what is read from here on comes after it
  return last;
}

}  // namespace protomem::cuda
