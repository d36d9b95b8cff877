// Runs kernels: one fiber per CUDA thread, blocks one after another, all on one OS thread. csrc/cuda_host/README.md.
//
// A fiber runs until it waits (at a barrier, or in a warp operation for the other lanes) or returns; the scheduler then
// resumes the next one that can run. When none can and not all have returned, somebody waits for what never comes: that
// is an error, and the message says who and where. An error abandons all fibers (kernels own nothing) and leaves
// launch() as an exception.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_host.h"
#include "race.h"
#include "where.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "switching fibers is written for x86-64"
#endif

// void switch_stack(void** from, void* to): saves what a callee must keep, and the stack pointer to *from; goes on at
// `to`.
asm(R"(
.text
.type cuda_host_switch_stack, @function
cuda_host_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch_stack, .-cuda_host_switch_stack
)");
extern "C" void cuda_host_switch_stack(void** from, void* to) __asm__("cuda_host_switch_stack");

namespace cuda_host {
namespace {

constexpr unsigned max_threads = 1024;
constexpr std::size_t stack_bytes = 256 * 1024;  // touched pages alone cost memory
constexpr std::size_t guard_bytes = 4096;
constexpr std::size_t max_shared_bytes = 227 * 1024;  // of a block, on sm_90 and sm_100

enum class State { ready, at_barrier, in_collective, done };

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
  int group;  // counts this thread's commits; -1 before its own
  const void* site;
};

struct Fiber {
  State state;
  uint3 index;
  void* stack_pointer;
  void* fake_stack;  // AddressSanitizer's
  const void* site;  // where it waits
  // at_barrier
  const void* barrier;
  // in_collective
  const char* operation;
  unsigned mask;
  void* argument;
  void (*run)(Lanes, unsigned);
  // cp.async
  std::vector<Copy> copies;
  int groups;
};

struct Shared {
  const void* key;
  void* memory;
  std::size_t bytes;
};

struct Runtime {
  const char* kernel = nullptr;
  dim3 grid, block;
  uint3 block_index;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  unsigned threads = 0;

  unsigned char* stacks = nullptr;
  std::vector<Fiber> fibers;
  int running = -1;  // -1: the scheduler
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;

  std::vector<Shared> shared;
  unsigned char* dynamic = nullptr;
  std::size_t shared_bytes = 0, dynamic_bytes = 0;

  unsigned arrived[max_threads / 32] = {};  // by warp: lanes in a collective
  unsigned waiting = 0, predicates = 0;
  int barrier_result = 0;

