// Which of the compiled instruction sets serves this process.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace protomem {

// The kernels in use: the best that this machine runs, or what set_capability chose.
const Kernels& kernels();

std::vector<std::string> capabilities();  // what this machine can run, slowest first
std::string capability();
void set_capability(const std::string& name);  // throws std::invalid_argument

}  // namespace protomem
