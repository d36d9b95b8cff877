// Stands in for libtorch_cuda while _C_cuda is linked (see CMakeLists.txt), and in tests on machines without it.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
