#include "scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <numeric>
#include <utility>

namespace metal_emulator {
namespace {

namespace fibers = boost::context::detail;

std::atomic<uint64_t>& Seed() {
  static std::atomic<uint64_t> seed([] {
    const char* given = std::getenv("METAL_EMULATOR_SEED");
    return given != nullptr ? std::strtoull(given, nullptr, 10) : 1;
  }());
  return seed;
}

// With a page below that faults. 0 where there is no memory.
uintptr_t NewStack() {
  const size_t page = sysconf(_SC_PAGESIZE);
  void* stack = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) return 0;
  mprotect(stack, page, PROT_NONE);
  return reinterpret_cast<uintptr_t>(stack) + page;
}

}  // namespace

Random::Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15 + 0x2545f4914f6cdd1d) {
  if (state_ == 0) state_ = 1;
  for (int i = 0; i < 8; ++i) Below(1);
}

std::string Scheduler::SetUp(const Kernel& kernel, const Dispatch& dispatch, uint32_t threads) {
  kernel_ = &kernel;
  groups_ = dispatch.groups;
  threads_ = threads;
  random_ = Random(Seed());
  for (uint32_t i = 0; i < threads; ++i) {
    Thread& fiber = fibers_[i];
    if (fiber.stack == 0) fiber.stack = NewStack();
    if (fiber.stack == 0) return "the emulator is out of memory";
    const auto& size = dispatch.threads;
    Place& place = fiber.place;
    place.position[0] = i % size[0];
    place.position[1] = i / size[0] % size[1];
    place.position[2] = i / size[0] / size[1];
    std::copy(size.begin(), size.end(), place.size);
    std::copy(groups_.begin(), groups_.end(), place.groups);
    place.index = i;
    place.simdgroup = i / kSimdWidth;
    place.lane = i % kSimdWidth;
    place.simdgroups = (threads + kSimdWidth - 1) / kSimdWidth;
  }
  return "";
}

std::vector<uint32_t> Scheduler::DrawOrder(uint32_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_.Below(i)]);
  return order;
}

std::string Scheduler::Run(uint32_t group, void (*body)()) {
  body_ = body;
  error_.clear();
  ended_ = 0;
  for (uint32_t i = 0; i < threads_; ++i) {
    Thread& fiber = fibers_[i];
    fiber.place.group[0] = group % groups_[0];
    fiber.place.group[1] = group / groups_[0] % groups_[1];
    fiber.place.group[2] = group / groups_[0] / groups_[1];
    fiber.passed = 0;
    // Stacks begin at different places, or the same few lines of the cache would serve them all.
    const uintptr_t top = fiber.stack + kStackBytes - i % 64 * 704;
    fiber.context = fibers::make_fcontext(reinterpret_cast<void*>(top), top - fiber.stack, Begin);
    ready_[i] = i;
  }
  ready_count_ = threads_;
  current_ = &caller_;
  Wait();
  return std::move(error_);
}

void Scheduler::Begin(fibers::transfer_t from) {
  auto* const scheduler = static_cast<Scheduler*>(from.data);
  scheduler->left_->context = from.fctx;
  scheduler->body_();
}

inline void Scheduler::JumpTo(Thread* next) {
  if (next == current_) return;
  left_ = current_;
  current_ = next;
  *place_ = &next->place;
  const fibers::transfer_t from = fibers::jump_fcontext(next->context, this);
  left_->context = from.fctx;  // of whoever has jumped here
}

void Scheduler::Wait() {
  if (ready_count_ == 0) {
    if (ended_ == threads_) JumpTo(&caller_);
    Fail("divergent: kernel " + std::string(kernel_->name) +
         " has threads that wait for each other at different calls");
  }
  const uint32_t i = random_.Below(ready_count_);
  const uint32_t next = ready_[i];
  ready_[i] = ready_[--ready_count_];
  JumpTo(&fibers_[next]);
}

void Scheduler::End() {
  ended_ += 1;
  last_ended_ = current_->place.index;
  Wait();
  std::abort();
}

void Scheduler::Fail(const std::string& message) {
  const Place& place = current_->place;
  const auto& group = place.group;
  error_ = message + "; thread " + std::to_string(place.index) + " of threadgroup (" +
           std::to_string(group[0]) + ", " + std::to_string(group[1]) + ", " +
           std::to_string(group[2]) + ")";
  JumpTo(&caller_);  // which never comes back to this fiber
  std::abort();
}

}  // namespace metal_emulator

void metal_emulator_seed(uint64_t seed) { metal_emulator::Seed() = seed; }
