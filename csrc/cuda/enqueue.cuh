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
// Three launches for "fifo":
//
// 1. prepare_kernel, one warp per row: finds out which rows are usable, answers for those that are not, counts each
//    row's position in the stable order of the identities (ranks.cuh), ticks the clock.
// 2. find_kernel is the join: the memory's identities stream past once, 16 bytes at a time, and each is looked up in a
//    bit set of hashes in shared memory. The one in some hundred whose bit is set is searched for by halving in the
//    sorted identities, and leaves its slot there. The last block to finish lists the new rows in their order and deals
//    out the victims: the slots from the cursor on form a bit set too, of which the hits are taken out; a scan over the
//    words' counts numbers the bits that are left.
// 3. write_kernel: one block per slot to be written.
//
// "lru" needs the P smallest of the keys (empty or stamp, slot), which are distinct integers of up to 96 bits, between
// the last two launches. It selects the greatest of them exactly, 12 bits per launch of narrow_kernel: histogram the
// keys that may still be it, find the digit, go on inside it. Stamps count from the oldest one, so with stamps of an
// ordinary run two or three launches do all the work and the others, ceil((65 + log2 M) / 12) in all, return at once
// (the host does not know: it does not wait). collect_kernel lists the slots up to that key in any order, and the write
// kernel ranks them. For M = 1,000,000: 3 + 8 + 1 launches.
//
// Bytes: 8 M, P D numbers of the batch from memory and again from cache, as many of the memory read and written; "lru"
// reads 16 M in each launch that is not over at once. Scratch: some 60 bytes per row of the batch; "lru" one bit per
// slot. Nothing is read back to the host. D <= 1024: a row is held in registers.
//
// Deterministic: no two blocks write one place, except by integer maxima, minima, sums and bits, which do not depend on
// an order; so does nothing that collect_kernel's list is used for. A memory that breaks the invariant that an identity
// stands in one slot is served without harm: the highest slot counts. Before the last launch only notes, the clock and
// the cursor are written; in it every slot is read and written by the one block that it belongs to. The prototypes
// share no bytes with the memory: the caller sees to it.
#pragma once

#include "base/ranks.cuh"
#include "base/ticket.cuh"

