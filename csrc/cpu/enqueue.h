// enqueue_: the batch's prototypes go into the circular memory, in place.
//
// The memory has M slots; slot s holds a unit row w_s (D numbers), an identity and a stamp. The batch brings P <= M
// rows p_i with identities. A row is usable if it is finite, not zero and its identity is not negative; the first
// usable row of an identity leads, its later ones only learn its slot. With u(x) = x / |x| and the ratio r, a leading
// row whose identity stands at slot s refreshes it,
//
//   w_s <- u((1 - r) w_s + r u(p_i)),   or u(p_i) where that sum is no longer than 1e-6;   r = 0: not a bit changes,
//
// and any other takes the next victim v: w_v <- u(p_i). Victims are, for "fifo", the slots from the cursor upwards
// modulo M; for "lru", empty slots in ascending order, then the smallest (stamp, slot). Slots whose identity is in the
// batch, usable or not, are no victims.
//
// How: the batch's identities go into a small hash table with a filter before it (32 bytes a row; in L1 for batches of
// some hundred), and the memory's identities stream past it once: multiply, look up one byte, and for the one in a
// hundred that passes, search the table. "lru" streams identities and stamps a second time, and every thread keeps the
// oldest that it has seen in a heap; "fifo" looks only at the slots that it walks over. Bytes: 8 M (lru: 24 M), 2 P D
// numbers read and P D written. Scratch: some words per row of the batch, lru: per row and thread.
//
// Deterministic: the victims do not depend on how the memory is cut into ranges. All scratch is allocated before the
// first write. A memory that breaks the invariant that an identity stands in one slot only is served without harm: the
// highest slot counts.
#pragma once

#include "../views.h"
#include "base/parallel.h"

namespace protomem {

struct EnqueueArgs {
  Matrix memory;             // (M, D), written
  Vector memory_identities;  // (M,) int64, written
  Vector stamps;             // (M,) int64, written
  int64_t* cursor;           // written
  int64_t* clock;            // written
  Matrix prototypes;         // (P, D); shares no bytes with `memory`
  Vector identities;         // (P,)
  double refresh_ratio;
  bool lru;
  // Outputs.
  Array<int64_t> slots;    // (P,) where the row's identity stands now, -1: not usable
  Array<int64_t> evicted;  // (P,) the identity that had to leave for this row, or -1
  Array<bool> known;       // (P,) usable, and its identity stood in the memory before
  Matrix previous;         // (P, D) what stood in the row's slot before (slot 0 for unusable rows), or null
};

}  // namespace protomem
