// Stands in for a header of gloo, which libtorch does not ship. ProcessGroupGloo.hpp needs the names,
// behind pointers alone; the code itself is in libtorch_cpu.
#pragma once

#include <chrono>

namespace gloo {
class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};
}  // namespace gloo