namespace protomem::cuda {

constexpr int prepare_threads = 128, find_threads = 256, write_threads = 128;
constexpr int slots_per_thread = 8;  // of one step through the memory
constexpr int slots_per_step = find_threads * slots_per_thread;
constexpr int most_blocks = 1024;     // that stream; each builds the bit set of the batch's hashes
constexpr int window_bits = 1 << 15;  // slots of the ring that are looked at together
constexpr int digit_bits = 12, digits = 1 << digit_bits;
constexpr int64_t most_enqueue_columns = columns_per_thread * write_threads;

constexpr long long greatest = std::numeric_limits<long long>::max();

using Key = unsigned __int128;
using Word = unsigned long long;  // what CUDA's 64-bit atomics take

// What the launches of one call tell each other.
struct State {
  unsigned ticket;
  int new_rows;              // that need a victim
  long long oldest, newest;  // stamps of occupied slots
  Key low;                   // "lru": the key that is sought is at least this,
  int shift;                 // and less than low + 2^(shift + digit_bits); -1: it is `low`
  long long wanted;          // and so many keys from `low` up lead to it
  unsigned collected;
};

// Scratch. By position in the order of the identities (P): `ordered` the identity, `order` its row, `length` at the
// first row of an identity how many it has, 0 elsewhere, `leader` the row that counts or -1, `found` its slot or -1. By
// row (P): `usable`, and `entering_at` the position if it needs a victim, else -1. By place among the new rows:
// `entering` the position, `victims` the slots (for "lru" in any order, with their `keys`).
struct Notes {
  State* state;
  int64_t* ordered;
  long long* found;
  int64_t* victims;
  Key* keys;
  int *order, *length, *leader, *usable, *entering_at, *entering;
  unsigned* kept;       // "lru": a bit per slot, set where the batch's identities stand
  unsigned* histogram;  // "lru": one count per digit
};

struct Memory {
  Matrix rows;        // (M, D)
  Vector identities;  // (M,) int64
  Vector stamps;      // (M,) int64
  int64_t* cursor;
  int64_t* clock;
};

struct Outputs {
  int64_t* slots;
  int64_t* evicted;
  bool* known;
  Matrix previous;  // (P, D) contiguous, or without data
};

// Bits of the set of hashes: some hundred per row, in at most 32 KiB.
inline int hash_bits(int64_t P) {
  int bits = 10;
  while (bits < 18 && (int64_t{1} << bits) < 256 * P) bits++;
  return bits;
}
inline int narrowings(int64_t M) {
  int bits = 65;
  while (M > 0) {
    bits++;
    M /= 2;
  }
  return (bits + digit_bits - 1) / digit_bits;
}

DEVICE unsigned hash_of(int64_t identity, int bits) {
  return static_cast<unsigned>((static_cast<uint64_t>(identity) * 0x9e3779b97f4a7c15u) >> (64 - bits));
}

// A = the memory's dtype of accumulation, which the prototypes have.
template <class T, bool VECTOR>
KERNEL(prepare_threads)
void prepare_kernel(Memory memory, Matrix prototypes, Vector identities, Notes notes, Outputs outputs) {
  using A = Accumulator<T>;
  constexpr int WIDTH = width_of<A, VECTOR>;
  const int P = static_cast<int>(prototypes.rows), D = static_cast<int>(prototypes.cols);
  const int thread = static_cast<int>(blockIdx.x * prepare_threads + threadIdx.x);
  if (thread == 0) {
    *memory.clock += 1;
    *notes.state = {0, 0, greatest, -greatest - 1, 0, 0, 0, 0};
  }
  if (notes.histogram != nullptr) {
    for (int i = thread; i < digits; i += gridDim.x * prepare_threads) notes.histogram[i] = 0;
  }
  const int row = thread / warp_lanes;
  if (row >= P) return;

  Rank rank[1];
  rank_rows(identities, P, row, rank);
  bool broken = false, filled = false;
  for_lane_columns<WIDTH>(D, [&](int column) {
    A p[WIDTH];
    load_columns<VECTOR>(row_of<const A>(prototypes, row), prototypes.col_stride, column, p);
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      broken = broken || !(std::fabs(p[i]) < infinity<A>);
      filled = filled || p[i] != 0;
    }
  });
  broken = __any_sync(all_lanes, broken);
  filled = __any_sync(all_lanes, filled);
  const bool usable = rank[0].key >= 0 && filled && !broken;
  if (lane_index() == 0) {
    const int position = rank[0].less + rank[0].before;
    notes.ordered[position] = rank[0].key;
    notes.found[position] = -1;
    notes.order[position] = row;
    notes.length[position] = rank[0].key >= 0 && rank[0].before == 0 ? rank[0].equal : 0;
    notes.usable[row] = usable;
    notes.entering_at[row] = -1;
    outputs.slots[row] = -1;
    outputs.evicted[row] = -1;
    outputs.known[row] = false;
  }
  if (!usable && outputs.previous.data != nullptr) {  // slot 0 stands in for none, as in every backend
    const T* const from = row_of<const T>(memory.rows, 0);
    T* const to = row_of<T>(outputs.previous, row);
    for (int column = lane_index(); column < D; column += warp_lanes)
      to[column] = from[column * memory.rows.col_stride];
  }
}

