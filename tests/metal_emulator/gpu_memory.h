// The memory of an emulated GPU. A kernel's pointers lead into an arena of slots, each 1 GiB of
// address space with a little memory in the middle: an address tells which argument it was meant
// for, and how far off it is. For memory that is written, each byte has two tags, of the thread
// that wrote it and of those that read it since; accesses that no barrier orders are a race. They
// are found by that rule, not by the order in which the threads happened to run.
#ifndef METAL_EMULATOR_GPU_MEMORY_H_
#define METAL_EMULATOR_GPU_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "counters.h"
#include "library.h"
#include "runtime.h"
#include "scheduler.h"

namespace metal_emulator {

constexpr int kSlotBits = 30;
constexpr size_t kSlotBytes = size_t{1} << kSlotBits;
constexpr int kThreadgroupSlot = kSlots;  // the slots before are buffers, these are arguments
constexpr int kSharedSlot = 2 * kSlots;   // and these the kernel's own arrays
constexpr int kAllSlots = kSharedSlot + kMaxShared;

// When and by whom a byte was accessed; accesses.cc says how. 0 is never.
using Tag = uint64_t;

// Where barriers stand in one kind of memory. What carries an earlier clock is ordered before.
struct Order {
  uint64_t start = 0;  // of the threadgroup; nothing orders device accesses of two threadgroups
  uint64_t group = 0;
  uint64_t simdgroup[kMaxThreads / kSimdWidth] = {};
};

// The memory in a slot.
struct Region {
  uintptr_t begin = 0;
  size_t size = 0;
  const Order* order = nullptr;
  Tag* writes = nullptr;  // of each byte; null where nothing may be written
  Tag* reads = nullptr;
  Traffic traffic;

  std::string name;
  char* host = nullptr;  // where written bytes go in the end
  size_t committed = 0;  // bytes of the slot that are memory
  size_t tagged = 0;     // bytes that there are tags for
};

class Memory {
 public:
  // Fills in what `runtime` has of memory. The scheduler knows whose accesses they are.
  Memory(Runtime* runtime, Scheduler* scheduler);

  // Copies bindings in and lays out threadgroup memory. Returns what is wrong.
  std::string Bind(const Exports& library, const Kernel& kernel, const Dispatch& dispatch);
  void* const* buffers() const { return buffers_; }
  void* const* threadgroups() const { return threadgroups_; }
  void BeginGroup();
  // A barrier for the kinds of memory in `flags`.
  void OrderGroup(uint32_t flags);
  void OrderSimdgroup(uint32_t simdgroup, uint32_t flags);
  // Copies written bytes back: the others may be read-only memory, or somebody else's by now.
  void CopyBack() const;
  TrafficByName traffic() const;
  void FreeTags();  // those of buffers, of which there can be many

 private:
  void* Start(int slot) const;
  bool Commit(int slot, size_t size, size_t offset_in_page);
  bool MakeTags(int slot);
  std::string BindBuffers(const Kernel& kernel, const Dispatch& dispatch);
  std::string LayOutThreadgroup(const Kernel& kernel, const Dispatch& dispatch);

  // Accesses, which a shader announces through the runtime.
  void Serve(Runtime* runtime);
  template <bool kWrite, size_t kSize>
  static void AccessAligned(uintptr_t address);
  template <bool kWrite>
  static void AccessBytes(uintptr_t address, size_t size);
  template <bool kWrite, size_t kSize>
  void Access(uintptr_t address, size_t size);
  template <bool kWrite, size_t kSize>
  void CheckRace(const Region& region, size_t at, size_t size);
  bool Conflicts(const Order& order, Tag tag) const;
  Tag AlsoRead(const Order& order, Tag old) const;
  Tag OwnTag() const;

  // What is wrong with one.
  [[noreturn]] void Outside(uintptr_t address, size_t size, bool write);
  [[noreturn]] void Misaligned(const Region& region, size_t at, size_t size, bool write);
  [[noreturn]] void Race(const Region& region, size_t at, size_t size, bool write, Tag tag,
                         bool other_wrote);
  std::string Where(const Region& region, int64_t at) const;
  std::string Doing(size_t size, bool write) const;

  Scheduler* const scheduler_;
  const Exports* library_ = nullptr;
  const Kernel* kernel_ = nullptr;
  uintptr_t arena_ = 0;
  Region regions_[kAllSlots];
  void* buffers_[kSlots] = {};
  void* threadgroups_[kSlots] = {};
  Order device_, threadgroup_;
  uint64_t clock_ = 0;  // of barriers
};

}  // namespace metal_emulator

#endif  // METAL_EMULATOR_GPU_MEMORY_H_
