// Runs compiled shaders (library.h): threadgroups one after another in an order drawn from the
// seed, the threads of a threadgroup as fibers. A fiber runs until it must wait for others; which
// one goes on is drawn from the seed too.
//
// Every access of a shader comes here first. A kernel's pointers lead into an arena of slots, each
// 1 GiB of address space with a little memory in the middle: an address tells which argument it
// was meant for, and how far off it is. For memory that is written, each byte has two tags, of the
// thread that wrote it and of those that read it since; accesses that no barrier orders are a race.
// They are found by that rule, not by the order in which the threads happened to run.

#include "runtime.h"

#include <dlfcn.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <boost/context/detail/fcontext.hpp>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <utility>

#include "library.h"

#ifndef METAL_EMULATOR_DIR
#define METAL_EMULATOR_DIR nullptr  // the folder of this file
#endif

extern char** environ;

namespace metal_emulator {
namespace {

namespace fibers = boost::context::detail;

constexpr int kMaxThreads = 1024;  // of a threadgroup
constexpr int kSimdWidth = 32;
constexpr size_t kMaxThreadgroupBytes = 32 << 10;

constexpr int kSlotBits = 30;
constexpr size_t kSlotBytes = size_t{1} << kSlotBits;
constexpr size_t kMaxBytes = kSlotBytes / 2;  // of a binding
constexpr int kThreadgroupSlot = kSlots;      // the slots before are buffers, these are arguments
constexpr int kSharedSlot = 2 * kSlots;       // and these the kernel's own arrays
constexpr int kAllSlots = kSharedSlot + kMaxShared;

const size_t kPage = sysconf(_SC_PAGESIZE);
constexpr size_t kStackBytes = 256 << 10;

// When and by whom a byte was accessed: the clock of barriers, then two flags, then the thread's
// index in its threadgroup. 0 is never.
using Tag = uint64_t;
constexpr int kTagClockShift = 12;
constexpr Tag kTagThread = kMaxThreads - 1;
constexpr Tag kManyLanes = 1 << 10;       // of several reads: by lanes of one simdgroup
constexpr Tag kManySimdgroups = 1 << 11;  // by several simdgroups

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
  uint64_t bytes_read = 0, bytes_written = 0;

  std::string name;
  char* host = nullptr;  // where written bytes go in the end
  size_t committed = 0;  // bytes of the slot that are memory
  size_t tagged = 0;     // bytes that there are tags for
};

struct Fiber {
  fibers::fcontext_t context = nullptr;
  uintptr_t stack = 0;
  Place place = {};
  uint64_t passed = 0;  // a digest of the calls that lanes make alike but not together
};

// Threads that have come to one call and wait for the others.
struct Meeting {
  int waiting = 0;
  Site site = {};
  uint32_t first = 0;  // thread
};

struct Simdgroup {
  int size = 0;
  int ended = 0;
  int at_barrier = 0;  // of the threadgroup
  Meeting meeting;
  void* data[kSimdWidth];
  int agreed = 0;  // lanes since the last meeting whose digest is `passed`
  uint64_t passed = 0;
};

// What metal_emulator_counters() tells.
struct Ledger {
  std::mutex mutex;
  Counters counters;
  std::map<std::string, uint64_t> dispatches;  // of a kernel
  std::map<std::string, int64_t> live;         // objects of a class
  std::string text;

  // Never destroyed: objects may die after the end of main().
  static Ledger& Get() {
    static Ledger* const ledger = new Ledger;
    return *ledger;
  }
};

std::atomic<uint64_t>& Seed() {
  static std::atomic<uint64_t> seed([] {
    const char* given = std::getenv("METAL_EMULATOR_SEED");
    return given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
  }());
  return seed;
}

// xorshift64* (Marsaglia, 2003; Vigna, 2016).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d) {
    if (state_ == 0) state_ = 1;
    for (int i = 0; i < 8; ++i) Below(1);
  }
  uint32_t Below(uint32_t bound) {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    const uint64_t high = (state_ * 0x2545f4914f6cdd1d) >> 32;
    return static_cast<uint32_t>(high * bound >> 32);
  }

 private:
  uint64_t state_;
};

std::string Number(uint64_t value) { return std::to_string(value); }

std::string Triple(const uint32_t (&v)[3]) {
  return "(" + Number(v[0]) + ", " + Number(v[1]) + ", " + Number(v[2]) + ")";
}

class Machine {
 public:
  static Machine& Get() {
    static Machine* const machine = new Machine;  // libraries point into it to the end
    return *machine;
  }