// One step through a vector over the slots: this thread's slot number i of the step that begins at `base`, and what
// stands there; `missing` past the last.
template <bool VECTOR>
DEVICE int64_t slot_of(int64_t base, int i) {
  const int thread = static_cast<int>(threadIdx.x);
  return base + (VECTOR ? (i / 2 * find_threads + thread) * 2 + i % 2 : i * find_threads + thread);
}
template <bool VECTOR>
DEVICE void load_slots(const Vector& x, int64_t base, int64_t missing, int64_t (&values)[slots_per_thread]) {
  const int64_t* const from = static_cast<const int64_t*>(x.data);
#pragma unroll
  for (int i = 0; i < slots_per_thread; i += VECTOR ? 2 : 1) {
    const int64_t slot = slot_of<VECTOR>(base, i);
    if constexpr (VECTOR) {
      if (slot + 1 < x.size) {
        const Vector16<int64_t> pair = load_16_streamed(from + slot);
        values[i] = pair[0];
        values[i + 1] = pair[1];
        continue;
      }
      values[i + 1] = missing;
    }
    values[i] = slot < x.size ? from[slot * x.stride] : missing;
  }
}

// The first position whose identity is not less than this one.
DEVICE int search(const int64_t* ordered, int P, int64_t identity) {
  int low = 0, high = P;
  while (low < high) {
    const int middle = low + (high - low) / 2;
    // Negative ones, as unsigned numbers the greatest, stand behind all others.
    if (static_cast<uint64_t>(ordered[middle]) < static_cast<uint64_t>(identity)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Lists the new rows in their order; by the last block. Returns how many there are.
DEVICE int list_new_rows(const Notes& notes, int P) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int position = thread; position < P; position += find_threads) {
    const int leader = notes.leader[position];
    const long long found = notes.found[position];
    if (leader >= 0 && found < 0) notes.entering_at[leader] = position;
    if (notes.kept != nullptr && found >= 0) atomicOr(&notes.kept[found / 32], 1u << (found % 32));
  }
  __syncthreads();
  int count = 0;
  for (int start = 0; start < P; start += find_threads) {
    const int position = start + thread < P ? notes.entering_at[start + thread] : -1;
    int new_here = 0;
    const int place = count + block_exclusive_sum<find_threads>(position >= 0 ? 1 : 0, new_here);
    if (position >= 0) notes.entering[place] = position;
    count += new_here;
  }
  return count;
}

// Deals out the first `count` slots of the ring from the cursor on that the batch does not stand in, and moves the
// cursor. Among twice P slots, or all, there are always enough.
DEVICE void deal_out_ring(const Notes& notes, int P, int64_t M, int count, int64_t* cursor_ptr) {
  constexpr int words = window_bits / 32;
  SMEM(taken, unsigned[words]);
  const int thread = static_cast<int>(threadIdx.x);
  int64_t cursor = *cursor_ptr % M;
  if (cursor < 0) cursor += M;
  const int64_t window = 2 * static_cast<int64_t>(P) < M ? 2 * static_cast<int64_t>(P) : M;
  int dealt = 0;
  for (int64_t start = 0; start < window && dealt < count; start += window_bits) {
    __syncthreads();  // everyone has read the cursor, or what was taken in the window before
    for (int word = thread; word < words; word += find_threads) taken[word] = 0;
    __syncthreads();
    for (int position = thread; position < P; position += find_threads) {
      const int64_t found = notes.found[position];
      if (found < 0) continue;
      const int64_t past = (found < cursor ? found + M : found) - cursor - start;
      if (past >= 0 && past < window_bits) atomicOr(&taken[past / 32], 1u << (past % 32));
    }
    __syncthreads();
    for (int word = thread; word < words; word += find_threads) {  // as often for every thread
      const int64_t first = start + 32 * word;
      const int64_t inside = window - first;
      unsigned free = inside <= 0 ? 0 : ~taken[word] & (inside >= 32 ? ~0u : (1u << inside) - 1);
      int free_here = 0;
      int place = dealt + block_exclusive_sum<find_threads>(__popc(free), free_here);
      for (; free != 0 && place < count; free &= free - 1) {
        int64_t slot = cursor + first + __ffs(static_cast<int>(free)) - 1;
        if (slot >= M) slot -= M;
        notes.victims[place++] = slot;
        if (place == count) *cursor_ptr = slot + 1 == M ? 0 : slot + 1;
      }
      dealt += free_here;
    }
  }
}

// The order in which "lru" takes slots: empty ones, then by stamp, then by slot.
DEVICE Key key_of(const State& state, int64_t identity, int64_t stamp, int64_t slot, int64_t M) {
  const Key age = identity < 0 ? 0 : 1 + Key(static_cast<uint64_t>(stamp) - static_cast<uint64_t>(state.oldest));
  return age * static_cast<Key>(M) + static_cast<Key>(slot);
}

// Notes at each identity of the batch the slot where it stands and its leading row; the last block deals out victims.
// Dynamic shared memory: 2^bits bits.
template <bool VECTOR, bool LRU>
KERNEL(find_threads)
void find_kernel(Memory memory, Notes notes, int P, int bits) {
  DYN_SMEM(shared);
  unsigned* const hashes = reinterpret_cast<unsigned*>(shared);
  const int64_t M = memory.identities.size;
  const int thread = static_cast<int>(threadIdx.x);
  for (int word = thread; word < 1 << (bits - 5); word += find_threads) hashes[word] = 0;
  __syncthreads();
  for (int position = thread; position < P; position += find_threads) {
    const unsigned hash = hash_of(notes.ordered[position], bits);
    atomicOr(&hashes[hash / 32], 1u << (hash % 32));
  }
  for (int position = blockIdx.x * find_threads + thread; position < P; position += gridDim.x * find_threads) {
    int leader = -1;
    for (int k = notes.length[position] - 1; k >= 0; k--) {
      const int row = notes.order[position + k];
      if (notes.usable[row]) leader = row;
    }
    notes.leader[position] = leader;
  }
  __syncthreads();

  long long oldest = greatest, newest = -greatest - 1;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * slots_per_step; base < M;
       base += static_cast<int64_t>(gridDim.x) * slots_per_step) {
    int64_t identities[slots_per_thread];
    load_slots<VECTOR>(memory.identities, base, -1, identities);
    if constexpr (LRU) {
      int64_t stamps[slots_per_thread];
      load_slots<VECTOR>(memory.stamps, base, 0, stamps);
#pragma unroll
      for (int i = 0; i < slots_per_thread; i++) {
        if (identities[i] < 0) continue;
        oldest = stamps[i] < oldest ? stamps[i] : oldest;
        newest = stamps[i] > newest ? stamps[i] : newest;
      }
      const int64_t word = base / 32 + thread;
      if (thread < slots_per_step / 32 && word * 32 < M) notes.kept[word] = 0;
    }
#pragma unroll
    for (int i = 0; i < slots_per_thread; i++) {
      const unsigned hash = hash_of(identities[i], bits);
      if (identities[i] < 0 || !(hashes[hash / 32] >> (hash % 32) & 1)) continue;
      const int position = search(notes.ordered, P, identities[i]);
      if (position < P && notes.ordered[position] == identities[i]) {
        atomicMax(&notes.found[position], static_cast<long long>(slot_of<VECTOR>(base, i)));
      }
    }
  }
  if constexpr (LRU) {
    oldest = block_min<find_threads>(oldest);
    newest = block_max<find_threads>(newest);
    if (thread == 0) {
      atomicMin(&notes.state->oldest, oldest);
      atomicMax(&notes.state->newest, newest);
    }
  }

  if (!is_last_block(&notes.state->ticket)) return;
  const int count = list_new_rows(notes, P);
  if constexpr (!LRU) deal_out_ring(notes, P, M, count, memory.cursor);
  if (thread == 0) {
    State& state = *notes.state;
    state.new_rows = count;
    if constexpr (LRU) {
      state.ticket = 0;
      state.wanted = count;
      const Key ages = state.newest < state.oldest
                           ? 1
                           : 2 + Key(static_cast<uint64_t>(state.newest) - static_cast<uint64_t>(state.oldest));
      const Key most = ages * static_cast<Key>(M) - 1;
      const Word high = static_cast<Word>(most >> 64), low = static_cast<Word>(most);
      const int length = high != 0 ? 128 - __clzll(high) : 64 - __clzll(low);
      state.shift = count == 0 ? -1 : length > digit_bits ? length - digit_bits : 0;
    }
  }
}

