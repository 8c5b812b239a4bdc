// Runs compute kernels of the Metal Shading Language on the CPU, as a GPU would and less kindly.
//
// The Objective-C objects of metal.mm stand on this; nothing here knows Objective-C. compiler.cc
// makes a library of a shader, machine.cc runs its kernels, with the threads of scheduler.cc in the
// memory of gpu_memory.cc, and counters.cc counts.
#ifndef METAL_EMULATOR_RUNTIME_H_
#define METAL_EMULATOR_RUNTIME_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace metal_emulator {

constexpr int kSlots = 31;  // buffer arguments of a kernel, and threadgroup memory arguments

// What is bound to [[buffer(i)]].
struct Binding {
  std::string name;         // for messages and counters
  char* data = nullptr;     // where the kernel's pointer points
  size_t size = 0;          // bytes from there on that it may touch
  std::vector<char> bytes;  // setBytes:length:atIndex:; then data is null
};

struct Dispatch {
  std::array<Binding, kSlots> buffers;
  std::array<size_t, kSlots> threadgroup_lengths = {};
  std::array<uint32_t, 3> groups = {1, 1, 1}, threads = {1, 1, 1};
};

class Library;

// A kernel with the values of its function constants.
class Function {
 public:
  virtual ~Function() = default;
  // Runs the whole grid. Empty where all went well, else what went wrong and where: an access
  // outside a binding, a race, a barrier that not all threads reach.
  virtual std::string Run(const Dispatch& dispatch) = 0;
  virtual size_t static_threadgroup_bytes() const = 0;
};

class Library {
 public:
  virtual ~Library() = default;
  // Null where there is no such kernel or a function constant is unknown; `error` says so. The
  // values are the bytes that setConstantValue:type:atIndex: was given.
  virtual std::shared_ptr<Function> MakeFunction(const std::string& name,
                                                 const std::map<int, std::vector<char>>& constants,
                                                 std::string* error) = 0;
};

// Compiles source text with clang, macros defined before it. Null on failure, with the compiler's
// words in `error`.
std::shared_ptr<Library> Compile(const std::string& source,
                                 const std::map<std::string, std::string>& macros,
                                 std::string* error);

// For the objects of metal.mm.
void CountCommandBuffer();
void CountObject(const char* class_name, int delta);  // one more, or one less, that lives

}  // namespace metal_emulator

// For tests, by dlsym or ctypes. The text is JSON and lives until the next call.
#define METAL_EMULATOR_EXPORTED __attribute__((visibility("default")))
extern "C" {
// The order in which threads run; also METAL_EMULATOR_SEED.
METAL_EMULATOR_EXPORTED void metal_emulator_seed(uint64_t seed);
METAL_EMULATOR_EXPORTED void metal_emulator_reset_counters();
// Counters, how often each kernel ran, and the number of live Metal objects by class.
METAL_EMULATOR_EXPORTED const char* metal_emulator_counters();
}

#endif  // METAL_EMULATOR_RUNTIME_H_
