// The race check: what -fsanitize=thread makes of a kernel calls the functions at the end of this file, in place of
// ThreadSanitizer's own runtime, which knows neither fibers nor what orders the threads of a GPU.
//
// Two accesses of the same byte, one of them a write, not both atomic, by different threads, are a race unless one is
// ordered before the other:
//   threads of one block   by a __syncthreads between them; lanes of one warp by a __syncwarp too. Nothing else: a
//                          shuffle or a vote orders no memory.
//   threads of two blocks  by a ticket. The first access is followed by a __threadfence and then an atomic on some
//                          address, both of one thread of its block (past a barrier if that is another thread); the
//                          second is preceded by an atomic on the same address, later in the order of that address,
//                          and then a __threadfence, again both of one thread. Nothing else.
// A cp.async writes its destination until the wait that covers it: until then no access of it is ordered, not even by
// the thread that issued it.
//
// Every byte has its last plain write, and readers and atomics since. Blocks run one after another, so two entries of
// the running block are enough to be exact: of two different warps if there are any, else of two lanes. Of the blocks
// before, one entry is kept, one without a ticket if there is one.
#include "race.h"

#include <algorithm>
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "where.h"

namespace cuda_host::race {
namespace {

enum class Kind { read, write, atomic };

constexpr int max_threads = 1024, lanes = 32, max_reports = 4;

// When a thread did something; one between any two of its synchronisations.
struct Moment {
  uint32_t block;  // counts the launch's blocks in their order of execution
  uint32_t thread;
  uint32_t barrier;  // __syncthreads of the block before it
  uint32_t sync;     // __syncwarp of the thread before it
  uint32_t fences;   // __threadfence of the thread before it
};

struct Entry {
  uint32_t moment : 31 = 0;  // 0: none
  uint32_t async : 1 = 0;    // a cp.async that was not waited for
  int32_t site = 0;          // return address, relative to `anchor`

  explicit operator bool() const { return moment != 0; }
};

struct Cell {
  Entry write;
  Entry reads[2], earlier_read;  // of the running block, of one before
  Entry atomics[2], earlier_atomic;
};

// Cells for 4096 bytes, each for `granule` of them: as fine as the finest access so far.
struct Page {
  std::size_t granule = 4;
  std::vector<Cell> cells = std::vector<Cell>(page_bytes / 4);

  static constexpr std::size_t page_bytes = 4096;

  void refine(std::size_t finer) {
    std::vector<Cell> copies(page_bytes / finer);
    for (std::size_t i = 0; i < copies.size(); i++) copies[i] = cells[i * finer / granule];
    cells = std::move(copies);
    granule = finer;
  }
};

// An atomic that another block may build upon.
struct Release {
  uint32_t block, thread, fences;
  uint32_t fence_barrier;      // the barriers before the thread's last fence
  uint32_t fence_seen[lanes];  // what it had seen of its warp then
};

struct Acquisition {
  uintptr_t address;
  std::size_t bytes;
  std::size_t releases;  // of that address, before it
  Moment moment;
};

struct Thread {
  uint32_t moment;  // its Moment now, 0: to be made
  uint32_t sync, fences, fence_barrier;
  uint32_t seen[lanes];         // of each lane of its warp, the last `sync` that it is ordered after
  uint32_t seen_fences[lanes];  // and the fences of that lane before
  uint32_t fence_seen[lanes];   // `seen` at the last fence
};

struct State {
  bool counting = false;
  uintptr_t ignored = 0;
  std::size_t ignored_bytes = 0;

  uint32_t block = 0, barrier = 0;
  std::vector<uint64_t> blocks;  // by order of execution, their place in the grid
  std::vector<Moment> moments;
  std::vector<Thread> threads = std::vector<Thread>(max_threads);
  std::vector<uint32_t> barrier_fences;  // every thread's at the last barrier
  bool fenced = false;                   // the block has seen a fence

  std::unordered_map<uintptr_t, std::vector<Release>> releases;
  std::vector<Acquisition> acquisitions;  // of the running block