  std::string Run(const Exports& library, const Kernel& kernel,
                  const std::map<int, std::vector<char>>& constants, const Dispatch& dispatch);

  Runtime runtime = {};

 private:
  Machine();

  // What a shader calls, through `runtime`.
  template <bool kWrite, size_t kSize>
  static void AccessAligned(uintptr_t address);
  template <bool kWrite>
  static void AccessBytes(uintptr_t address, size_t size);
  static void MeetCalled(const Site* site, void (*combine)(void* const*, int), void* data);
  static void PassCalled(const Site* site);
  static void ThreadgroupBarrierCalled(const Site* site, uint32_t flags);
  static void SimdgroupBarrierCalled(const Site* site, uint32_t flags);

  // Setting up a dispatch.
  bool Commit(int slot, size_t size, size_t offset_in_page);
  bool Tags(int slot);
  std::string Bind(const Kernel& kernel, const Dispatch& dispatch);
  std::string SetUpThreads(const Dispatch& dispatch, uint32_t threads);
  void CopyBack();
  void Count(const Kernel& kernel);

  // Fibers.
  void RunGroup();
  static void Main(fibers::transfer_t from);
  void Switch();
  void JumpTo(Fiber* next);
  [[noreturn]] void End();
  [[noreturn]] void Fail(std::string message);

  // Meetings.
  void Wait(Meeting* meeting, const Site& site);
  void Agree(Simdgroup* simdgroup);
  Simdgroup& OwnSimdgroup() { return simdgroups_[current_->place.simdgroup]; }
  [[noreturn]] void Diverged(const Site& site, const std::string& others);

  // Accesses.
  template <bool kWrite, size_t kSize>
  void Access(uintptr_t address, size_t size);
  template <bool kWrite, size_t kSize>
  void CheckRace(const Region& region, size_t at, size_t size);
  bool Conflicts(const Order& order, Tag tag) const;
  Tag AlsoRead(const Order& order, Tag old) const;
  [[noreturn]] void Outside(uintptr_t address, size_t size, bool write);
  [[noreturn]] void Misaligned(const Region& region, size_t at, size_t size, bool write);
  [[noreturn]] void Race(const Region& region, size_t at, size_t size, bool write, Tag tag,
                         bool other_wrote);
  std::string Memory(const Region& region) const;
  std::string Here() const;
  std::string Doing(size_t size, bool write) const;

  std::mutex mutex_;  // of everything: one dispatch at a time
  uintptr_t arena_ = 0;
  Region regions_[kAllSlots];
  Order device_, threadgroup_;
  uint64_t clock_ = 0;

  const Exports* library_ = nullptr;
  const Kernel* kernel_ = nullptr;
  void* buffers_[kSlots] = {};
  void* threadgroups_[kSlots] = {};
  Random random_{0};
  std::string error_;

  Fiber main_;
  Fiber* current_ = nullptr;
  Fiber fibers_[kMaxThreads];
  uint32_t ready_[kMaxThreads];
  uint32_t ready_count_ = 0;
  uint32_t threads_ = 0, ended_ = 0, last_ended_ = 0;
  Meeting meeting_;
  Simdgroup simdgroups_[kMaxThreads / kSimdWidth];
};

Machine* machine = nullptr;  // Machine::Get(), for the calls that must be fast

// ------------------------------------------------------------------------------------- accesses

template <bool kWrite, size_t kSize>
void Machine::AccessAligned(uintptr_t address) {
  machine->Access<kWrite, kSize>(address, kSize);
}

template <bool kWrite>
void Machine::AccessBytes(uintptr_t address, size_t size) {
  machine->Access<kWrite, 0>(address, size);
}

// kSize is 0 where it is known at run time only; nothing is then known of alignment.
template <bool kWrite, size_t kSize>
inline void Machine::Access(uintptr_t address, size_t size) {
  if (address - current_->stack < kStackBytes) return;
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
  (kWrite ? region.bytes_written : region.bytes_read) += size;
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
    Fail("write to const memory: " + Doing(size, true) + " at byte " + Number(at) + " of " +
         Memory(region) + "; " + Here());
  }
}

template <size_t kSize>
inline bool AllSame(const Tag* tags) {
  Tag difference = 0;
  for (size_t i = 1; i < kSize; ++i) difference |= tags[i] ^ tags[0];
  return difference == 0;
}

template <bool kWrite, size_t kSize>
inline void Machine::CheckRace(const Region& region, size_t at, size_t size) {
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
    std::fill_n(writes, kSize != 0 ? kSize : size,
                clock_ << kTagClockShift | current_->place.index);
    std::fill_n(reads, kSize != 0 ? kSize : size, 0);
  } else if (checked == 1) {
    const Tag tag = AlsoRead(order, reads[0]);
    if (tag != reads[0]) std::fill_n(reads, kSize != 0 ? kSize : size, tag);
  } else {
    for (size_t i = 0; i < size; ++i) reads[i] = AlsoRead(order, reads[i]);
  }
}

