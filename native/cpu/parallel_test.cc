// RunPhases on pools that behave as badly as XLA's may. Blocks write plain memory, so that a block
// run twice, or read before it is done, is a data race that ThreadSanitizer sees.

#include "native/cpu/parallel.h"

#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <initializer_list>
#include <mutex>
#include <thread>
#include <vector>

namespace jax_fused_lora {
namespace {

int passed = 0, failed = 0;

void Check(bool ok, const char* what, int64_t threads, const Phases::Sizes& sizes) {
  ok ? ++passed : ++failed;
  if (!ok) {
    std::printf("FAILED %s threads=%d sizes=%d,%d,%d\n", what, static_cast<int>(threads),
                static_cast<int>(sizes[0]), static_cast<int>(sizes[1]), static_cast<int>(sizes[2]));
  }
}

// Threads that take tasks in order. The destructor runs what is left.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void Run() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

// Starts nothing before it is told to.
struct LatePool {
  void Schedule(std::function<void()> task) { tasks.push_back(std::move(task)); }

  std::vector<std::function<void()>> tasks;
};

// Runs phases that count their blocks. Whether each block ran once, and after the phases before.
template <class AnyPool>
bool RunsEachBlockOnceInOrder(AnyPool& pool, int64_t threads, const Phases::Sizes& sizes,
                              bool backwards = false) {
  std::array<std::vector<int>, Phases::kMax> runs;
  for (int phase = 0; phase < Phases::kMax; ++phase) runs[phase].resize(sizes[phase]);
  std::atomic<bool> in_order{true};
  RunPhases(pool, threads, sizes, backwards, [&](const Phases& phases, int phase, int64_t index) {
    phases.WaitBefore(phase);
    for (int before = 0; before < phase; ++before) {
      for (int count : runs[before]) {
        if (count != 1) in_order = false;
      }
    }
    ++runs[phase][index];
  });
  bool once = true;
  for (const std::vector<int>& counts : runs) {
    for (int count : counts) once = once && count == 1;
  }
  return once && in_order;
}

// No block, fewer blocks than threads, more, and more threads than there are ranges to hand out.
constexpr int64_t kThreads[] = {0, 1, 2, 3, 8, 40};
const Phases::Sizes kSizes[] = {{0, 0, 0}, {1, 0, 0}, {0, 0, 1},   {0, 5, 0},     {1, 1, 1},
                                {3, 2, 1}, {7, 0, 9}, {64, 1, 64}, {100, 50, 150}};

void Everything() {
  Pool pool(4);
  for (int64_t threads : kThreads) {
    for (const Phases::Sizes& sizes : kSizes) {
      bool ok = true;
      for (int repeat = 0; repeat < 50; ++repeat) {
        ok = RunsEachBlockOnceInOrder(pool, threads, sizes, repeat % 2 == 1) && ok;
      }
      Check(ok, "each block once, in order", threads, sizes);
    }
  }
}

// The caller waits for no task to start, and a task that starts after the call has returned
// neither runs a block nor touches the body, which is gone.
void TasksThatStartLate() {
  for (int64_t threads : kThreads) {
    for (const Phases::Sizes& sizes : kSizes) {
      LatePool pool;
      Check(RunsEachBlockOnceInOrder(pool, threads, sizes), "no task starts", threads, sizes);
      const int64_t blocks = *std::max_element(sizes.begin(), sizes.end());
      Check(static_cast<int64_t>(pool.tasks.size()) < std::max<int64_t>(blocks, 1),
            "no more tasks than blocks", threads, sizes);
      for (const auto& task : pool.tasks) task();
    }
  }
}

// One thread alone meets its range in the order that was asked for.
void Backwards() {
  const Phases::Sizes sizes = {5, 0, 3};
  for (bool backwards : {false, true}) {
    std::vector<int64_t> order, expected = {0, 1, 2, 3, 4, 0, 1, 2};
    if (backwards) expected = {4, 3, 2, 1, 0, 2, 1, 0};
    LatePool pool;
    RunPhases(pool, 1, sizes, backwards,
              [&](const Phases&, int, int64_t index) { order.push_back(index); });
    Check(order == expected, "order of blocks", 1, sizes);
  }
}

// Every thread of the pool is inside a call, and each call schedules tasks on that pool.
void CallsOnThePoolsOwnThreads() {
  const Phases::Sizes sizes = {10, 20, 5};
  constexpr int kCalls = 200;
  std::vector<char> ok(kCalls);
  {
    Pool pool(3);
    for (int call = 0; call < kCalls; ++call) {
      pool.Schedule([&, call] { ok[call] = RunsEachBlockOnceInOrder(pool, 4, sizes); });
    }
  }
  Check(std::count(ok.begin(), ok.end(), 1) == kCalls, "calls on the pool's threads", 4, sizes);
}

}  // namespace
}  // namespace jax_fused_lora

int main() {
  using namespace jax_fused_lora;
  Everything();
  TasksThatStartLate();
  Backwards();
  CallsOnThePoolsOwnThreads();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
