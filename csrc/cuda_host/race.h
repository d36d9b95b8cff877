// What the runtime tells the race check (race.cpp), which only the build with CUDA_HOST_RACE has.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_host {
int running_thread();                             // within its block
std::string name_of(uint64_t block, int thread);  // of the running launch
}  // namespace cuda_host

namespace cuda_host::race {

#ifdef CUDA_HOST_RACE
#define CUDA_HOST_HOOK(result, declaration) result declaration;
#else
#define CUDA_HOST_HOOK(result, declaration) \
  inline result declaration { return result(); }
#endif

// Accesses count between unmute() and mute(), which bracket the kernel's own code.
CUDA_HOST_HOOK(void, mute())
CUDA_HOST_HOOK(void, unmute())
CUDA_HOST_HOOK(void, ignore([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t bytes))

CUDA_HOST_HOOK(void, begin_launch())
CUDA_HOST_HOOK(std::string, end_launch([[maybe_unused]] const char* kernel))  // the races, if there were any
CUDA_HOST_HOOK(void, begin_block([[maybe_unused]] uint64_t block))
CUDA_HOST_HOOK(void, forget([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t bytes))

CUDA_HOST_HOOK(void, barrier_done())
CUDA_HOST_HOOK(void, warp_synced([[maybe_unused]] int warp, [[maybe_unused]] unsigned mask))
CUDA_HOST_HOOK(void, fence())

CUDA_HOST_HOOK(void, copy_issued([[maybe_unused]] const void* shared, [[maybe_unused]] int bytes,
                                 [[maybe_unused]] const void* global, [[maybe_unused]] int valid,
                                 [[maybe_unused]] const void* site))
CUDA_HOST_HOOK(void, copy_done([[maybe_unused]] const void* shared, [[maybe_unused]] int bytes,
                               [[maybe_unused]] const void* site))
CUDA_HOST_HOOK(void, read_by_lane([[maybe_unused]] int lane, [[maybe_unused]] const void* address,
                                  [[maybe_unused]] std::size_t bytes, [[maybe_unused]] const void* site))

#undef CUDA_HOST_HOOK

}  // namespace cuda_host::race