// Whether something that the tag stands for is another thread's and not ordered before now.
inline bool Machine::Conflicts(const Order& order, Tag tag) const {
  if (tag == 0) return false;
  const uint64_t when = tag >> kTagClockShift;
  if (when < order.start) return true;
  if (when < order.group) return false;
  if (tag & kManySimdgroups) return true;
  const uint32_t thread = tag & kTagThread;
  const uint32_t simdgroup = thread / kSimdWidth;
  if (simdgroup != current_->place.simdgroup) return true;
  if (when < order.simdgroup[simdgroup]) return false;
  return (tag & kManyLanes) != 0 || thread != current_->place.index;
}

// The tag of reads with this thread's, now. What a barrier has ordered is forgotten.
inline Tag Machine::AlsoRead(const Order& order, Tag old) const {
  const Tag own = clock_ << kTagClockShift | current_->place.index;
  if (old == 0) return own;
  const uint64_t when = old >> kTagClockShift;
  if (when < order.start) return old;
  if (when < order.group) return own;
  if (old & kManySimdgroups) return old;
  const uint32_t thread = old & kTagThread;
  const uint32_t simdgroup = thread / kSimdWidth;
  if (simdgroup != current_->place.simdgroup) return old | kManySimdgroups;
  if (when < order.simdgroup[simdgroup]) return own;
  return own | (thread == current_->place.index ? old & kManyLanes : kManyLanes);
}

std::string Machine::Memory(const Region& region) const {
  const bool device = &region < regions_ + kThreadgroupSlot;
  return (device ? "'" : "threadgroup memory '") + region.name + "'";
}

std::string Machine::Here() const {
  return "thread " + Number(current_->place.index) + " of threadgroup " +
         Triple(current_->place.group);
}

std::string Machine::Doing(size_t size, bool write) const {
  return "kernel " + std::string(kernel_->name) + (write ? " writes " : " reads ") + Number(size) +
         (size == 1 ? " byte" : " bytes");
}

void Machine::Outside(uintptr_t address, size_t size, bool write) {
  const uintptr_t slot = (address - arena_) >> kSlotBits;
  std::string where = "at an address that no argument leads to";
  if (slot < kAllSlots && !regions_[slot].name.empty()) {
    const Region& region = regions_[slot];
    where = "at byte " + std::to_string(static_cast<int64_t>(address - region.begin)) + " of " +
            Memory(region) + ", which has " + Number(region.size);
  }
  Fail("out of bounds: " + Doing(size, write) + " " + where + "; " + Here());
}

void Machine::Misaligned(const Region& region, size_t at, size_t size, bool write) {
  Fail("misaligned: " + Doing(size, write) + " at byte " + Number(at) + " of " + Memory(region) +
       ", whose address is not a multiple of " + Number(size) + "; " + Here());
}

void Machine::Race(const Region& region, size_t at, size_t size, bool write, Tag tag,
                   bool other_wrote) {
  const bool device = region.order == &device_;
  const bool other_group = tag >> kTagClockShift < region.order->start;
  std::string other = "thread " + Number(tag & kTagThread);
  if (other_group) {
    other += " of another threadgroup";
  } else if (tag & (kManyLanes | kManySimdgroups)) {
    other = "other threads";
  }
  Fail("race on " + std::string(device ? "device" : "threadgroup") +
       " memory: " + Doing(size, write) + " at byte " + Number(at) + " of '" + region.name +
       "', which " + other + (other_wrote ? " wrote" : " read") +
       (other_group ? "" : " with no barrier between") + "; " + Here());
}

// --------------------------------------------------------------------------------------- fibers

void Machine::Main(fibers::transfer_t from) {
  static_cast<Fiber*>(from.data)->context = from.fctx;
  Machine& m = *machine;
  m.kernel_->enter(m.buffers_, m.threadgroups_, m.current_->place);
  m.End();
}

inline void Machine::JumpTo(Fiber* next) {
  Fiber* const self = current_;
  if (next == self) return;
  current_ = next;
  runtime.place = &next->place;
  const fibers::transfer_t from = fibers::jump_fcontext(next->context, self);
  static_cast<Fiber*>(from.data)->context = from.fctx;
}