  std::unordered_map<uintptr_t, Page> pages;
  struct {
    uintptr_t number = ~uintptr_t{0};
    Page* page = nullptr;
  } recent[64];

  std::vector<std::pair<int32_t, int32_t>> reported;
  std::vector<std::string> reports;
  std::size_t races = 0;
};
State state;

void anchor() {}

int32_t site_of(const void* address) {
  return static_cast<int32_t>(reinterpret_cast<intptr_t>(address) - reinterpret_cast<intptr_t>(&anchor));
}
std::string where(int32_t site) {
  return cuda_host::where(reinterpret_cast<void*>(reinterpret_cast<intptr_t>(&anchor) + site));
}

uint32_t moment_of(uint32_t thread) {
  Thread& now = state.threads[thread];
  if (now.moment == 0) {
    now.moment = static_cast<uint32_t>(state.moments.size());
    state.moments.push_back({state.block, thread, state.barrier, now.sync, now.fences});
  }
  return now.moment;
}

Page& page_at(uintptr_t address) {
  const uintptr_t number = address / Page::page_bytes;
  auto& recent = state.recent[number % 64];
  if (recent.number != number) recent = {number, &state.pages[number]};
  return *recent.page;
}

// Calls f(cell, address) for the cells of a range.
template <class F>
void for_cells(uintptr_t address, std::size_t bytes, const F& f) {
  const uintptr_t end = address + bytes;
  while (address < end) {
    Page& page = page_at(address);
    const uintptr_t page_end = std::min(end, (address / Page::page_bytes + 1) * Page::page_bytes);
    const uintptr_t lowest_bit = (address | (page_end - address)) & -(address | (page_end - address));
    if (lowest_bit < page.granule) page.refine(lowest_bit);
    for (; address < page_end; address += page.granule)
      f(page.cells[address % Page::page_bytes / page.granule], address);
  }
}

// Whether `release` makes what a thread of its block did visible to whom acquires it: it stands before a fence of the
// releasing thread, or a barrier and then that fence.
bool covers(const Release& release, const Moment& done) {
  if (done.block != release.block) return false;
  if (done.thread == release.thread) return done.fences < release.fences;
  if (done.barrier < release.fence_barrier) return true;
  return done.thread / lanes == release.thread / lanes && done.sync <= release.fence_seen[done.thread % lanes];
}

// Whether a thread of the running block may build upon what an atomic of its block saw: that thread's fence follows,
// and for another one a barrier.
bool usable(const Acquisition& acquisition, uint32_t thread) {
  const Moment& then = acquisition.moment;
  const Thread& now = state.threads[thread];
  if (then.thread == thread) return now.fences > then.fences;
  if (then.barrier < state.barrier && state.barrier_fences[then.thread] > then.fences) return true;
  if (then.thread / lanes != thread / lanes) return false;
  const uint32_t lane = then.thread % lanes;
  return then.sync <= now.seen[lane] && then.fences < now.seen_fences[lane];
}

bool ordered(Entry entry, Kind kind, uintptr_t address, uint32_t thread) {
  if (!entry) return true;
  if (entry.async) return false;
  const Moment& then = state.moments[entry.moment];
  if (then.block == state.block) {
    if (then.thread == thread || then.barrier < state.barrier) return true;
    return then.thread / lanes == thread / lanes && then.sync <= state.threads[thread].seen[then.thread % lanes];
  }
  for (const Acquisition& acquisition : state.acquisitions) {
    if (!usable(acquisition, thread)) continue;
    const std::vector<Release>& releases = state.releases[acquisition.address];
    for (std::size_t i = 0; i < acquisition.releases; i++) {
      const bool itself = kind == Kind::atomic && address - acquisition.address < acquisition.bytes &&
                          releases[i].block == then.block && releases[i].thread == then.thread;
      if (itself || covers(releases[i], then)) return true;
    }
  }
  return false;
}

// Whether any later block could be ordered after an access of an earlier one.
bool released(Entry entry) {
  const Moment& then = state.moments[entry.moment];
  for (const auto& [address, releases] : state.releases) {
    for (const Release& release : releases) {
      if (covers(release, then)) return true;
    }
  }
  return false;
}

void remember(Entry (&entries)[2], Entry& earlier, Entry entry) {
  const uint32_t thread = state.moments[entry.moment].thread, warp = thread / lanes;
  for (Entry& old : entries) {
    if (!old) continue;
    const Moment& then = state.moments[old.moment];
    if (then.block != state.block) {
      if (!earlier || released(earlier)) earlier = old;
      old = {};
    } else if (then.barrier < state.barrier || then.thread == thread) {
      old = {};
    }
  }
  for (Entry& old : entries) {
    if (!old) {
      old = entry;
      return;
    }
  }
  const Moment first = state.moments[entries[0].moment], second = state.moments[entries[1].moment];
  if (first.thread / lanes != second.thread / lanes) return;
  if (first.thread / lanes != warp || first.sync <= state.threads[thread].seen[first.thread % lanes]) {
    entries[0] = entry;
  } else if (second.sync <= state.threads[thread].seen[second.thread % lanes]) {
    entries[1] = entry;
  }
}

void report(Kind kind, uintptr_t address, std::size_t bytes, Entry mine, Kind other_kind, Entry other) {
  state.races++;
  const std::pair<int32_t, int32_t> sites(mine.site, other.site);
  if (state.reports.size() >= max_reports ||
      std::find(state.reported.begin(), state.reported.end(), sites) != state.reported.end()) {
    return;
  }
  state.reported.push_back(sites);
  const auto line = [](Kind kind, Entry entry) {
    const char* const names[] = {"read", "write", "atomic operation"};
    const Moment& moment = state.moments[entry.moment];
    return std::string(entry.async ? "cp.async that was not waited for" : names[static_cast<int>(kind)]) + " by " +
           name_of(state.blocks[moment.block], static_cast<int>(moment.thread)) + "\n    at " + where(entry.site);
  };
  char place[64];
  std::snprintf(place, sizeof place, "%p (access of %zu bytes)", reinterpret_cast<void*>(address), bytes);
  state.reports.push_back(std::string("data race on ") + place + "\n  " + line(kind, mine) + "\n  " +
                          line(other_kind, other));
}

void access(Kind kind, const void* pointer, std::size_t bytes, uint32_t thread, const void* site) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(pointer);
  if (start - state.ignored < state.ignored_bytes) return;
  Entry mine;
  mine.moment = moment_of(thread);
  mine.site = site_of(site);
  for_cells(start, bytes, [&](Cell& cell, uintptr_t address) {
    const auto check = [&](Kind other_kind, Entry other) {
      if (!ordered(other, other_kind, address, thread)) report(kind, address, bytes, mine, other_kind, other);
    };
    // The same thread again, with nothing in between.
    const bool again = kind == Kind::read && cell.reads[0].moment == mine.moment;
    if (again && !cell.atomics[0] && !cell.earlier_atomic) return;

    check(Kind::write, cell.write);
    if (kind != Kind::read) {
      for (const Entry read : cell.reads) check(Kind::read, read);
      check(Kind::read, cell.earlier_read);
    }
    if (kind != Kind::atomic) {
      for (const Entry atomic : cell.atomics) check(Kind::atomic, atomic);
      check(Kind::atomic, cell.earlier_atomic);
    }
    switch (kind) {
      case Kind::read: remember(cell.reads, cell.earlier_read, mine); break;
      case Kind::atomic: remember(cell.atomics, cell.earlier_atomic, mine); break;
      case Kind::write:
        cell = {};  // what is ordered after this write is ordered after what was before it
        cell.write = mine;
        break;
    }
  });
}

// A read-modify-write sees every earlier one of its address, and is seen by every later one.
void exchange_tickets(const void* pointer, std::size_t bytes, uint32_t thread) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (address - state.ignored < state.ignored_bytes) return;
  const auto found = state.releases.find(address);
  if (found != state.releases.end()) {
    const Moment& now = state.moments[moment_of(thread)];
    state.acquisitions.push_back({address, bytes, found->second.size(), now});
  }
  if (!state.fenced) return;
  const Thread& now = state.threads[thread];
  Release release{state.block, thread, now.fences, now.fence_barrier, {}};
  std::copy_n(now.fence_seen, lanes, release.fence_seen);
  state.releases[address].push_back(release);
}

}  // namespace

