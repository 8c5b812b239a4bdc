// Threads that meet, or ought to, and the order in which they run.

#include <cstring>
#include <set>

#include "runtime_test.h"

namespace metal_emulator {
namespace {

TEST(Divergence) {
  const char source[] = R"(
inline void sync() { threadgroup_barrier(mem_flags::mem_none); }
kernel void k(device float* x [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  simdgroup_float8x8 m;
  threadgroup float tile[64];
  BODY
  if (t == 99) simdgroup_store(m, tile, 8);
}
)";
  const std::pair<const char*, const char*> cases[] = {
      {"if (t < 32) threadgroup_barrier(mem_flags::mem_none);", "divergent barrier"},
      {"if (t != 7) threadgroup_barrier(mem_flags::mem_none);", "divergent barrier"},
      {"if (t == 7) return; threadgroup_barrier(mem_flags::mem_none);", "divergent barrier"},
      {"if (t < 32) threadgroup_barrier(mem_flags::mem_none);"
       "else threadgroup_barrier(mem_flags::mem_none);",
       "divergent barrier"},
      {"if (t < 32) { x[t] = 1.0f; sync(); } else { x[t] = 2.0f; sync(); }", "divergent barrier"},
      {"if (t < 32) simdgroup_barrier(mem_flags::mem_none);", ""},
      {"if (t < 16) simdgroup_barrier(mem_flags::mem_none);", "divergent barrier"},
      {"if (t < 16) x[t] = simd_sum(x[t]);", "divergent simd_sum"},
      {"if (t < 32) x[t] = simd_sum(x[t]); else x[t] = simd_max(x[t]);", ""},
      {"if (t < 16) x[t] = simd_sum(x[t]); else x[t] = simd_max(x[t]);", "divergent simd_"},
      {"if (t < 16) simdgroup_load(m, x, 8);", "divergent simdgroup_load"},
      {"if (t < 16) simdgroup_load(m, x, 8); threadgroup_barrier(mem_flags::mem_none);",
       "divergent simdgroup_load"},
      {"if (t < 32) simdgroup_load(m, x, 8);", ""},
      {"if (t < 16) simdgroup_multiply_accumulate(m, m, m, m);", "divergent simdgroup_multiply"},
      {"if (t < 16) { threadgroup_barrier(mem_flags::mem_none); } else { simd_sum(1.0f); }",
       "divergent "},
      {"for (uint i = 0; i < t; ++i) threadgroup_barrier(mem_flags::mem_none);",
       "divergent barrier"},
      {"for (uint i = 0; i < 5; ++i) threadgroup_barrier(mem_flags::mem_none);", ""},
  };
  std::vector<float> x(64);
  for (const auto& [body, expected] : cases) {
    const auto function = Make(source, "k", {{"BODY", body}});
    for (int seed = 1; seed <= 5; ++seed) {
      metal_emulator_seed(seed);
      const std::string error = function->Run(Grid(2, 64, {Bind("x", x)}));
      if (std::strstr(body, "x[t]") != nullptr && error.find("race on device") == 0) continue;
      if (*expected == '\0') {
        Check(error.empty(), std::string(body) + " → " + error);
      } else {
        CheckContains(error, expected);
      }
    }
  }
}

// The thread that is first to do wrong is the one that an error names.
TEST(Order) {
  for (const char* before : {"", "simd_sum(1.0f);", "threadgroup_barrier(mem_flags::mem_none);"}) {
    const auto function = Make(R"(
kernel void k(device uint* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]]) {
  BEFORE
  out[64] = 1;
}
)",
                               "k", {{"BEFORE", before}});
    std::set<std::string> seen;
    for (int seed = 1; seed <= 20; ++seed) {
      metal_emulator_seed(seed);
      std::vector<uint32_t> out(64);
      const Dispatch dispatch = Grid(8, 64, {Bind("out", out)});
      const std::string error = function->Run(dispatch);
      Check(error == function->Run(dispatch), "the same seed, the same order");
      seen.insert(error);
    }
    Check(seen.size() > 15, "the order of threads changes with the seed");
  }
}

}  // namespace
}  // namespace metal_emulator