// Goes on with a thread that can run. Comes back when it is this one's turn.
inline void Machine::Switch() {
  if (ready_count_ == 0) {
    if (ended_ == threads_) JumpTo(&main_);
    Fail("divergent: kernel " + std::string(kernel_->name) +
         " has threads that wait for each other at different calls; " + Here());
  }
  const uint32_t i = random_.Below(ready_count_);
  const uint32_t next = ready_[i];
  ready_[i] = ready_[--ready_count_];
  JumpTo(&fibers_[next]);
}

void Machine::Fail(std::string message) {
  error_ = std::move(message);
  JumpTo(&main_);  // which never comes back to this fiber
  std::abort();
}

void Machine::RunGroup() {
  clock_ += 1;
  device_.start = device_.group = threadgroup_.group = clock_;
  for (int slot = kThreadgroupSlot; slot < kAllSlots; ++slot) {
    const Region& region = regions_[slot];
    if (region.size == 0) continue;
    std::memset(reinterpret_cast<void*>(region.begin), 0xff, region.size);  // NaN
    std::memset(region.writes, 0, region.size * sizeof(Tag));
    std::memset(region.reads, 0, region.size * sizeof(Tag));
  }
  meeting_ = {};
  ended_ = 0;
  for (uint32_t i = 0; i < threads_; i += kSimdWidth) {
    simdgroups_[i / kSimdWidth] = {};
    simdgroups_[i / kSimdWidth].size = std::min<uint32_t>(kSimdWidth, threads_ - i);
  }
  for (uint32_t i = 0; i < threads_; ++i) {
    // Stacks begin at different places, or the same few lines of the cache would serve them all.
    const uintptr_t top = fibers_[i].stack + kStackBytes - i % 64 * 704;
    fibers_[i].context =
        fibers::make_fcontext(reinterpret_cast<void*>(top), top - fibers_[i].stack, Main);
    fibers_[i].passed = 0;
    ready_[i] = i;
  }
  ready_count_ = threads_;
  current_ = &main_;
  Switch();
}

void Machine::End() {
  Simdgroup& simdgroup = OwnSimdgroup();
  for (const Meeting* meeting : {&simdgroup.meeting, &meeting_}) {
    if (meeting->waiting > 0) Diverged(meeting->site, "has ended");
  }
  Agree(&simdgroup);
  simdgroup.ended += 1;
  ended_ += 1;
  last_ended_ = current_->place.index;
  Switch();
  std::abort();
}

// ------------------------------------------------------------------------------------- meetings

std::string Text(const Site& site) {
  return std::string(site.name) + " (line " + std::to_string(site.line) + ")";
}

void Machine::Diverged(const Site& site, const std::string& others) {
  const bool barrier = std::strstr(site.name, "barrier") != nullptr;
  Fail("divergent " + std::string(barrier ? "barrier" : site.name) + ": kernel " + kernel_->name +
       " is at " + Text(site) + " with some threads, but one " + others + "; " + Here());
}

// All lanes must have made the same calls of those that they do not wait at.
void Machine::Agree(Simdgroup* simdgroup) {
  if (simdgroup->agreed == 0) simdgroup->passed = current_->passed;
  if (simdgroup->passed != current_->passed) {
    Fail("divergent simdgroup_load or simdgroup_store: kernel " + std::string(kernel_->name) +
         " does not make the same ones with all lanes of a simdgroup; " + Here());
  }
  if (++simdgroup->agreed == simdgroup->size) simdgroup->agreed = 0;
}

inline void Machine::Wait(Meeting* meeting, const Site& site) {
  if (meeting->waiting == 0) {
    meeting->site = site;
    meeting->first = current_->place.index;
  } else if (meeting->site.address != site.address) {
    Diverged(site, "(thread " + Number(meeting->first) + ") at " + Text(meeting->site));
  }
  meeting->waiting += 1;
}

void Machine::MeetCalled(const Site* site, void (*combine)(void* const*, int), void* data) {
  Machine& m = *machine;
  Simdgroup& simdgroup = m.OwnSimdgroup();
  if (simdgroup.ended > 0) m.Diverged(*site, "of the simdgroup has ended");
  if (simdgroup.at_barrier > 0) {
    m.Diverged(*site, "of the simdgroup at " + Text(m.meeting_.site));
  }
  m.Agree(&simdgroup);
  m.Wait(&simdgroup.meeting, *site);
  simdgroup.data[m.current_->place.lane] = data;
  if (simdgroup.meeting.waiting == simdgroup.size) {
    simdgroup.meeting.waiting = 0;
    if (combine != nullptr) combine(simdgroup.data, simdgroup.size);
    const uint32_t first = m.current_->place.simdgroup * kSimdWidth;
    for (int lane = 0; lane < simdgroup.size; ++lane) m.ready_[m.ready_count_++] = first + lane;
  }
  m.Switch();
}

