// A machine is memory and threads, and here threads meet: at barriers, and where the lanes of a
// simdgroup exchange values. All must come, and to the same call.

#include "machine.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "counters.h"
#include "gpu_memory.h"
#include "scheduler.h"

namespace metal_emulator {
namespace {

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

class Machine {
 public:
  static Machine& Get() {
    static Machine* const machine = new Machine;  // libraries point into it to the end
    return *machine;
  }

  std::string Run(const Exports& library, const Kernel& kernel,
                  const std::map<int, std::vector<char>>& constants, const Dispatch& dispatch);

 private:
  Machine();
  std::string RunGroup(uint32_t group);

  // What a thread of a shader calls.
  void Meet(const Site& site, void (*combine)(void* const*, int), void* data);
  void Pass(const Site& site);
  void ThreadgroupBarrier(const Site& site, uint32_t flags);
  void SimdgroupBarrier(const Site& site, uint32_t flags);
  void End();

  void Join(Meeting* meeting, const Site& site);
  void Agree(Simdgroup* simdgroup);
  Simdgroup& OwnSimdgroup() { return simdgroups_[scheduler_.current().place.simdgroup]; }
  [[noreturn]] void Diverged(const Site& site, const std::string& others);

  std::mutex mutex_;  // of everything: one dispatch at a time
  Runtime runtime_ = {};
  Scheduler scheduler_{&runtime_.place};
  Memory memory_{&runtime_, &scheduler_};
  const Kernel* kernel_ = nullptr;
  Meeting meeting_;  // of the threadgroup
  Simdgroup simdgroups_[kMaxThreads / kSimdWidth];
};

Machine* machine = nullptr;  // Machine::Get(), for the calls that must be fast

Machine::Machine() {
  machine = this;
  runtime_.meet = [](const Site* site, void (*combine)(void* const*, int), void* data) {
    machine->Meet(*site, combine, data);
  };
  runtime_.pass = [](const Site* site) { machine->Pass(*site); };
  runtime_.threadgroup_barrier = [](const Site* site, uint32_t flags) {
    machine->ThreadgroupBarrier(*site, flags);
  };
  runtime_.simdgroup_barrier = [](const Site* site, uint32_t flags) {
    machine->SimdgroupBarrier(*site, flags);
  };
}

std::string Machine::Run(const Exports& library, const Kernel& kernel,
                         const std::map<int, std::vector<char>>& constants,
                         const Dispatch& dispatch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  *library.runtime = &runtime_;  // another copy of this code may have loaded it too
  kernel_ = &kernel;
  uint64_t threads = 1, groups = 1;
  for (int i = 0; i < 3; ++i) {
    threads *= dispatch.threads[i];
    groups *= dispatch.groups[i];
    if (threads > kMaxThreads || groups > UINT32_MAX) break;
  }
  if (threads == 0 || threads > kMaxThreads) {
    return "a threadgroup of " + std::to_string(threads) + " threads; there can be " +
           std::to_string(kMaxThreads);
  }
  if (groups > UINT32_MAX) return "too many threadgroups";

  std::string error = memory_.Bind(library, kernel, dispatch);
  if (error.empty()) {
    for (int i = 0; i < library.constant_count; ++i) {
      const Constant& constant = library.constants[i];
      std::memcpy(constant.address, constants.at(constant.index).data(), constant.size);
    }
    error = scheduler_.SetUp(kernel, dispatch, static_cast<uint32_t>(threads));
  }
  if (error.empty()) {
    for (uint32_t group : scheduler_.DrawOrder(static_cast<uint32_t>(groups))) {
      error = RunGroup(group);
      if (!error.empty()) break;
    }
    if (error.empty()) memory_.CopyBack();
    CountDispatch(kernel.name, memory_.traffic());
  }
  memory_.FreeTags();
  return error;
}

std::string Machine::RunGroup(uint32_t group) {
  memory_.BeginGroup();
  meeting_ = {};
  const uint32_t threads = scheduler_.threads();
  for (uint32_t i = 0; i < threads; i += kSimdWidth) {
    simdgroups_[i / kSimdWidth] = {};
    simdgroups_[i / kSimdWidth].size = std::min<uint32_t>(kSimdWidth, threads - i);
  }
  return scheduler_.Run(group, [] {
    machine->kernel_->enter(machine->memory_.buffers(), machine->memory_.threadgroups(),
                            *machine->runtime_.place);
    machine->End();
  });
}

void Machine::End() {
  Simdgroup& simdgroup = OwnSimdgroup();
  for (const Meeting* meeting : {&simdgroup.meeting, &meeting_}) {
    if (meeting->waiting > 0) Diverged(meeting->site, "has ended");
  }
  Agree(&simdgroup);
  simdgroup.ended += 1;
  scheduler_.End();
}

std::string Text(const Site& site) {
  return std::string(site.name) + " (line " + std::to_string(site.line) + ")";
}

void Machine::Diverged(const Site& site, const std::string& others) {
  const bool barrier = std::strstr(site.name, "barrier") != nullptr;
  scheduler_.Fail("divergent " + std::string(barrier ? "barrier" : site.name) + ": kernel " +
                  kernel_->name + " is at " + Text(site) + " with some threads, but one " + others);
}

// All lanes must have made the same calls of those that they do not wait at.
void Machine::Agree(Simdgroup* simdgroup) {
  const uint64_t passed = scheduler_.current().passed;
  if (simdgroup->agreed == 0) simdgroup->passed = passed;
  if (simdgroup->passed != passed) {
    scheduler_.Fail("divergent simdgroup_load or simdgroup_store: kernel " +
                    std::string(kernel_->name) +
                    " does not make the same ones with all lanes of a simdgroup");
  }
  if (++simdgroup->agreed == simdgroup->size) simdgroup->agreed = 0;
}

void Machine::Join(Meeting* meeting, const Site& site) {
  if (meeting->waiting == 0) {
    meeting->site = site;
    meeting->first = scheduler_.current().place.index;
  } else if (meeting->site.address != site.address) {
    Diverged(site, "(thread " + std::to_string(meeting->first) + ") at " + Text(meeting->site));
  }
  meeting->waiting += 1;
}

void Machine::Meet(const Site& site, void (*combine)(void* const*, int), void* data) {
  const Place& place = scheduler_.current().place;
  Simdgroup& simdgroup = OwnSimdgroup();
  if (simdgroup.ended > 0) Diverged(site, "of the simdgroup has ended");
  if (simdgroup.at_barrier > 0) Diverged(site, "of the simdgroup at " + Text(meeting_.site));
  Agree(&simdgroup);
  Join(&simdgroup.meeting, site);
  simdgroup.data[place.lane] = data;
  if (simdgroup.meeting.waiting == simdgroup.size) {
    simdgroup.meeting.waiting = 0;
    if (combine != nullptr) combine(simdgroup.data, simdgroup.size);
    const uint32_t first = place.simdgroup * kSimdWidth;
    for (int lane = 0; lane < simdgroup.size; ++lane) scheduler_.Resume(first + lane);
  }
  scheduler_.Wait();
}

void Machine::Pass(const Site& site) {
  uint64_t& passed = scheduler_.current().passed;
  passed = (passed ^ reinterpret_cast<uintptr_t>(site.address)) * 0x9e3779b97f4a7c15;
}

void Machine::SimdgroupBarrier(const Site& site, uint32_t flags) {
  const Simdgroup& simdgroup = OwnSimdgroup();
  if (simdgroup.meeting.waiting + 1 == simdgroup.size) {
    memory_.OrderSimdgroup(scheduler_.current().place.simdgroup, flags);
  }
  Meet(site, nullptr, nullptr);
}

void Machine::ThreadgroupBarrier(const Site& site, uint32_t flags) {
  Simdgroup& simdgroup = OwnSimdgroup();
  if (scheduler_.ended() > 0) {
    Diverged(site, "(thread " + std::to_string(scheduler_.last_ended()) + ") has ended");
  }
  if (simdgroup.meeting.waiting > 0) {
    Diverged(site, "of the simdgroup at " + Text(simdgroup.meeting.site));
  }
  Agree(&simdgroup);
  Join(&meeting_, site);
  simdgroup.at_barrier += 1;
  const uint32_t threads = scheduler_.threads();
  if (meeting_.waiting == static_cast<int>(threads)) {
    meeting_.waiting = 0;
    memory_.OrderGroup(flags);
    for (Simdgroup& each : simdgroups_) each.at_barrier = 0;
    for (uint32_t i = 0; i < threads; ++i) scheduler_.Resume(i);
  }
  scheduler_.Wait();
}

}  // namespace

std::string RunGrid(const Exports& library, const Kernel& kernel,
                    const std::map<int, std::vector<char>>& constants, const Dispatch& dispatch) {
  return Machine::Get().Run(library, kernel, constants, dispatch);
}

}  // namespace metal_emulator