DEVICE bool is_kept(const Notes& notes, int64_t slot) { return notes.kept[slot / 32] >> (slot % 32) & 1; }

// Finds the next digit of the key that is sought.
template <bool VECTOR>
KERNEL(find_threads)
void narrow_kernel(Memory memory, Notes notes) {
  const State state = *notes.state;
  if (state.shift < 0) return;
  SMEM(counts, unsigned[digits]);
  const int64_t M = memory.identities.size;
  const int thread = static_cast<int>(threadIdx.x);
  for (int digit = thread; digit < digits; digit += find_threads) counts[digit] = 0;
  __syncthreads();
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * slots_per_step; base < M;
       base += static_cast<int64_t>(gridDim.x) * slots_per_step) {
    int64_t identities[slots_per_thread], stamps[slots_per_thread];
    load_slots<VECTOR>(memory.identities, base, -1, identities);
    load_slots<VECTOR>(memory.stamps, base, 0, stamps);
#pragma unroll
    for (int i = 0; i < slots_per_thread; i++) {
      const int64_t slot = slot_of<VECTOR>(base, i);
      unsigned digit = digits;  // takes no part
      if (slot < M && !is_kept(notes, slot)) {
        const Key past = (key_of(state, identities[i], stamps[i], slot, M) - state.low) >> state.shift;
        if (past < digits) digit = static_cast<unsigned>(past);  // a key below `low` has wrapped around
      }
      // Neighbours mostly have the same digit: one addition then, where 32 would stand in line.
      int same = 0;
      __match_all_sync(all_lanes, digit, &same);
      if (digit < digits && (!same || lane_index() == 0)) atomicAdd(&counts[digit], same ? 32u : 1u);
    }
  }
  __syncthreads();
  for (int digit = thread; digit < digits; digit += find_threads) {
    if (counts[digit] != 0) atomicAdd(&notes.histogram[digit], counts[digit]);
  }

  if (!is_last_block(&notes.state->ticket)) return;
  constexpr int own = digits / find_threads;  // neighbouring digits of this thread
  long long sum = 0, total = 0;
  for (int digit = thread * own; digit < (thread + 1) * own; digit++) sum += notes.histogram[digit];
  long long before = block_exclusive_sum<find_threads>(sum, total);
  for (int digit = thread * own; digit < (thread + 1) * own; digit++) {
    const long long here = notes.histogram[digit];
    if (before < state.wanted && state.wanted <= before + here) {  // true once, in one thread
      notes.state->low = state.low + (static_cast<Key>(digit) << state.shift);
      notes.state->wanted = state.wanted - before;
      notes.state->shift = state.shift == 0 ? -1 : state.shift > digit_bits ? state.shift - digit_bits : 0;
    }
    before += here;
    notes.histogram[digit] = 0;
  }
  if (thread == 0) notes.state->ticket = 0;
}