void mute() { state.counting = false; }
void unmute() { state.counting = true; }
void ignore(const void* begin, std::size_t bytes) {
  state.ignored = reinterpret_cast<uintptr_t>(begin);
  state.ignored_bytes = bytes;
}

// Launches are ordered: each starts with nothing remembered.
void begin_launch() {
  state.pages.clear();
  for (auto& recent : state.recent) recent = {};
  state.moments.assign(1, {});
  state.blocks.clear();
  state.releases.clear();
  state.reported.clear();
  state.reports.clear();
  state.races = 0;
}

std::string end_launch(const char* kernel) {
  state.counting = false;
  if (state.races == 0) return "";
  std::string text = "kernel " + std::string(kernel) + ": " + std::to_string(state.races) + " races";
  for (const std::string& report : state.reports) text += "\n" + report;
  return text;
}

void begin_block(uint64_t block) {
  state.block = static_cast<uint32_t>(state.blocks.size());
  state.blocks.push_back(block);
  state.barrier = 0;
  state.fenced = false;
  state.acquisitions.clear();
  state.barrier_fences.assign(max_threads, 0);
  for (Thread& thread : state.threads) {
    thread = {};
    thread.sync = 1;  // 0 in `seen`: nothing yet
  }
}

void forget(const void* begin, std::size_t bytes) {
  for_cells(reinterpret_cast<uintptr_t>(begin), bytes, [](Cell& cell, uintptr_t) { cell = {}; });
}

