// What a compiled shader library and the runtime know of each other. Plain data and C functions:
// the library is C++14 of clang's, the runtime is whatever its host is.
#ifndef METAL_EMULATOR_LIBRARY_H_
#define METAL_EMULATOR_LIBRARY_H_

#include <stddef.h>
#include <stdint.h>

namespace metal_emulator {

constexpr int kMaxShared = 32;  // threadgroup arrays that a kernel declares
constexpr uint32_t kDeviceMemory = 1, kThreadgroupMemory = 2;  // of mem_flags

// Where a thread is.
struct Place {
  uint32_t group[3], groups[3];   // of the grid
  uint32_t position[3], size[3];  // of the threadgroup
  uint32_t index, simdgroup, lane, simdgroups;
};

// A call in the source by which threads of a group or simdgroup meet. Threads that arrive at calls
// of different addresses do not meet: the program has diverged.
struct Site {
  const char* name;
  const void* address;
  int line;
};

// What the library calls. The runtime fills one in, and every library points to it.
struct Runtime {
  // Before an access, which does not happen where it is wrong: they then do not return.
  void (*load[5])(uintptr_t address);  // 1, 2, 4, 8 and 16 bytes, aligned
  void (*store[5])(uintptr_t address);
  void (*load_bytes)(uintptr_t address, size_t size);
  void (*store_bytes)(uintptr_t address, size_t size);

  // The lanes of a simdgroup meet; the last to come combines what all brought.
  void (*meet)(const Site* site, void (*combine)(void* const* lanes, int count), void* data);
  // A call that all lanes of a simdgroup must make, but need not make together.
  void (*pass)(const Site* site);
  void (*threadgroup_barrier)(const Site* site, uint32_t flags);
  void (*simdgroup_barrier)(const Site* site, uint32_t flags);

  const Place* place;        // of the thread that runs
  char* shared[kMaxShared];  // the kernel's threadgroup arrays
};

struct Buffer {
  int index;
  const char* name;
  bool writable;
};

struct Shared {
  const char* name;
  size_t size;  // filled in when the library is loaded: only clang knows it
};

struct Kernel {
  const char* name;
  void (*enter)(void* const* buffers, void* const* threadgroups, const Place& place);
  const Buffer* buffers;
  int buffer_count;
  const Buffer* threadgroups;  // the arguments, whose size the dispatch gives
  int threadgroup_count;
  Shared* shared;
  int shared_count;
};

struct Constant {
  int index;
  const char* name;
  void* address;
  size_t size;
};

// Exported as metal_emulator_exports.
struct Exports {
  const Kernel* kernels;
  int kernel_count;
  const Constant* constants;
  int constant_count;
  const char* image_begin;  // constants that lie in the library may be read
  const char* image_end;
  Runtime** runtime;
};

}  // namespace metal_emulator

#endif  // METAL_EMULATOR_LIBRARY_H_