  uint64_t seed = 0, random = 0;
  std::string error;
};
Runtime runtime;

uint64_t draw() {  // splitmix64
  uint64_t x = runtime.random += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

template <class T>
void shuffle_order(std::vector<T>& order) {
  if (runtime.seed == 0) return;
  for (std::size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
}

unsigned char* stack_of(int thread) { return runtime.stacks + static_cast<std::size_t>(thread) * stack_bytes; }

void switch_to_fiber(int thread) {
  runtime.running = thread;
  Fiber& fiber = runtime.fibers[thread];
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&runtime.scheduler_fake_stack, stack_of(thread) + guard_bytes,
                                 stack_bytes - guard_bytes);
#endif
  cuda_host_switch_stack(&runtime.scheduler, fiber.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(runtime.scheduler_fake_stack, nullptr, nullptr);
#endif
  runtime.running = -1;
}

void switch_to_scheduler() {
  Fiber& fiber = runtime.fibers[runtime.running];
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fiber.state == State::done ? nullptr : &fiber.fake_stack, runtime.scheduler_stack,
                                 runtime.scheduler_stack_bytes);
#endif
  race::mute();
  cuda_host_switch_stack(&fiber.stack_pointer, runtime.scheduler);
  race::unmute();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* text, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(buffer, sizeof buffer, text, arguments);
  va_end(arguments);
  return buffer;
}

uint3 block_at(uint64_t i) {
  const dim3 grid = runtime.grid;
  return {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
          static_cast<unsigned>(i / grid.x / grid.y)};
}

std::string name_of(uint3 index) { return format("(%u, %u, %u)", index.x, index.y, index.z); }

std::string describe(const std::string& message, int thread, const void* site) {
  std::string text = message + "\n  kernel " + runtime.kernel + ", block " + name_of(runtime.block_index);
  if (thread >= 0) text += ", thread " + name_of(runtime.fibers[thread].index);
  if (site != nullptr) text += "\n  at " + where(site);
  return text;
}

// Ends the launch; called by a fiber, which is abandoned: nothing it owns is freed.
[[noreturn]] void fail(int thread, const void* site, const char* text, ...) __attribute__((format(printf, 3, 4)));
[[noreturn]] void fail(int thread, const void* site, const char* text, ...) {
  race::mute();
  char message[256];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(message, sizeof message, text, arguments);
  va_end(arguments);
  runtime.error = describe(message, thread, site);
  switch_to_scheduler();
  __builtin_unreachable();
}

void finish_copies(Fiber& fiber, int pending) {
  const int newest = fiber.groups - pending;  // groups below it are waited for
  auto keep = fiber.copies.begin();
  for (Copy& copy : fiber.copies) {
    if (copy.group < 0 || copy.group >= newest) {
      *keep++ = copy;
      continue;
    }
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
    race::copy_done(copy.to, copy.bytes, copy.site);
  }
  fiber.copies.erase(keep, fiber.copies.end());
}

// Returns, and so leaves none of AddressSanitizer's red zones on the stack, which the next block uses again.
__attribute__((noinline)) void run_kernel() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &runtime.scheduler_stack, &runtime.scheduler_stack_bytes);
#endif
  race::unmute();
  runtime.body(runtime.context);
  race::mute();
  const Fiber& fiber = runtime.fibers[runtime.running];
  if (!fiber.copies.empty())
    fail(runtime.running, fiber.copies.front().site, "a thread returns while its cp.async is under way");
}

__attribute__((no_sanitize("address"))) void fiber_main() {
  run_kernel();
  runtime.fibers[runtime.running].state = State::done;
  switch_to_scheduler();
  __builtin_unreachable();
}

// A new fiber's stack is that of one that was about to return into fiber_main.
void prepare(Fiber& fiber, int thread) {
  void** top = reinterpret_cast<void**>(stack_of(thread) + stack_bytes);
  *--top = nullptr;  // where a call would have left a return address: fiber_main returns nowhere
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int registers = 0; registers < 6; registers++) *--top = nullptr;
  const dim3 block = runtime.block;
  const unsigned i = static_cast<unsigned>(thread);
  fiber = Fiber{};
  fiber.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  fiber.stack_pointer = top;
}

// Nobody can go on: who waits where.
std::string deadlock() {
  std::string text = "deadlock";
  int shown = 0;
  const void* barrier = nullptr;
  for (unsigned thread = 0; thread < runtime.threads; thread++) {
    const Fiber& fiber = runtime.fibers[thread];
    if (fiber.state == State::at_barrier) {
      if (barrier != nullptr && fiber.barrier != barrier) text = "threads wait at different __syncthreads";
      barrier = fiber.barrier;
    }
  }
  const auto returned = std::find_if(runtime.fibers.begin(), runtime.fibers.begin() + runtime.threads,
                                     [](const Fiber& fiber) { return fiber.state == State::done; });
  if (barrier != nullptr && text == "deadlock" && returned != runtime.fibers.begin() + runtime.threads) {
    text = "__syncthreads that not every thread reaches: thread " + name_of(returned->index) + " has returned";
  }
  text = describe(text, -1, nullptr);
  std::vector<std::pair<State, const void*>> seen;
  for (unsigned thread = 0; thread < runtime.threads && shown < 8; thread++) {
    const Fiber& fiber = runtime.fibers[thread];
    if (fiber.state == State::done) continue;
    const std::pair<State, const void*> place(fiber.state, fiber.site);
    if (std::find(seen.begin(), seen.end(), place) != seen.end()) continue;
    seen.push_back(place);
    shown++;
    text += "\n  thread " + name_of(fiber.index) + " waits in ";
    if (fiber.state == State::at_barrier) {
      text += "__syncthreads";
    } else {
      text += format("%s with mask 0x%08x", fiber.operation, fiber.mask);
      const unsigned first = thread / 32 * 32;
      for (unsigned lane = 0; lane < 32; lane++) {
        if (!(fiber.mask >> lane & 1)) continue;
        const bool exists = first + lane < runtime.threads;
        if (!exists || runtime.fibers[first + lane].state == State::done) {
          text += format(" (lane %u %s)", lane, exists ? "has returned" : "does not exist");
          break;
        }
      }
    }
    text += " at " + where(fiber.site);
  }
  return text;
}

