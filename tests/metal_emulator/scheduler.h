// The threads of a threadgroup, as fibers: one runs until it must wait for others, and which one
// goes on is drawn from the seed.
#ifndef METAL_EMULATOR_SCHEDULER_H_
#define METAL_EMULATOR_SCHEDULER_H_

#include <array>
#include <boost/context/detail/fcontext.hpp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "library.h"
#include "runtime.h"

namespace metal_emulator {

constexpr int kMaxThreads = 1024;  // of a threadgroup
constexpr int kSimdWidth = 32;
constexpr size_t kStackBytes = 256 << 10;

struct Thread {
  Place place = {};
  uintptr_t stack = 0;
  uint64_t passed = 0;  // a digest of the calls that lanes make alike but not together
  boost::context::detail::fcontext_t context = nullptr;  // where it goes on
};

// xorshift64* (Marsaglia, 2003; Vigna, 2016).
class Random {
 public:
  explicit Random(uint64_t seed);
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

class Scheduler {
 public:
  // `place` will always lead to that of the thread that runs.
  explicit Scheduler(const Place** place) : place_(place) {}

  // The threads of a dispatch, at most kMaxThreads. Returns what is wrong.
  std::string SetUp(const Kernel& kernel, const Dispatch& dispatch, uint32_t threads);
  // The numbers below `count`, in an order drawn from the seed.
  std::vector<uint32_t> DrawOrder(uint32_t count);
  // Runs a threadgroup, each thread in `body`, which must end with End(). Returns what one of them
  // has failed with.
  std::string Run(uint32_t group, void (*body)());

  uint32_t threads() const { return threads_; }
  uint32_t ended() const { return ended_; }
  uint32_t last_ended() const { return last_ended_; }

  // Of the thread that runs and by it.
  Thread& current() { return *current_; }
  const Thread& current() const { return *current_; }
  void Wait();  // until it is resumed by another
  void Resume(uint32_t thread) { ready_[ready_count_++] = thread; }
  [[noreturn]] void End();
  [[noreturn]] void Fail(const std::string& message);  // and end the dispatch

 private:
  static void Begin(boost::context::detail::transfer_t from);
  void JumpTo(Thread* next);

  const Place** const place_;
  const Kernel* kernel_ = nullptr;
  void (*body_)() = nullptr;
  std::array<uint32_t, 3> groups_ = {};
  Random random_{0};
  std::string error_;

  Thread caller_;  // of Run()
  Thread* current_ = &caller_;
  Thread* left_ = nullptr;  // by the last jump
  Thread fibers_[kMaxThreads];
  uint32_t ready_[kMaxThreads];
  uint32_t ready_count_ = 0;
  uint32_t threads_ = 0, ended_ = 0, last_ended_ = 0;
};

}  // namespace metal_emulator

#endif  // METAL_EMULATOR_SCHEDULER_H_
