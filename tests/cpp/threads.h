// std::thread in the place of PyTorch's pool, for the stress programs.
#pragma once

#include <thread>
#include <vector>

#include "../../csrc/common/parallel.h"

namespace protomem {

inline Parallel std_threads(int64_t threads) {
  return Parallel(threads, [](int64_t workers, void (*body)(void* context, int64_t worker), void* context) {
    std::vector<std::thread> running;
    for (int64_t worker = 1; worker < workers; worker++) running.emplace_back(body, context, worker);
    body(context, 0);
    for (std::thread& thread : running) thread.join();
  });
}

}  // namespace protomem