void free_shared() {
  for (const Shared& array : runtime.shared) {
    race::forget(array.memory, array.bytes);
    std::free(array.memory);
  }
  runtime.shared.clear();
  runtime.shared_bytes = 0;
  runtime.dynamic = nullptr;
}

void run_block(uint64_t block, std::vector<unsigned>& order) {
  runtime.block_index = block_at(block);
  race::begin_block(block);
  runtime.waiting = runtime.predicates = 0;
  std::fill(std::begin(runtime.arrived), std::end(runtime.arrived), 0u);
  for (unsigned thread = 0; thread < runtime.threads; thread++) prepare(runtime.fibers[thread], thread);
  for (;;) {
    shuffle_order(order);
    bool progress = false;
    unsigned done = 0;
    for (const unsigned thread : order) {
      Fiber& fiber = runtime.fibers[thread];
      if (fiber.state == State::done) done++;
      if (fiber.state != State::ready) continue;
      progress = true;
      switch_to_fiber(thread);
      if (!runtime.error.empty()) return;
    }
    if (progress) continue;
    if (done == runtime.threads) break;
    const bool complete = runtime.waiting == runtime.threads &&
                          std::all_of(runtime.fibers.begin(), runtime.fibers.begin() + runtime.threads,
                                      [](const Fiber& fiber) { return fiber.barrier == runtime.fibers[0].barrier; });
    if (!complete) {
      runtime.error = deadlock();
      return;
    }
    for (unsigned thread = 0; thread < runtime.threads; thread++) runtime.fibers[thread].state = State::ready;
    runtime.barrier_result = static_cast<int>(runtime.predicates);
    runtime.waiting = runtime.predicates = 0;
    race::barrier_done();
  }
  free_shared();
}

void* allocate(std::size_t bytes, std::size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max<std::size_t>(alignment, 16), std::max<std::size_t>(bytes, 1)) != 0) {
    throw std::bad_alloc();
  }
  std::memset(memory, 0xff, bytes);
  return memory;
}

}  // namespace

uint3 thread_index() { return runtime.fibers[runtime.running].index; }
uint3 block_index() { return runtime.block_index; }
dim3 block_size() { return runtime.block; }
dim3 grid_size() { return runtime.grid; }
int running_thread() { return runtime.running; }
std::string name_of(uint64_t block, int thread) {
  return "block " + name_of(block_at(block)) + ", thread " + name_of(runtime.fibers[thread].index);
}
int lane_index() { return runtime.running % 32; }

static int64_t launches = 0;

void launch(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes, void (*body)(void*), void* context) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  launches++;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > max_threads || block.z > 64) {
    throw std::runtime_error(std::string(kernel) + ": a block has 1 to 1024 threads, not " + std::to_string(threads));
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error(std::string(kernel) + ": a grid has at most 2^31 - 1 by 65535 by 65535 blocks");
  }
  if (runtime.stacks == nullptr) {
    void* stacks = mmap(nullptr, max_threads * stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) throw std::bad_alloc();
    runtime.stacks = static_cast<unsigned char*>(stacks);
    for (unsigned i = 0; i < max_threads; i++) mprotect(stack_of(static_cast<int>(i)), guard_bytes, PROT_NONE);
    runtime.fibers.resize(max_threads);
    race::ignore(runtime.stacks, max_threads * stack_bytes);
#ifdef __SANITIZE_ADDRESS__
    __asan_set_error_report_callback([](const char*) {
      if (runtime.running < 0) return;
      std::fputs((describe("AddressSanitizer's report is of", runtime.running, nullptr) + "\n").c_str(), stderr);
    });
#endif
  }
  runtime.kernel = kernel;
  runtime.grid = grid;
  runtime.block = block;
  runtime.threads = static_cast<unsigned>(threads);
  runtime.body = body;
  runtime.context = context;
  runtime.dynamic_bytes = shared_bytes;
  runtime.random = runtime.seed;
  runtime.error.clear();

  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  shuffle_order(blocks);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  race::begin_launch();
  for (const uint64_t i : blocks) {
    run_block(i, order);
    if (!runtime.error.empty()) break;
  }
  const std::string races = race::end_launch(kernel);
  if (!runtime.error.empty()) {
    free_shared();
#ifdef __SANITIZE_ADDRESS__
    // The abandoned frames' red zones.
    for (unsigned i = 0; i < runtime.threads; i++) {
      __asan_unpoison_memory_region(stack_of(static_cast<int>(i)) + guard_bytes, stack_bytes - guard_bytes);
    }
#endif
    throw std::runtime_error(races.empty() ? runtime.error : runtime.error + "\n" + races);
  }
  if (!races.empty()) throw std::runtime_error(races);
}

