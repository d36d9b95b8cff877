// The source line of a return address.
#pragma once

#include <string>

namespace cuda_host {
std::string where(const void* return_address);
}
