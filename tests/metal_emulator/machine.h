#ifndef METAL_EMULATOR_MACHINE_H_
#define METAL_EMULATOR_MACHINE_H_

#include <map>
#include <string>
#include <vector>

#include "library.h"
#include "runtime.h"

namespace metal_emulator {

// Runs a kernel of a library: threadgroups one after another, in an order drawn from the seed.
// Returns what went wrong, as Function::Run().
std::string RunGrid(const Exports& library, const Kernel& kernel,
                    const std::map<int, std::vector<char>>& constants, const Dispatch& dispatch);

}  // namespace metal_emulator

#endif  // METAL_EMULATOR_MACHINE_H_