void* shared(const void* key, std::size_t bytes, std::size_t alignment) {
  for (const Shared& array : runtime.shared) {
    if (array.key == key) return array.memory;
  }
  runtime.shared_bytes += bytes;
  if (runtime.shared_bytes > max_shared_bytes) {
    fail(runtime.running, __builtin_return_address(0), "a block takes %zu bytes of shared memory, the most is %zu",
         runtime.shared_bytes, max_shared_bytes);
  }
  race::mute();
  runtime.shared.push_back({key, allocate(bytes, alignment), bytes});
  race::unmute();
  return runtime.shared.back().memory;
}

unsigned char* dynamic_shared() {
  if (runtime.dynamic == nullptr) {
    runtime.dynamic = static_cast<unsigned char*>(shared(&runtime.dynamic, runtime.dynamic_bytes, 16));
  }
  return runtime.dynamic;
}

int barrier(const void* key, bool predicate) {
  Fiber& fiber = runtime.fibers[runtime.running];
  fiber.state = State::at_barrier;
  fiber.barrier = key;
  fiber.site = __builtin_return_address(0);
  runtime.waiting++;
  runtime.predicates += predicate;
  switch_to_scheduler();
  return runtime.barrier_result;
}

void collective_at(const char* operation, unsigned mask, void* argument, void (*run)(Lanes, unsigned),
                   const void* site) {
  const int thread = runtime.running, lane = thread % 32;
  Fiber* const warp = &runtime.fibers[thread - lane];
  if (!(mask >> lane & 1)) {
    fail(runtime.running, site, "%s: the mask 0x%08x lacks lane %d, which takes part", operation, mask, lane);
  }
  Fiber& fiber = warp[lane];
  fiber.state = State::in_collective;
  fiber.operation = operation;
  fiber.mask = mask;
  fiber.argument = argument;
  fiber.run = run;
  fiber.site = site;
  unsigned& arrived = runtime.arrived[thread / 32];
  arrived |= 1u << lane;
  bool complete = (arrived & mask) == mask;
  void* arguments[32] = {};
  for (int other = 0; other < 32 && complete; other++) {
    if (!(mask >> other & 1)) continue;
    complete = warp[other].mask == mask && warp[other].run == run && std::strcmp(warp[other].operation, operation) == 0;
    arguments[other] = warp[other].argument;
  }
  if (!complete) {
    switch_to_scheduler();
    return;
  }
  race::mute();
  run(arguments, mask);
  race::unmute();
  arrived &= ~mask;
  for (int other = 0; other < 32; other++) {
    if (mask >> other & 1) warp[other].state = State::ready;
  }
}

void collective(const char* operation, unsigned mask, void* argument, void (*run)(Lanes, unsigned)) {
  collective_at(operation, mask, argument, run, __builtin_return_address(0));
}

void sync_warp(unsigned mask) {
  const auto run = [](Lanes, unsigned mask) { race::warp_synced(runtime.running / 32, mask); };
  collective_at("__syncwarp", mask, nullptr, run, __builtin_return_address(0));
}

