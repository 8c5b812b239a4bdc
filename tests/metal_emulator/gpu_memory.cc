#include "gpu_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace metal_emulator {
namespace {

constexpr size_t kMaxBytes = kSlotBytes / 2;  // of a binding
constexpr size_t kMaxThreadgroupBytes = 32 << 10;
constexpr char kNoMemory[] = "the emulator is out of memory";

const size_t kPage = sysconf(_SC_PAGESIZE);

}  // namespace

Memory::Memory(Runtime* runtime, Scheduler* scheduler) : scheduler_(scheduler) {
  void* arena = mmap(nullptr, kAllSlots * kSlotBytes, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena != MAP_FAILED) arena_ = reinterpret_cast<uintptr_t>(arena);
  for (int i = 0; i < kMaxShared; ++i) {
    runtime->shared[i] = static_cast<char*>(Start(kSharedSlot + i));
  }
  Serve(runtime);
}

// Where a slot's memory begins, or its page.
void* Memory::Start(int slot) const {
  return reinterpret_cast<void*>(arena_ + slot * kSlotBytes + kSlotBytes / 4);
}

// Makes `size` bytes of a slot memory.
bool Memory::Commit(int slot, size_t size, size_t offset_in_page) {
  Region& region = regions_[slot];
  region.begin = reinterpret_cast<uintptr_t>(Start(slot)) + offset_in_page;
  region.size = size;
  region.traffic = {};
  const size_t needed = (offset_in_page + size + kPage - 1) / kPage * kPage;
  if (needed <= region.committed) return true;
  if (mprotect(Start(slot), needed, PROT_READ | PROT_WRITE) != 0) return false;
  region.committed = needed;
  return true;
}