// Lists the slots up to the key that was found, in any order.
template <bool VECTOR>
KERNEL(find_threads)
void collect_kernel(Memory memory, Notes notes) {
  const State state = *notes.state;
  if (state.new_rows == 0) return;
  const int64_t M = memory.identities.size;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * slots_per_step; base < M;
       base += static_cast<int64_t>(gridDim.x) * slots_per_step) {
    int64_t identities[slots_per_thread], stamps[slots_per_thread];
    load_slots<VECTOR>(memory.identities, base, -1, identities);
    load_slots<VECTOR>(memory.stamps, base, 0, stamps);
#pragma unroll
    for (int i = 0; i < slots_per_thread; i++) {
      const int64_t slot = slot_of<VECTOR>(base, i);
      if (slot >= M || is_kept(notes, slot)) continue;
      const Key key = key_of(state, identities[i], stamps[i], slot, M);
      if (key > state.low) continue;
      const unsigned place = atomicAdd(&notes.state->collected, 1u);  // below new_rows: the keys are distinct
      notes.victims[place] = slot;
      notes.keys[place] = key;
    }
  }
}

// Blocks below P refresh the slot of the identity whose first row stands at their position in the order; the others, by
// their place in the list of victims, let a new identity in.
template <class T, bool VECTOR, bool LRU>
KERNEL(write_threads)
void write_kernel(Memory memory, Matrix prototypes, Notes notes, Outputs outputs, double refresh_ratio) {
  using A = Accumulator<T>;
  constexpr int WIDTH = width_of<T, VECTOR>, GROUPS = columns_per_thread / WIDTH;
  constexpr A vanished = A(1e-6);  // a refreshed row this short has no direction: the new prototype takes its place
  const int P = static_cast<int>(prototypes.rows), D = static_cast<int>(prototypes.cols);
  int position = static_cast<int>(blockIdx.x);
  const bool known = position < P;
  int64_t slot;
  if (known) {
    slot = notes.found[position];
    if (notes.leader[position] < 0 || slot < 0) return;
  } else {
    int place = position - P;
    if (place >= notes.state->new_rows) return;
    slot = notes.victims[place];
    if constexpr (LRU) {
      const Key key = notes.keys[place];
      int earlier = 0;
      for (int other = threadIdx.x; other < notes.state->new_rows; other += write_threads)
        earlier += notes.keys[other] < key;
      place = block_sum<write_threads>(earlier);
    }
    position = notes.entering[place];
  }
  const int leader = notes.leader[position];

  T* const row = row_of<T>(memory.rows, slot);
  const int64_t stride = memory.rows.col_stride;
  A old[GROUPS][WIDTH] = {}, p[GROUPS][WIDTH] = {};
  for_own_columns<write_threads, WIDTH>(D, [&](int group, int column) {
    load_columns<VECTOR, true>(row, stride, column, old[group]);
    load_columns<VECTOR>(row_of<const A>(prototypes, leader), prototypes.col_stride, column, p[group]);
  });
  const Inverse<A> by_length(block_row_length<write_threads>(p));
  const A ratio = static_cast<A>(refresh_ratio), rest = static_cast<A>(1 - refresh_ratio);
  A blend[GROUPS][WIDTH];
#pragma unroll
  for (int group = 0; group < GROUPS; group++) {
#pragma unroll
    for (int i = 0; i < WIDTH; i++) {
      p[group][i] = by_length(p[group][i]);
      blend[group][i] = rest * old[group][i] + ratio * p[group][i];
    }
  }
  const Length<A> length = block_row_length<write_threads>(blend);
  const bool refreshed = known && length.value() > vanished && length.value() < infinity<A>;  // false for NaN
  const Inverse<A> by_blend(refreshed ? length : Length<A>{1, {1, 1}});
  if (!known || ratio != 0) {  // keeping means every bit
    for_own_columns<write_threads, WIDTH>(D, [&](int group, int column) {
      A written[WIDTH];
#pragma unroll
      for (int i = 0; i < WIDTH; i++) written[i] = refreshed ? by_blend(blend[group][i]) : p[group][i];
      store_columns<VECTOR>(row, stride, column, written);
    });
  }

  int64_t* const identity = static_cast<int64_t*>(memory.identities.data) + slot * memory.identities.stride;
  if (threadIdx.x == 0) {
    outputs.evicted[leader] = known ? -1 : *identity;
    *identity = notes.ordered[position];
    static_cast<int64_t*>(memory.stamps.data)[slot * memory.stamps.stride] = *memory.clock;
  }
  for (int k = 0; k < notes.length[position]; k++) {
    const int same = notes.order[position + k];
    if (!notes.usable[same]) continue;
    if (threadIdx.x == 0) {
      outputs.slots[same] = slot;
      outputs.known[same] = known;
    }
    if (outputs.previous.data != nullptr) {
      for_own_columns<write_threads, WIDTH>(D, [&](int group, int column) {
        store_columns<VECTOR>(row_of<T>(outputs.previous, same), 1, column, old[group]);
      });
    }
  }
}

}  // namespace protomem::cuda