void Machine::PassCalled(const Site* site) {
  Fiber& fiber = *machine->current_;
  fiber.passed = (fiber.passed ^ reinterpret_cast<uintptr_t>(site->address)) * 0x9e3779b97f4a7c15;
}

void Machine::SimdgroupBarrierCalled(const Site* site, uint32_t flags) {
  Machine& m = *machine;
  Simdgroup& simdgroup = m.OwnSimdgroup();
  if (simdgroup.meeting.waiting + 1 == simdgroup.size) {
    m.clock_ += 1;
    const uint32_t index = m.current_->place.simdgroup;
    if (flags & kThreadgroupMemory) m.threadgroup_.simdgroup[index] = m.clock_;
    if (flags & kDeviceMemory) m.device_.simdgroup[index] = m.clock_;
  }
  MeetCalled(site, nullptr, nullptr);
}

void Machine::ThreadgroupBarrierCalled(const Site* site, uint32_t flags) {
  Machine& m = *machine;
  Simdgroup& simdgroup = m.OwnSimdgroup();
  if (m.ended_ > 0) m.Diverged(*site, "(thread " + Number(m.last_ended_) + ") has ended");
  if (simdgroup.meeting.waiting > 0) {
    m.Diverged(*site, "of the simdgroup at " + Text(simdgroup.meeting.site));
  }
  m.Agree(&simdgroup);
  m.Wait(&m.meeting_, *site);
  simdgroup.at_barrier += 1;
  if (m.meeting_.waiting == static_cast<int>(m.threads_)) {
    m.meeting_.waiting = 0;
    m.clock_ += 1;
    if (flags & kThreadgroupMemory) m.threadgroup_.group = m.clock_;
    if (flags & kDeviceMemory) m.device_.group = m.clock_;
    for (Simdgroup& each : m.simdgroups_) each.at_barrier = 0;
    std::iota(m.ready_, m.ready_ + m.threads_, 0);
    m.ready_count_ = m.threads_;
  }
  m.Switch();
}

// ------------------------------------------------------------------------------------- dispatches

Machine::Machine() {
  void* arena = mmap(nullptr, kAllSlots * kSlotBytes, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena != MAP_FAILED) arena_ = reinterpret_cast<uintptr_t>(arena);
  for (int i = 0; i < kMaxShared; ++i) {
    runtime.shared[i] =
        reinterpret_cast<char*>(arena_ + (kSharedSlot + i) * kSlotBytes + kSlotBytes / 4);
  }
  runtime.load[0] = AccessAligned<false, 1>;
  runtime.load[1] = AccessAligned<false, 2>;
  runtime.load[2] = AccessAligned<false, 4>;
  runtime.load[3] = AccessAligned<false, 8>;
  runtime.load[4] = AccessAligned<false, 16>;
  runtime.store[0] = AccessAligned<true, 1>;
  runtime.store[1] = AccessAligned<true, 2>;
  runtime.store[2] = AccessAligned<true, 4>;
  runtime.store[3] = AccessAligned<true, 8>;
  runtime.store[4] = AccessAligned<true, 16>;
  runtime.load_bytes = AccessBytes<false>;
  runtime.store_bytes = AccessBytes<true>;
  runtime.meet = MeetCalled;
  runtime.pass = PassCalled;
  runtime.threadgroup_barrier = ThreadgroupBarrierCalled;
  runtime.simdgroup_barrier = SimdgroupBarrierCalled;
}

// Makes `size` bytes of a slot memory.
bool Machine::Commit(int slot, size_t size, size_t offset_in_page) {
  Region& region = regions_[slot];
  const uintptr_t page = arena_ + slot * kSlotBytes + kSlotBytes / 4;
  region.begin = page + offset_in_page;
  region.size = size;
  region.bytes_read = region.bytes_written = 0;
  const size_t needed = (offset_in_page + size + kPage - 1) / kPage * kPage;
  if (needed <= region.committed) return true;
  if (mprotect(reinterpret_cast<void*>(page), needed, PROT_READ | PROT_WRITE) != 0) return false;
  region.committed = needed;
  return true;
}

