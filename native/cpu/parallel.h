// Runs the blocks of one call on XLA's own intra-op pool, phase after phase.
//
// A handler may itself run on a thread of that pool, so it must never wait for a scheduled task
// to *start*: with every thread inside a handler no task ever would. Blocks are therefore claimed
// by whoever is there, the calling thread among them, and whoever waits, waits for blocks that
// somebody has already claimed. Nobody claims a block of a phase before all of the phase before
// are claimed, so those are always in the hands of threads that run: no deadlock.
//
// Each thread begins with a range of its own, the same in every call: what it wrote in one layer
// it finds in its own cache in the next (forward and backward of 512×1024, rank 16: 630 µs with one
// shared queue, 572 with ranges).
#ifndef JAX_FUSED_LORA_NATIVE_CPU_PARALLEL_H_
#define JAX_FUSED_LORA_NATIVE_CPU_PARALLEL_H_

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "hwy/cache_control.h"

namespace jax_fused_lora {

class Phases {
 public:
  static constexpr int kMax = 3;
  using Sizes = std::array<int64_t, kMax>;

  // `threads` are expected to work; more may. `backwards`: each range from its last block to its
  // first.
  Phases(const Sizes& sizes, int64_t threads, bool backwards)
      : sizes_(sizes), ranges_(std::min<int64_t>(threads, kRanges)), backwards_(backwards) {
    for (int phase = 0; phase < kMax; ++phase) {
      for (int64_t range = 0; range < ranges_; ++range) {
        cursors_[phase][range].next.store(Begin(phase, range), std::memory_order_relaxed);
      }
    }
  }

  // Returns when every block of the phases before `phase` is done.
  void WaitBefore(int phase) const {
    for (int p = 0; p < phase; ++p) {
      for (int spins = 0; done_[p].load(std::memory_order_acquire) < sizes_[p]; ++spins) {
        // A block takes microseconds, so spin; but give the core away when its owner was
        // descheduled.
        if (spins < 4096) {
          hwy::Pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

  // Claims and runs blocks until none is left, beginning with the range of `thread`. `body` is not
  // touched after the last claim.
  template <class Body>
  void Work(int64_t thread, Body& body) {
    for (int phase = 0; phase < kMax; ++phase) {
      for (int64_t i = 0; i < ranges_; ++i) {
        const int64_t range = (thread + i) % ranges_;
        const int64_t begin = Begin(phase, range), end = Begin(phase, range + 1);
        for (;;) {
          const int64_t index = cursors_[phase][range].next.fetch_add(1, std::memory_order_relaxed);
          if (index >= end) break;
          body(*this, phase, backwards_ ? begin + (end - 1 - index) : index);
          done_[phase].fetch_add(1, std::memory_order_release);
        }
      }
    }
  }

 private:
  static constexpr int64_t kRanges = 16;
  struct alignas(64) Cursor {  // a cache line each
    std::atomic<int64_t> next;
  };

  int64_t Begin(int phase, int64_t range) const { return sizes_[phase] * range / ranges_; }

  Sizes sizes_;
  int64_t ranges_;
  bool backwards_;
  std::array<std::array<Cursor, kRanges>, kMax> cursors_;
  std::array<std::atomic<int64_t>, kMax> done_{};
};

// Calls body(phases, phase, index) for every block of every phase, on at most `threads` threads
// of `pool`, the caller among them. A body that needs the results of earlier phases calls
// phases.WaitBefore(phase) itself, as late as it can. Pool is xla::ffi::ThreadPool, or a test's.
// Without memory for a task the process ends here: an exception would leave `body` behind, which
// tasks may be working on.
template <class Pool, class Body>
void RunPhases(Pool& pool, int64_t threads, const Phases::Sizes& sizes, bool backwards,
               Body body) noexcept {
  if (threads <= 1) {
    Phases phases(sizes, 1, backwards);
    phases.Work(0, body);
    return;
  }
  const int64_t blocks = *std::max_element(sizes.begin(), sizes.end());
  threads = std::max<int64_t>(std::min(threads, blocks), 1);
  // Shared, because a task that starts late looks at the cursors after the call has returned.
  auto phases = std::make_shared<Phases>(sizes, threads, backwards);
  for (int64_t thread = 1; thread < threads; ++thread) {
    pool.Schedule([phases, &body, thread] { phases->Work(thread, body); });
  }
  phases->Work(0, body);
  phases->WaitBefore(Phases::kMax);
}

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_PARALLEL_H_
