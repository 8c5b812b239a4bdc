// What both calls cut their work into, and how it is handed to threads.
#ifndef JAX_FUSED_LORA_NATIVE_CPU_UNITS_H_
#define JAX_FUSED_LORA_NATIVE_CPU_UNITS_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "native/calls.h"
#include "native/cpu/kernels.h"
#include "native/cpu/parallel.h"
#include "native/cpu/workspace.h"

namespace jax_fused_lora {

// Below this many multiplications a second thread costs more than it brings: waking one takes
// 5 to 10 µs, in which a core multiplies some 500,000 times. Reading W counts for more, since
// that is memory's time.
constexpr int64_t kWorthAThread = 500'000;

// The same of a sweep over rows, for which each thread reads A and B (float32, 1024→1024, rank 8,
// Sapphire Rapids, one thread and two: 24 rows 15 and 21 µs, 64 rows 29 and 33, 128 rows 54 and 40;
// Zen 4 gains from two earlier: 24 rows of rank 16, 980,000, 23.6 and 17.2, 28 rows 26 and 22).
inline int64_t SweepWorthAThread() { return IsAmd() ? 900'000 : 1'200'000; }

// Ranks that take as long as reading and writing the rows they are multiplied by (512×256→256, one
// thread, Zen 4: 17 µs with 1, 20 with 2, 28 with 4).
constexpr int64_t kSweepRanks = 4;

// Below this many, claiming a block costs about as much as doing it.
constexpr int64_t kWorthABlock = 20'000;

// Multiplications, as a float: a batch of nothing may be longer than integers go.
inline double Work(int64_t times, int64_t size, int64_t rows) {
  return static_cast<double>(times) * static_cast<double>(size) * static_cast<double>(rows);
}

// The same of `times` sweeps over rows of x and y, (rows, size) together: what is multiplied, and
// what is read and written.
inline double SweepWork(int64_t times, int64_t size, int64_t rank, int64_t rows) {
  return Work(times, size, std::max<int64_t>(rows, 1)) * static_cast<double>(rank + kSweepRanks);
}

inline size_t Width(ffi::DataType dtype) { return dtype == ffi::DataType::F32 ? 4 : 2; }

// `elements` further on.
template <class T>
T* At(T* data, int64_t elements, ffi::DataType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + elements * static_cast<int64_t>(Width(dtype));
}

// Whether a sweep from one buffer to another begins at their ends. In a chain of layers XLA lets
// two buffers take turns, so each sweep goes the other way than the one before and begins with the
// rows that this one left in the second cache (float32, 512×2048, rank 16: 281 → 268 µs).
inline bool Backwards(const void* from, const void* to) {
  return reinterpret_cast<uintptr_t>(from) > reinterpret_cast<uintptr_t>(to);
}

// A thread's working memory, allocated the first time the thread takes a block.
inline Scratch* ThreadScratch() {
  thread_local std::unique_ptr<Scratch> scratch(new Scratch);
  return scratch.get();
}

// Calls body(phases, phase, unit) for every unit of every phase. A unit is a block of its own but
// in a batch, where small ones are handed out several at a time. `work` is the call's, in
// multiplications.
template <class Body>
void RunUnits(ffi::ThreadPool& pool, const Batch& batch, const Phases::Sizes& units, double work,
              bool backwards, const Body& body) {
  Phases::Sizes each, blocks;
  for (int phase = 0; phase < Phases::kMax; ++phase) {
    const double worth = kWorthABlock * static_cast<double>(units[phase]);
    each[phase] =
        batch.count == 1 || worth <= work ? 1 : static_cast<int64_t>(worth / std::max(work, 1.0));
    blocks[phase] = Blocks(units[phase], each[phase]);
  }
  const int64_t threads = work < kWorthAThread ? 1 : std::max<int64_t>(pool.num_threads(), 1);
  RunPhases(pool, threads, blocks, backwards, [&](const Phases& phases, int phase, int64_t block) {
    const int64_t end = std::min((block + 1) * each[phase], units[phase]);
    for (int64_t unit = block * each[phase]; unit < end; ++unit) body(phases, phase, unit);
  });
}

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_UNITS_H_
