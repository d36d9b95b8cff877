// std::thread in the place of PyTorch's pool, for the stress programs.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "../../../../csrc/cpu/base/parallel.h"

namespace protomem {

inline Parallel std_threads(int64_t threads) {
  return Parallel(threads, [](int64_t workers, void (*body)(void* context, int64_t worker), void* context) {
    // All start together, or the first would have done the work before the last is there. Relaxed: this must not order
    // what ThreadSanitizer is to see unordered.
    std::atomic<int64_t> missing{workers};
    const auto start = [&](int64_t worker) {
      missing.fetch_sub(1, std::memory_order_relaxed);
      while (missing.load(std::memory_order_relaxed) > 0) std::this_thread::yield();
      body(context, worker);
    };
    std::vector<std::thread> running;
    for (int64_t worker = 1; worker < workers; worker++) running.emplace_back(start, worker);
    start(0);
    for (std::thread& thread : running) thread.join();
  });
}

}  // namespace protomem
