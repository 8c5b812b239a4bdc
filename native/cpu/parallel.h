// Runs the blocks of one call on XLA's own intra-op pool, phase after phase.
//
// A handler may itself run on a thread of that pool, so it must never wait for a scheduled task
// to *start*: with every thread inside a handler no task ever would. Blocks are therefore handed
// out by one atomic counter, in order, the calling thread takes blocks like any other, and
// whoever waits, waits for blocks that somebody has already claimed. Claims are in order, so the
// blocks of an earlier phase are always in the hands of threads that run: no deadlock.
#ifndef JAX_FUSED_LORA_NATIVE_CPU_PARALLEL_H_
#define JAX_FUSED_LORA_NATIVE_CPU_PARALLEL_H_

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "hwy/cache_control.h"
#include "xla/ffi/api/ffi.h"

namespace jax_fused_lora {

class Phases {
 public:
  static constexpr int kMax = 3;
  using Sizes = std::array<int64_t, kMax>;

  explicit Phases(const Sizes& sizes) : sizes_(sizes) {
    for (int64_t size : sizes) total_ += size;
  }

  int64_t total() const { return total_; }

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

  // Claims and runs blocks until none is left. `body` is not touched after the last claim.
  template <class Body>
  void Work(Body& body) {
    for (;;) {
      int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
      if (index >= total_) return;
      int phase = 0;
      while (index >= sizes_[phase]) index -= sizes_[phase++];
      body(*this, phase, index);
      done_[phase].fetch_add(1, std::memory_order_release);
    }
  }

 private:
  Sizes sizes_;
  int64_t total_ = 0;
  std::atomic<int64_t> next_{0};
  std::array<std::atomic<int64_t>, kMax> done_{};
};

// Calls body(phases, phase, index) for every block of every phase, on at most `threads` threads
// of `pool`, the caller among them. A body that needs the results of earlier phases calls
// phases.WaitBefore(phase) itself, as late as it can.
template <class Body>
void RunPhases(xla::ffi::ThreadPool& pool, int64_t threads, const Phases::Sizes& sizes,
               Body body) {
  if (threads <= 1) {
    Phases phases(sizes);
    phases.Work(body);
    return;
  }
  // Shared, because a task that starts late looks at the counter after the call has returned.
  auto phases = std::make_shared<Phases>(sizes);
  const int64_t helpers = std::min(threads, phases->total()) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([phases, &body] { phases->Work(body); });
  }
  phases->Work(body);
  phases->WaitBefore(Phases::kMax);
}

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_PARALLEL_H_
