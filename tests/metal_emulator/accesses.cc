// Every access of a shader comes here before it happens: is it inside what is bound, aligned,
// allowed, and ordered after those of other threads?

#include <algorithm>

#include "gpu_memory.h"

namespace metal_emulator {
namespace {

// A tag is the clock of barriers, then two flags, then the thread's index in its threadgroup.
constexpr int kTagClockShift = 12;
constexpr Tag kTagThread = kMaxThreads - 1;
constexpr Tag kManyLanes = 1 << 10;       // of several reads: by lanes of one simdgroup
constexpr Tag kManySimdgroups = 1 << 11;  // by several simdgroups

Memory* memory = nullptr;  // that of the calls from shaders

template <size_t kSize>
inline bool AllSame(const Tag* tags) {
  Tag difference = 0;
  for (size_t i = 1; i < kSize; ++i) difference |= tags[i] ^ tags[0];
  return difference == 0;
}

}  // namespace

void Memory::Serve(Runtime* runtime) {
  memory = this;
  runtime->load[0] = AccessAligned<false, 1>;
  runtime->load[1] = AccessAligned<false, 2>;
  runtime->load[2] = AccessAligned<false, 4>;
  runtime->load[3] = AccessAligned<false, 8>;
  runtime->load[4] = AccessAligned<false, 16>;
  runtime->store[0] = AccessAligned<true, 1>;
  runtime->store[1] = AccessAligned<true, 2>;
  runtime->store[2] = AccessAligned<true, 4>;
  runtime->store[3] = AccessAligned<true, 8>;
  runtime->store[4] = AccessAligned<true, 16>;
  runtime->load_bytes = AccessBytes<false>;
  runtime->store_bytes = AccessBytes<true>;
}

template <bool kWrite, size_t kSize>
void Memory::AccessAligned(uintptr_t address) {
  memory->Access<kWrite, kSize>(address, kSize);
}

template <bool kWrite>
void Memory::AccessBytes(uintptr_t address, size_t size) {
  memory->Access<kWrite, 0>(address, size);
}

// kSize is 0 where it is known at run time only; nothing is then known of alignment.
template <bool kWrite, size_t kSize>
inline void Memory::Access(uintptr_t address, size_t size) {
  if (address - scheduler_->current().stack < kStackBytes) return;
  const uintptr_t slot = (address - arena_) >> kSlotBits;
  if (slot >= kAllSlots) {
    if (!kWrite && address >= reinterpret_cast<uintptr_t>(library_->image_begin) &&
        address + size <= reinterpret_cast<uintptr_t>(library_->image_end)) {
      return;
    }
    Outside(address, size, kWrite);
  }
  Region& region = regions_[slot];
  const size_t at = address - region.begin;
  if (at > region.size || size > region.size - at) Outside(address, size, kWrite);
  if (kSize > 1 && address % kSize != 0) Misaligned(region, at, size, kWrite);
  (kWrite ? region.traffic.written : region.traffic.read) += size;
  if (region.writes != nullptr) {
    if (kSize != 0) {
      CheckRace<kWrite, kSize>(region, at, size);
    } else if (size == 4) {
      CheckRace<kWrite, 4>(region, at, size);
    } else if (size == 8) {
      CheckRace<kWrite, 8>(region, at, size);
    } else {
      CheckRace<kWrite, 0>(region, at, size);
    }
  } else if (kWrite) {
    scheduler_->Fail("write to const memory: " + Doing(size, true) + Where(region, at));
  }
}

template <bool kWrite, size_t kSize>
inline void Memory::CheckRace(const Region& region, size_t at, size_t size) {
  Tag* const writes = region.writes + at;
  Tag* const reads = region.reads + at;
  const Order& order = *region.order;
  // The bytes of an element mostly have one history.
  size_t checked = size;
  if (kSize > 0 && AllSame<kSize>(writes) && AllSame<kSize>(reads)) checked = 1;
  for (size_t i = 0; i < checked; ++i) {
    if (Conflicts(order, writes[i])) Race(region, at, size, kWrite, writes[i], true);
    if (kWrite && Conflicts(order, reads[i])) Race(region, at, size, kWrite, reads[i], false);
  }
  if (kWrite) {
    std::fill_n(writes, kSize != 0 ? kSize : size, OwnTag());
    std::fill_n(reads, kSize != 0 ? kSize : size, 0);
  } else if (checked == 1) {
    const Tag tag = AlsoRead(order, reads[0]);
    if (tag != reads[0]) std::fill_n(reads, kSize != 0 ? kSize : size, tag);
  } else {
    for (size_t i = 0; i < size; ++i) reads[i] = AlsoRead(order, reads[i]);
  }
}

inline Tag Memory::OwnTag() const {
  return clock_ << kTagClockShift | scheduler_->current().place.index;
}

// Whether something that the tag stands for is another thread's and not ordered before now.
inline bool Memory::Conflicts(const Order& order, Tag tag) const {
  if (tag == 0) return false;
  const uint64_t when = tag >> kTagClockShift;
  if (when < order.start) return true;
  if (when < order.group) return false;
  if (tag & kManySimdgroups) return true;
  const Place& place = scheduler_->current().place;
  const uint32_t thread = tag & kTagThread;
  const uint32_t simdgroup = thread / kSimdWidth;
  if (simdgroup != place.simdgroup) return true;
  if (when < order.simdgroup[simdgroup]) return false;
  return (tag & kManyLanes) != 0 || thread != place.index;
}

// The tag of reads with this thread's, now. What a barrier has ordered is forgotten.
inline Tag Memory::AlsoRead(const Order& order, Tag old) const {
  const Tag own = OwnTag();
  if (old == 0) return own;
  const uint64_t when = old >> kTagClockShift;
  if (when < order.start) return old;
  if (when < order.group) return own;
  if (old & kManySimdgroups) return old;
  const Place& place = scheduler_->current().place;
  const uint32_t thread = old & kTagThread;
  const uint32_t simdgroup = thread / kSimdWidth;
  if (simdgroup != place.simdgroup) return old | kManySimdgroups;
  if (when < order.simdgroup[simdgroup]) return own;
  return own | (thread == place.index ? old & kManyLanes : kManyLanes);
}

std::string Memory::Doing(size_t size, bool write) const {
  return "kernel " + std::string(kernel_->name) + (write ? " writes " : " reads ") +
         std::to_string(size) + (size == 1 ? " byte" : " bytes");
}

std::string Memory::Where(const Region& region, int64_t at) const {
  const bool device = &region < regions_ + kThreadgroupSlot;
  return " at byte " + std::to_string(at) + " of " + (device ? "'" : "threadgroup memory '") +
         region.name + "'";
}

void Memory::Outside(uintptr_t address, size_t size, bool write) {
  const uintptr_t slot = (address - arena_) >> kSlotBits;
  std::string where = " at an address that no argument leads to";
  if (slot < kAllSlots && !regions_[slot].name.empty()) {
    const Region& region = regions_[slot];
    where = Where(region, static_cast<int64_t>(address - region.begin)) + ", which has " +
            std::to_string(region.size);
  }
  scheduler_->Fail("out of bounds: " + Doing(size, write) + where);
}

void Memory::Misaligned(const Region& region, size_t at, size_t size, bool write) {
  scheduler_->Fail("misaligned: " + Doing(size, write) + Where(region, at) +
                   ", whose address is not a multiple of " + std::to_string(size));
}

void Memory::Race(const Region& region, size_t at, size_t size, bool write, Tag tag,
                  bool other_wrote) {
  const bool device = region.order == &device_;
  const bool other_group = tag >> kTagClockShift < region.order->start;
  std::string other = "thread " + std::to_string(tag & kTagThread);
  if (other_group) {
    other += " of another threadgroup";
  } else if (tag & (kManyLanes | kManySimdgroups)) {
    other = "other threads";
  }
  scheduler_->Fail("race on " + std::string(device ? "device" : "threadgroup") +
                   " memory: " + Doing(size, write) + " at byte " + std::to_string(at) + " of '" +
                   region.name + "', which " + other + (other_wrote ? " wrote" : " read") +
                   (other_group ? "" : " with no barrier between"));
}

}  // namespace metal_emulator
