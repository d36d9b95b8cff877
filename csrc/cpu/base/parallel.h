// Threads, as the kernels see them: PyTorch's pool in the extension, std::thread in the stress test.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace protomem {

class Parallel {
 public:
  // Runs body(context, worker) for worker = 0 .. workers-1, each at most once at a time, in any order, and returns
  // when all are done. Running them one after another is allowed.
  using Run = void (*)(int64_t workers, void (*body)(void* context, int64_t worker), void* context);

  Parallel(int64_t threads, Run run) : threads_(std::max<int64_t>(threads, 1)), run_(run) {}

  int64_t threads() const { return threads_; }

  // Calls work(state, item) for every item in [0, items) on whichever thread is free; each thread makes its own state
  // (its buffers) with make_state() first. Results must not depend on who works on what.
  template <class MakeState, class Work>
  void each(int64_t items, const MakeState& make_state, const Work& work) const {
    struct Context {
      const MakeState& make_state;
      const Work& work;
      std::atomic<int64_t> next;
      int64_t items;
    } context{make_state, work, {0}, items};
    auto body = [](void* pointer, int64_t) {
      auto& c = *static_cast<Context*>(pointer);
      int64_t item = c.next.fetch_add(1, std::memory_order_relaxed);
      if (item >= c.items) return;
      auto state = c.make_state();
      for (; item < c.items; item = c.next.fetch_add(1, std::memory_order_relaxed)) c.work(state, item);
    };
    const int64_t workers = std::min(threads_, items);
    if (workers <= 1) {
      body(&context, 0);
    } else {
      run_(workers, body, &context);
    }
  }

  template <class Work>
  void each(int64_t items, const Work& work) const {
    each(items, [] { return 0; }, [&](int, int64_t item) { work(item); });
  }

 private:
  int64_t threads_;
  Run run_;
};

}  // namespace protomem