void barrier_done() {
  state.barrier++;
  for (Thread& thread : state.threads) thread.moment = 0;
  if (!state.fenced) return;
  for (std::size_t i = 0; i < max_threads; i++) state.barrier_fences[i] = state.threads[i].fences;
}

void warp_synced(int warp, unsigned mask) {
  Thread* const of_lane = &state.threads[static_cast<std::size_t>(warp) * lanes];
  uint32_t seen[lanes] = {}, seen_fences[lanes] = {};
  for (int lane = 0; lane < lanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    for (int other = 0; other < lanes; other++) {
      seen[other] = std::max(seen[other], of_lane[lane].seen[other]);
      seen_fences[other] = std::max(seen_fences[other], of_lane[lane].seen_fences[other]);
    }
  }
  for (int lane = 0; lane < lanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    seen[lane] = of_lane[lane].sync++;
    seen_fences[lane] = of_lane[lane].fences;
  }
  for (int lane = 0; lane < lanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    std::copy_n(seen, lanes, of_lane[lane].seen);
    std::copy_n(seen_fences, lanes, of_lane[lane].seen_fences);
    of_lane[lane].moment = 0;
  }
}

void fence() {
  Thread& thread = state.threads[static_cast<std::size_t>(running_thread())];
  thread.fences++;
  thread.fence_barrier = state.barrier;
  std::copy_n(thread.seen, lanes, thread.fence_seen);
  thread.moment = 0;
  state.fenced = true;
}

void copy_issued(const void* shared, int bytes, const void* global, int valid, const void* site) {
  const auto thread = static_cast<uint32_t>(running_thread());
  if (valid > 0) access(Kind::read, global, static_cast<std::size_t>(valid), thread, site);
  access(Kind::write, shared, static_cast<std::size_t>(bytes), thread, site);
  for_cells(reinterpret_cast<uintptr_t>(shared), static_cast<std::size_t>(bytes),
            [](Cell& cell, uintptr_t) { cell.write.async = 1; });
}