void fail_lane(int lane, const char* message) {
  const int thread = runtime.running / 32 * 32 + lane;
  const Fiber& fiber = runtime.fibers[thread];
  fail(thread, fiber.site, "%s: %s", fiber.operation, message);
}

void fence() { race::fence(); }

void check_aligned(const void* pointer, std::size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail(runtime.running, __builtin_return_address(0), "misaligned: a vector of %zu bytes at %p", bytes, pointer);
  }
}

void cp_async(void* shared, const void* global, int bytes, int valid) {
  const void* const site = __builtin_return_address(0);
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    fail(runtime.running, site, "misaligned: cp.async of %d bytes from %p to %p", bytes, global, shared);
  }
  if (valid < 0 || valid > bytes) fail(runtime.running, site, "cp.async of %d bytes with %d valid ones", bytes, valid);
  const bool inside = std::any_of(runtime.shared.begin(), runtime.shared.end(), [&](const Shared& array) {
    const auto* begin = static_cast<unsigned char*>(array.memory);
    return static_cast<unsigned char*>(shared) >= begin &&
           static_cast<unsigned char*>(shared) + bytes <= begin + array.bytes;
  });
  if (!inside) fail(runtime.running, site, "cp.async to %p, which is not shared memory", shared);
#ifdef __SANITIZE_ADDRESS__
  // Here, for the copy itself happens at the wait.
  if (__asan_region_is_poisoned(const_cast<void*>(global), valid) != nullptr) {
    fail(runtime.running, site, "cp.async of %d bytes from %p, out of bounds", valid, global);
  }
#endif
  race::mute();
  race::copy_issued(shared, bytes, global, valid, site);
  std::memset(shared, 0xff, bytes);
  Fiber& fiber = runtime.fibers[runtime.running];
  fiber.copies.push_back(
      {static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, valid, -1, site});
  race::unmute();
}

void cp_async_commit() {
  Fiber& fiber = runtime.fibers[runtime.running];
  for (Copy& copy : fiber.copies) {
    if (copy.group < 0) copy.group = fiber.groups;
  }
  fiber.groups++;
}

void cp_async_wait(int pending) {
  race::mute();
  finish_copies(runtime.fibers[runtime.running], pending);
  race::unmute();
}

void ldmatrix(uint32_t* out, int matrices, bool transpose, const void* row) {
  struct Argument {
    uint32_t* out;
    const uint16_t* row;
    const void* site;
    int matrices;
    bool transpose;
  } argument{out, static_cast<const uint16_t*>(row), __builtin_return_address(0), matrices, transpose};
  const auto run = [](Lanes lanes, unsigned) {
    const Argument& first = *static_cast<Argument*>(lanes[0]);
    for (int address = 0; address < 8 * first.matrices; address++) {
      const uint16_t* const row = static_cast<Argument*>(lanes[address])->row;
      if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail_lane(address, "the row is not aligned to 16 bytes");
    }
    for (int lane = 0; lane < 32; lane++) {
      const Argument& of_lane = *static_cast<Argument*>(lanes[lane]);
      for (int matrix = 0; matrix < first.matrices; matrix++) {
        uint32_t bits = 0;
        for (int half = 0; half < 2; half++) {
          const int i = first.transpose ? 2 * (lane % 4) + half : lane / 4;
          const int j = first.transpose ? lane / 4 : 2 * (lane % 4) + half;
          const uint16_t* const element = static_cast<Argument*>(lanes[8 * matrix + i])->row + j;
          race::read_by_lane(lane, element, sizeof *element, of_lane.site);
          bits |= static_cast<uint32_t>(*element) << (16 * half);
        }
        of_lane.out[matrix] = bits;
      }
    }
  };
  collective_at(transpose ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &argument, run, argument.site);
}

}  // namespace cuda_host

extern "C" {
// 0: blocks and threads in their natural order; otherwise shuffled.
__attribute__((visibility("default"))) void cuda_host_seed(uint64_t seed) { cuda_host::runtime.seed = seed; }
// How many launches there have been, those of no block not counted.
__attribute__((visibility("default"))) int64_t cuda_host_launches() { return cuda_host::launches; }
}