// Gives a region tags, none of them set.
bool Machine::Tags(int slot) {
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

// Copies bindings in and lays out threadgroup memory. Returns what is wrong.
std::string Machine::Bind(const Kernel& kernel, const Dispatch& dispatch) {
  if (arena_ == 0) return "the emulator cannot reserve address space";
  const std::string no_memory = "the emulator is out of memory";
  for (Region& region : regions_) {
    region.size = 0;
    region.name.clear();
  }
  for (int i = 0; i < kernel.buffer_count; ++i) {
    const Buffer& argument = kernel.buffers[i];
    const Binding& binding = dispatch.buffers[argument.index];
    const char* data = binding.data != nullptr ? binding.data : binding.bytes.data();
    const size_t size = binding.data != nullptr ? binding.size : binding.bytes.size();
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
      if (!Commit(slot, size, offset)) return no_memory;
      if (size > 0) std::memcpy(reinterpret_cast<void*>(region.begin), data, size);
      region.name = binding.name.empty() ? argument.name : binding.name;
      if (size == 0) region.name = std::string(argument.name) + " (not bound)";
      region.host = binding.data;
    }
    if (argument.writable && region.writes == nullptr && !Tags(slot)) return no_memory;
    buffers_[argument.index] = reinterpret_cast<void*>(region.begin);
  }
  size_t total = 0;
  for (int i = 0; i < kernel.threadgroup_count; ++i) {
    const Buffer& argument = kernel.threadgroups[i];
    const size_t size = dispatch.threadgroup_lengths[argument.index];
    const int slot = kThreadgroupSlot + argument.index;
    if (size > kMaxThreadgroupBytes) return "threadgroup memory of " + Number(size) + " bytes";
    if (!Commit(slot, size, 0) || !Tags(slot)) return no_memory;
    regions_[slot].name = argument.name;
    threadgroups_[argument.index] = reinterpret_cast<void*>(regions_[slot].begin);
    total += size;
  }
  for (int i = 0; i < kernel.shared_count; ++i) {
    const int slot = kSharedSlot + i;
    if (kernel.shared[i].size > kMaxThreadgroupBytes) {
      return "threadgroup memory of " + Number(kernel.shared[i].size) + " bytes";
    }
    if (!Commit(slot, kernel.shared[i].size, 0) || !Tags(slot)) return no_memory;
    regions_[slot].name = kernel.shared[i].name;
    total += kernel.shared[i].size;
  }
  if (total > kMaxThreadgroupBytes) {
    return "kernel " + std::string(kernel.name) + " takes " + Number(total) +
           " bytes of threadgroup memory; there are " + Number(kMaxThreadgroupBytes);
  }
  return "";
}

// Written bytes only: the others may be read-only memory, or somebody else's by now.
void Machine::CopyBack() {
  for (int slot = 0; slot < kThreadgroupSlot; ++slot) {
    const Region& region = regions_[slot];
    if (region.bytes_written == 0 || region.size == 0 || region.host == nullptr) continue;
    const char* from = reinterpret_cast<const char*>(region.begin);
    for (size_t at = 0; at < region.size; ++at) {
      const size_t first = at;
      while (at < region.size && region.writes[at] != 0) ++at;
      if (at > first) std::memcpy(region.host + first, from + first, at - first);
    }
  }
}

void Machine::Count(const Kernel& kernel) {
  Ledger& ledger = Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.counters.dispatches += 1;
  ledger.dispatches[kernel.name] += 1;
  auto& of_kernel = ledger.counters.kernel_traffic[kernel.name];
  for (int slot = 0; slot < kThreadgroupSlot; ++slot) {
    const Region& region = regions_[slot];
    if (region.size == 0) continue;
    for (auto* traffic : {&ledger.counters.traffic[region.name], &of_kernel[region.name]}) {
      traffic->read += region.bytes_read;
      traffic->written += region.bytes_written;
    }
  }
}

// Everything of a thread but its threadgroup. Returns what is wrong.
std::string Machine::SetUpThreads(const Dispatch& dispatch, uint32_t threads) {
  threads_ = threads;
  for (uint32_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers_[i];
    if (fiber.stack == 0) {
      // With a page below that faults.
      void* stack = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) return "the emulator is out of memory";
      mprotect(stack, kPage, PROT_NONE);
      fiber.stack = reinterpret_cast<uintptr_t>(stack) + kPage;
    }
    const uint32_t* size = dispatch.threads.data();
    Place& place = fiber.place;
    place.position[0] = i % size[0];
    place.position[1] = i / size[0] % size[1];
    place.position[2] = i / size[0] / size[1];
    std::copy_n(size, 3, place.size);
    std::copy_n(dispatch.groups.data(), 3, place.groups);
    place.index = i;
    place.simdgroup = i / kSimdWidth;
    place.lane = i % kSimdWidth;
    place.simdgroups = (threads + kSimdWidth - 1) / kSimdWidth;
  }
  return "";
}