void copy_done(const void* shared, int bytes, const void* site) {
  Entry mine;
  mine.moment = moment_of(static_cast<uint32_t>(running_thread()));
  mine.site = site_of(site);
  for_cells(reinterpret_cast<uintptr_t>(shared), static_cast<std::size_t>(bytes), [&](Cell& cell, uintptr_t) {
    cell = {};
    cell.write = mine;
  });
}

void read_by_lane(int lane, const void* address, std::size_t bytes, const void* site) {
  access(Kind::read, address, bytes, static_cast<uint32_t>(running_thread() / lanes * lanes + lane), site);
}

namespace {

// From a kernel. What the check itself calls may have been compiled with the kernel, hence `counting`.
void note(Kind kind, const volatile void* address, std::size_t bytes, const void* site, bool ticket = false) {
  if (!state.counting) return;
  state.counting = false;
  const auto thread = static_cast<uint32_t>(running_thread());
  access(kind, const_cast<const void*>(address), bytes, thread, site);
  if (ticket) exchange_tickets(const_cast<const void*>(address), bytes, thread);
  state.counting = true;
}

}  // namespace
}  // namespace cuda_host::race

// What GCC and Clang call under -fsanitize=thread.
using cuda_host::race::Kind;
using cuda_host::race::note;
#define SITE __builtin_return_address(0)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
void __tsan_atomic_signal_fence(int) {}
void __tsan_read_range(void* address, unsigned long bytes) { note(Kind::read, address, bytes, SITE); }
void __tsan_write_range(void* address, unsigned long bytes) { note(Kind::write, address, bytes, SITE); }

#define ACCESS(bytes)                                                                                   \
  void __tsan_read##bytes(void* address) { note(Kind::read, address, bytes, SITE); }                    \
  void __tsan_write##bytes(void* address) { note(Kind::write, address, bytes, SITE); }                  \
  void __tsan_unaligned_read##bytes(void* address) { note(Kind::read, address, bytes, SITE); }          \
  void __tsan_unaligned_write##bytes(void* address) { note(Kind::write, address, bytes, SITE); }        \
  void __tsan_volatile_read##bytes(void* address) { note(Kind::read, address, bytes, SITE); }           \
  void __tsan_volatile_write##bytes(void* address) { note(Kind::write, address, bytes, SITE); }         \
  void __tsan_unaligned_volatile_read##bytes(void* address) { note(Kind::read, address, bytes, SITE); } \
  void __tsan_unaligned_volatile_write##bytes(void* address) { note(Kind::write, address, bytes, SITE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

#define FETCH(bits, T, name, expression)                              \
  T __tsan_atomic##bits##_##name(volatile T* address, T value, int) { \
    note(Kind::atomic, address, sizeof(T), SITE, true);               \
    const T old = *address;                                           \
    *address = static_cast<T>(expression);                            \
    return old;                                                       \
  }
#define ATOMIC(bits, T)                                                                                      \
  T __tsan_atomic##bits##_load(const volatile T* address, int) {                                             \
    note(Kind::atomic, address, sizeof(T), SITE);                                                            \
    return *address;                                                                                         \
  }                                                                                                          \
  void __tsan_atomic##bits##_store(volatile T* address, T value, int) {                                      \
    note(Kind::atomic, address, sizeof(T), SITE);                                                            \
    *address = value;                                                                                        \
  }                                                                                                          \
  FETCH(bits, T, exchange, value)                                                                            \
  FETCH(bits, T, fetch_add, old + value)                                                                     \
  FETCH(bits, T, fetch_sub, old - value)                                                                     \
  FETCH(bits, T, fetch_and, old& value)                                                                      \
  FETCH(bits, T, fetch_or, old | value)                                                                      \
  FETCH(bits, T, fetch_xor, old ^ value)                                                                     \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* address, T* expected, T desired, int, int) { \
    note(Kind::atomic, address, sizeof(T), SITE, true);                                                      \
    const T old = *address;                                                                                  \
    const bool same = old == *expected;                                                                      \
    if (same) *address = desired;                                                                            \
    *expected = old;                                                                                         \
    return same;                                                                                             \
  }
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
}
