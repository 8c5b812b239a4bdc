// What metal_emulator_counters() tells of dispatches; runtime.h has the rest.
#ifndef METAL_EMULATOR_COUNTERS_H_
#define METAL_EMULATOR_COUNTERS_H_

#include <cstdint>
#include <map>
#include <string>

namespace metal_emulator {

struct Traffic {
  uint64_t read = 0, written = 0;  // bytes
};

// By the name of a binding.
using TrafficByName = std::map<std::string, Traffic>;

void CountDispatch(const std::string& kernel, const TrafficByName& traffic);

}  // namespace metal_emulator

#endif  // METAL_EMULATOR_COUNTERS_H_
