// "Last block done": work for one block after all the others, without another launch.
#pragma once

#include "kernel.cuh"

namespace protomem::cuda {

// Whether this block is the last of the grid to come here; it then sees what every block wrote before. Every thread of
// every block calls it once. `ticket` is 0 before the launch; the caller sets it back if it is needed again.
//
// As in the grid barrier of cooperative groups, both fences are those of the thread that draws the ticket. PTX's memory
// model makes a release of a fence and an atomic of one thread, in this order, and an acquire of an atomic and a fence;
// the barriers pass on to thread 0 what its block wrote, and to its block what thread 0 has acquired. A fence is also
// what invalidates the L1 cache of the multiprocessor, which lines read before this call may still lie in.
DEVICE bool is_last_block(unsigned* ticket) {
  SMEM(last, bool);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what this block wrote comes before the ticket,
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();  // and what it reads from here on comes after it
  }
  __syncthreads();
  return last;
}

}  // namespace protomem::cuda