std::string Machine::Run(const Exports& library, const Kernel& kernel,
                         const std::map<int, std::vector<char>>& constants,
                         const Dispatch& dispatch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  machine = this;
  *library.runtime = &runtime;  // another copy of this code may have loaded it too
  library_ = &library;
  kernel_ = &kernel;
  uint64_t threads = 1, groups = 1;
  for (int i = 0; i < 3; ++i) {
    threads *= dispatch.threads[i];
    groups *= dispatch.groups[i];
    if (threads > kMaxThreads || groups > UINT32_MAX) break;
  }
  if (threads == 0 || threads > kMaxThreads) {
    return "a threadgroup of " + Number(threads) + " threads; there can be " + Number(kMaxThreads);
  }
  if (groups > UINT32_MAX) return "too many threadgroups";

  error_ = Bind(kernel, dispatch);
  if (error_.empty()) {
    for (int i = 0; i < library.constant_count; ++i) {
      const Constant& constant = library.constants[i];
      std::memcpy(constant.address, constants.at(constant.index).data(), constant.size);
    }
    error_ = SetUpThreads(dispatch, static_cast<uint32_t>(threads));
  }
  if (error_.empty()) {
    random_ = Random(Seed());
    std::vector<uint32_t> order(groups);
    std::iota(order.begin(), order.end(), 0);
    for (size_t i = order.size(); i > 1; --i) {
      std::swap(order[i - 1], order[random_.Below(static_cast<uint32_t>(i))]);
    }
    for (uint32_t group : order) {
      for (uint32_t i = 0; i < threads_; ++i) {
        Place& place = fibers_[i].place;
        place.group[0] = group % dispatch.groups[0];
        place.group[1] = group / dispatch.groups[0] % dispatch.groups[1];
        place.group[2] = group / dispatch.groups[0] / dispatch.groups[1];
      }
      RunGroup();
      if (!error_.empty()) break;
    }
    if (error_.empty()) CopyBack();
    Count(kernel);
  }
  for (int slot = 0; slot < kThreadgroupSlot; ++slot) {
    Region& region = regions_[slot];
    if (region.tagged > 0) munmap(region.writes, 2 * region.tagged * sizeof(Tag));
    region.writes = region.reads = nullptr;
    region.tagged = 0;
  }
  return std::move(error_);
}

// -------------------------------------------------------------------------------------- libraries

class LoadedFunction : public Function {
 public:
  LoadedFunction(const Exports& library, const Kernel& kernel,
                 const std::map<int, std::vector<char>>& constants)
      : library_(library), kernel_(kernel), constants_(constants) {}

  std::string Run(const Dispatch& dispatch) override {
    return Machine::Get().Run(library_, kernel_, constants_, dispatch);
  }
  size_t static_threadgroup_bytes() const override {
    size_t total = 0;
    for (int i = 0; i < kernel_.shared_count; ++i) total += kernel_.shared[i].size;
    return total;
  }

 private:
  const Exports& library_;
  const Kernel& kernel_;
  const std::map<int, std::vector<char>> constants_;
};

class LoadedLibrary : public Library {
 public:
  explicit LoadedLibrary(const Exports& exports) : exports_(exports) {}

  std::shared_ptr<Function> MakeFunction(const std::string& name,
                                         const std::map<int, std::vector<char>>& constants,
                                         std::string* error) override {
    std::map<int, size_t> sizes;
    for (int i = 0; i < exports_.constant_count; ++i) {
      const Constant& constant = exports_.constants[i];
      sizes[constant.index] = constant.size;
      if (constants.count(constant.index) == 0) {
        *error = "the function constant " + std::string(constant.name) + " has no value";
        return nullptr;
      }
    }
    for (const auto& [index, value] : constants) {
      const auto known = sizes.find(index);
      if (known == sizes.end()) {
        *error = "there is no function constant " + std::to_string(index);
        return nullptr;
      }
      if (known->second != value.size()) {
        *error = "the function constant " + std::to_string(index) + " has " +
                 Number(known->second) + " bytes, not " + Number(value.size());
        return nullptr;
      }
    }
    for (int i = 0; i < exports_.kernel_count; ++i) {
      if (name == exports_.kernels[i].name) {
        return std::make_shared<LoadedFunction>(exports_, exports_.kernels[i], constants);
      }
    }
    *error = "there is no kernel " + name;
    return nullptr;
  }

 private:
  const Exports& exports_;  // libraries are never unloaded
};