// Gives a region tags, none of them set.
bool Memory::MakeTags(int slot) {
  Region& region = regions_[slot];
  region.order = slot < kThreadgroupSlot ? &device_ : &threadgroup_;
  if (region.size == 0) return true;
  if (region.size > region.tagged || slot < kThreadgroupSlot) {
    // Fresh pages are zero, and cost nothing where they are not touched.
    if (region.tagged > 0) munmap(region.writes, 2 * region.tagged * sizeof(Tag));
    region.writes = nullptr;
    region.tagged = 0;
    void* tags = mmap(nullptr, 2 * region.size * sizeof(Tag), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (tags == MAP_FAILED) return false;
    region.writes = static_cast<Tag*>(tags);
    region.tagged = region.size;
  }
  region.reads = region.writes + region.tagged;
  return true;
}

std::string Memory::Bind(const Exports& library, const Kernel& kernel, const Dispatch& dispatch) {
  if (arena_ == 0) return "the emulator cannot reserve address space";
  library_ = &library;
  kernel_ = &kernel;
  for (Region& region : regions_) {
    region.size = 0;
    region.name.clear();
  }
  const std::string error = BindBuffers(kernel, dispatch);
  return error.empty() ? LayOutThreadgroup(kernel, dispatch) : error;
}

std::string Memory::BindBuffers(const Kernel& kernel, const Dispatch& dispatch) {
  for (int i = 0; i < kernel.buffer_count; ++i) {
    const Buffer& argument = kernel.buffers[i];
    const Binding& binding = dispatch.buffers[argument.index];
    const char* data = binding.data != nullptr ? binding.data : binding.bytes.data();
    const size_t size = binding.data != nullptr ? binding.size : binding.bytes.size();
    // An array that is bound twice is one region.
    int slot = argument.index;
    for (int j = 0; j < i && binding.data != nullptr; ++j) {
      const Binding& other = dispatch.buffers[kernel.buffers[j].index];
      if (other.data == data && other.size == size) {
        slot = static_cast<int>(
            (reinterpret_cast<uintptr_t>(buffers_[kernel.buffers[j].index]) - arena_) >> kSlotBits);
        break;
      }
    }
    Region& region = regions_[slot];
    if (slot == argument.index) {
      if (size > kMaxBytes) return "'" + binding.name + "' is too large for the emulator";
      const size_t offset = binding.data != nullptr ? reinterpret_cast<uintptr_t>(data) % kPage : 0;
      if (!Commit(slot, size, offset)) return kNoMemory;
      if (size > 0) std::memcpy(reinterpret_cast<void*>(region.begin), data, size);
      region.name = binding.name.empty() ? argument.name : binding.name;
      if (size == 0) region.name = std::string(argument.name) + " (not bound)";
      region.host = binding.data;
    }
    if (argument.writable && region.writes == nullptr && !MakeTags(slot)) return kNoMemory;
    buffers_[argument.index] = reinterpret_cast<void*>(region.begin);
  }
  return "";
}

std::string Memory::LayOutThreadgroup(const Kernel& kernel, const Dispatch& dispatch) {
  size_t total = 0;
  std::string error;
  const auto add = [&](int slot, const char* name, size_t size) {
    if (size > kMaxThreadgroupBytes) {
      error = "threadgroup memory of " + std::to_string(size) + " bytes";
    } else if (!Commit(slot, size, 0) || !MakeTags(slot)) {
      error = kNoMemory;
    }
    regions_[slot].name = name;
    total += size;
    return error.empty();
  };
  for (int i = 0; i < kernel.threadgroup_count; ++i) {
    const Buffer& argument = kernel.threadgroups[i];
    const int slot = kThreadgroupSlot + argument.index;
    if (!add(slot, argument.name, dispatch.threadgroup_lengths[argument.index])) return error;
    threadgroups_[argument.index] = Start(slot);
  }
  for (int i = 0; i < kernel.shared_count; ++i) {
    if (!add(kSharedSlot + i, kernel.shared[i].name, kernel.shared[i].size)) return error;
  }
  if (total > kMaxThreadgroupBytes) {
    return "kernel " + std::string(kernel.name) + " takes " + std::to_string(total) +
           " bytes of threadgroup memory; there are " + std::to_string(kMaxThreadgroupBytes);
  }
  return "";
}

void Memory::BeginGroup() {
  clock_ += 1;
  device_.start = device_.group = threadgroup_.group = clock_;
  for (int slot = kThreadgroupSlot; slot < kAllSlots; ++slot) {
    const Region& region = regions_[slot];
    if (region.size == 0) continue;
    std::memset(reinterpret_cast<void*>(region.begin), 0xff, region.size);  // NaN
    std::memset(region.writes, 0, region.size * sizeof(Tag));
    std::memset(region.reads, 0, region.size * sizeof(Tag));
  }
}

void Memory::OrderGroup(uint32_t flags) {
  clock_ += 1;
  if (flags & kThreadgroupMemory) threadgroup_.group = clock_;
  if (flags & kDeviceMemory) device_.group = clock_;
}

void Memory::OrderSimdgroup(uint32_t simdgroup, uint32_t flags) {
  clock_ += 1;
  if (flags & kThreadgroupMemory) threadgroup_.simdgroup[simdgroup] = clock_;
  if (flags & kDeviceMemory) device_.simdgroup[simdgroup] = clock_;
}

void Memory::CopyBack() const {
  for (int slot = 0; slot < kThreadgroupSlot; ++slot) {
    const Region& region = regions_[slot];
    if (region.traffic.written == 0 || region.size == 0 || region.host == nullptr) continue;
    const char* from = reinterpret_cast<const char*>(region.begin);
    for (size_t at = 0; at < region.size; ++at) {
      const size_t first = at;
      while (at < region.size && region.writes[at] != 0) ++at;
      if (at > first) std::memcpy(region.host + first, from + first, at - first);
    }
  }
}

TrafficByName Memory::traffic() const {
  TrafficByName result;
  for (int slot = 0; slot < kThreadgroupSlot; ++slot) {
    const Region& region = regions_[slot];
    if (region.size == 0) continue;
    Traffic& sum = result[region.name];
    sum.read += region.traffic.read;
    sum.written += region.traffic.written;
  }
  return result;
}

void Memory::FreeTags() {
  for (int slot = 0; slot < kThreadgroupSlot; ++slot) {
    Region& region = regions_[slot];
    if (region.tagged > 0) munmap(region.writes, 2 * region.tagged * sizeof(Tag));
    region.writes = region.reads = nullptr;
    region.tagged = 0;
  }
}

}  // namespace metal_emulator