// A file without a name.
class TemporaryFile {
 public:
  TemporaryFile() : file_(std::tmpfile()) {}
  ~TemporaryFile() {
    if (file_ != nullptr) std::fclose(file_);
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  explicit operator bool() const { return file_ != nullptr; }
  int descriptor() const { return fileno(file_); }
  void Write(const std::string& text) {
    std::fwrite(text.data(), 1, text.size(), file_);
    std::rewind(file_);
  }
  std::string Read() {
    std::rewind(file_);
    std::string text;
    for (int c; (c = std::fgetc(file_)) != EOF;) text += static_cast<char>(c);
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  }

 private:
  std::FILE* file_;
};

// Runs a program; what it prints is `output`, or `error` where it fails.
bool RunProgram(std::vector<std::string> command, const std::string& input, std::string* output,
                std::string* error) {
  TemporaryFile in, out, err;
  if (!in || !out || !err) {
    *error = "no temporary file can be made";
    return false;
  }
  in.Write(input);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in.descriptor(), 0);
  posix_spawn_file_actions_adddup2(&actions, out.descriptor(), 1);
  posix_spawn_file_actions_adddup2(&actions, err.descriptor(), 2);
  std::vector<char*> arguments;
  for (std::string& each : command) arguments.push_back(each.data());
  arguments.push_back(nullptr);
  pid_t child;
  const int problem =
      posix_spawnp(&child, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (problem != 0) {
    *error = command[0] + ": " + std::strerror(problem);
    return false;
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  *output = out.Read();
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return true;
  *error = err.Read();
  if (error->empty()) *error = command[0] + " failed";
  return false;
}

std::string Folder() {
  if (const char* given = METAL_EMULATOR_DIR) return given;
  const std::string file = __FILE__;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? "." : file.substr(0, slash);
}

std::string Quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (static_cast<unsigned char>(c) >= ' ') result += c;
  }
  return result + "\"";
}

// {"key": value, ...}
template <class Map, class F>
std::string Json(const Map& map, F value) {
  std::string text;
  for (const auto& [key, each] : map) {
    text += (text.empty() ? "" : ", ") + Quoted(key) + ": " + value(key, each);
  }
  return "{" + text + "}";
}

std::string JsonTraffic(const std::map<std::string, Counters::Traffic>& traffic) {
  return Json(traffic, [](const std::string&, const Counters::Traffic& each) {
    return "{\"read\": " + Number(each.read) + ", \"written\": " + Number(each.written) + "}";
  });
}

}  // namespace

std::shared_ptr<Library> Compile(const std::string& source,
                                 const std::map<std::string, std::string>& macros,
                                 std::string* error) {
  const char* python = std::getenv("METAL_EMULATOR_PYTHON");
  std::vector<std::string> command = {python != nullptr ? python : "python3",
                                      Folder() + "/metalc.py"};
  for (const auto& [name, value] : macros) command.push_back("-D" + name + "=" + value);
  command.push_back("-");
  std::string path;
  if (!RunProgram(command, source, &path, error)) return nullptr;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    *error = dlerror();
    return nullptr;
  }
  auto* exports = static_cast<const Exports*>(dlsym(handle, "metal_emulator_exports"));
  if (exports == nullptr) {
    *error = path + " is not a shader library";
    return nullptr;
  }
  return std::make_shared<LoadedLibrary>(*exports);
}

void CountCommandBuffer() {
  Ledger& ledger = Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.counters.command_buffers += 1;
}

void CountObject(const char* class_name, int delta) {
  Ledger& ledger = Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.live[class_name] += delta;
}

}  // namespace metal_emulator

void metal_emulator_seed(uint64_t seed) { metal_emulator::Seed() = seed; }

void metal_emulator_reset_counters() {
  auto& ledger = metal_emulator::Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  ledger.counters = {};
  ledger.dispatches.clear();
}

const char* metal_emulator_counters() {
  using namespace metal_emulator;
  Ledger& ledger = Ledger::Get();
  const std::lock_guard<std::mutex> lock(ledger.mutex);
  const Counters& counters = ledger.counters;
  const std::string kernels = Json(counters.kernel_traffic, [&](auto& kernel, auto& traffic) {
    return "{\"count\": " + Number(ledger.dispatches[kernel]) +
           ", \"traffic\": " + JsonTraffic(traffic) + "}";
  });
  const std::string live =
      Json(ledger.live, [](auto&, int64_t count) { return std::to_string(count); });
  ledger.text = "{\"command_buffers\": " + Number(counters.command_buffers) +
                ", \"dispatches\": " + Number(counters.dispatches) +
                ", \"traffic\": " + JsonTraffic(counters.traffic) + ", \"kernels\": " + kernels +
                ", \"live\": " + live + "}";
  return ledger.text.c_str();
}
