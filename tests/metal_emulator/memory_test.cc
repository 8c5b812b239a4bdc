// Bounds, races, and what memory holds before and after.

#include "runtime_test.h"

namespace metal_emulator {
namespace {

const char kAdd[] = R"(
kernel void k(device const float* x [[buffer(0)]], device const float* y [[buffer(1)]],
              device float* z [[buffer(2)]], constant uint& n [[buffer(3)]],
              uint i [[thread_position_in_grid]]) {
#ifdef GUARD
  if (i >= n) return;
#endif
  z[i] = x[i] + y[i];
}
)";

TEST(Add) {
  auto x = Iota(1000), y = Iota(1000);
  std::vector<float> z(1000, -1.0f);
  const auto function = Make(kAdd, "k", {{"GUARD", "1"}});
  const Dispatch dispatch =
      Grid(4, 256, {Bind("x", x), Bind("y", y), Bind("z", z), Bytes(uint32_t{1000})});
  metal_emulator_reset_counters();
  Check(function->Run(dispatch).empty(), "add runs");
  for (int i = 0; i < 1000; ++i) Check(z[i] == 2.0f * i, "z[i] = 2·i");
  const std::string traffic =
      "{\"bytes\": {\"read\": 4096, \"written\": 0}, \"x\": {\"read\": 4000, \"written\": 0}, "
      "\"y\": {\"read\": 4000, \"written\": 0}, \"z\": {\"read\": 0, \"written\": 4000}}";
  CheckContains(metal_emulator_counters(), "\"dispatches\": 1, \"traffic\": " + traffic);
  CheckContains(metal_emulator_counters(),
                "\"kernels\": {\"k\": {\"count\": 1, \"traffic\": " + traffic + "}}");
  CountCommandBuffer();
  CountObject("MTLBuffer", 2);
  CountObject("MTLBuffer", -1);
  CheckContains(metal_emulator_counters(), "\"command_buffers\": 1");
  CheckContains(metal_emulator_counters(), "\"live\": {\"MTLBuffer\": 1}");
}

TEST(OutOfBounds) {
  auto x = Iota(1000), y = Iota(1024);
  std::vector<float> z(1024, -1.0f);
  const auto function = Make(kAdd);
  CheckContains(
      function->Run(Grid(4, 256, {Bind("x", x), Bind("y", y), Bind("z", z), Bytes(1000)})),
      "out of bounds: kernel k reads 4 bytes at byte 40");
  for (float each : z) Check(each == -1.0f, "nothing is written after an error");
  x.resize(1024);
  z.resize(1000);
  const std::string error =
      function->Run(Grid(4, 256, {Bind("x", x), Bind("y", y), Bind("z", z), Bytes(1000)}));
  CheckContains(error, "out of bounds: kernel k writes 4 bytes at byte 40");
  CheckContains(error, " of 'z', which has 4000; thread ");
  CheckContains(error, " of threadgroup (3, 0, 0)");
  CheckContains(function->Run(Grid(1, 8, {Bind("x", x), Bind("y", y)})), "'z (not bound)'");

  std::vector<float> out(8);
  CheckContains(Make(R"(
struct Many { float values[20]; };
kernel void k(device const Many* x [[buffer(0)]], device Many* y [[buffer(1)]]) { y[0] = x[0]; }
)")
                    ->Run(Grid(1, 1, {Bind("x", out), Bind("y", x)})),
                "out of bounds: kernel k reads 80 bytes at byte 0 of 'x', which has 32");
  CheckContains(Make(R"(
kernel void k(device float* x [[buffer(0)]], constant int& n [[buffer(1)]]) {
  threadgroup float tile[4];
  tile[n] = 1.0f;
  x[0] = tile[0];
}
)")
                    ->Run(Grid(1, 1, {Bind("x", out), Bytes(4)})),
                "writes 4 bytes at byte 16 of threadgroup memory 'tile', which has 16");
  CheckContains(Make(R"(
kernel void k(device float* x [[buffer(0)]], constant ulong& n [[buffer(1)]]) {
  x[0] = *reinterpret_cast<device float*>(n);
}
)")
                    ->Run(Grid(1, 1, {Bind("x", out), Bytes(uint64_t{64})})),
                "at an address that no argument leads to");
  CheckContains(Make(R"(
kernel void k(device const float* x [[buffer(0)]]) { const_cast<device float*>(x)[0] = 1.0f; }
)")
                    ->Run(Grid(1, 1, {Bind("x", out)})),
                "write to const memory");
  CheckContains(Make(R"(
kernel void k(device float* x [[buffer(0)]]) {
  *reinterpret_cast<device float4*>(x + 1) = float4(1.0f);
}
)")
                    ->Run(Grid(1, 1, {Bind("x", x)})),
                "misaligned: kernel k writes 16 bytes at byte 4 of 'x'");
}

const char kReduce[] = R"(
kernel void k(device const float* x [[buffer(0)]], device float* sums [[buffer(1)]],
              uint group [[threadgroup_position_in_grid]],
              uint t [[thread_index_in_threadgroup]],
              uint threads [[threads_per_threadgroup]]) {
  threadgroup float partial[256];
  partial[t] = x[group * threads + t];
#ifndef FORGOTTEN
  threadgroup_barrier(mem_flags::mem_threadgroup);
#endif
  for (uint stride = threads / 2; stride > 0; stride /= 2) {
    if (t < stride) partial[t] += partial[t + stride];
    threadgroup_barrier(mem_flags::FLAG);
  }
  if (t == 0) sums[group] = partial[0];
}
)";

TEST(Reduction) {
  auto x = Iota(1024);
  const auto right = Make(kReduce, "k", {{"FLAG", "mem_threadgroup"}});
  Check(right->static_threadgroup_bytes() == 1024, "static_threadgroup_bytes");
  const auto forgotten = Make(kReduce, "k", {{"FLAG", "mem_threadgroup"}, {"FORGOTTEN", "1"}});
  const auto flagless = Make(kReduce, "k", {{"FLAG", "mem_none"}});
  for (int seed = 1; seed <= 20; ++seed) {
    metal_emulator_seed(seed);
    std::vector<float> sums(4);
    const Dispatch dispatch = Grid(4, 256, {Bind("x", x), Bind("sums", sums)});
    const std::string error = right->Run(dispatch);
    Check(error.empty(), error);
    for (int i = 0; i < 4; ++i) Check(sums[i] == 256 * (256 * i + 127.5f), "sums[i]");
    CheckContains(forgotten->Run(dispatch), "race on threadgroup memory: kernel k ");
    CheckContains(flagless->Run(dispatch), "race on threadgroup memory: kernel k ");
  }
}

// One pair of accesses is a race, whichever comes first, or is not.
TEST(Races) {
  const char source[] = R"(
kernel void k(device float* x [[buffer(0)]], uint t [[thread_index_in_threadgroup]],
              uint group [[threadgroup_position_in_grid]]) {
  threadgroup half tile[64];
  BODY
}
)";
  const std::pair<const char*, bool> cases[] = {
      {"tile[t] = 1.0h; simdgroup_barrier(mem_flags::mem_threadgroup); x[t] = tile[t ^ 1];", false},
      {"tile[t] = 1.0h; simdgroup_barrier(mem_flags::mem_threadgroup); x[t] = tile[t ^ 32];", true},
      {"tile[t] = 1.0h; simdgroup_barrier(mem_flags::mem_none); x[t] = tile[t ^ 1];", true},
      {"tile[t] = 1.0h; simdgroup_barrier(mem_flags::mem_device); x[t] = tile[t ^ 1];", true},
      {"tile[t] = half(simd_sum(1.0f)); x[t] = tile[t ^ 1];", true},
      {"tile[t] = 1.0h; x[t] = simd_sum(float(tile[t ^ 1]));", true},
      {"tile[t] = 1.0h; x[t] = tile[t];", false},
      {"x[t] = tile[t ^ 1]; tile[t] = 1.0h;", true},
      {"x[t] = tile[5]; threadgroup_barrier(mem_flags::mem_threadgroup); "
       "if (t == 9) tile[5] = 1.0h;",
       false},
      {"x[t] = tile[5]; simdgroup_barrier(mem_flags::mem_threadgroup); "
       "if (t == 9) tile[5] = 1.0h;",
       true},
      {"if (t < 32) x[t] = tile[5]; simdgroup_barrier(mem_flags::mem_threadgroup); "
       "if (t == 9) tile[5] = 1.0h;",
       false},
      {"tile[0] = 1.0h;", true},
      {"x[0] = 1.0f;", true},
      {"if (t == 0) x[0] = 1.0f;", false},
      {"if (t == 0) x[0] = 1.0f; threadgroup_barrier(mem_flags::mem_device); x[t + 1] = x[0];",
       false},
      {"if (t == 0) x[0] = 1.0f; threadgroup_barrier(mem_flags::mem_threadgroup); x[t + 1] = x[0];",
       true},
      {"reinterpret_cast<threadgroup uchar*>(tile)[t] = 1;", false},
  };
  std::vector<float> x(65);
  for (const auto& [body, race] : cases) {
    const auto function = Make(source, "k", {{"BODY", body}});
    for (int seed = 1; seed <= 5; ++seed) {
      metal_emulator_seed(seed);
      const std::string error = function->Run(Grid(1, 64, {Bind("x", x)}));
      Check(error.empty() ? !race : race && error.find("race on ") == 0,
            std::string(body) + " → \"" + error + "\"");
    }
  }
  for (const char* body : {"if (t == 0) x[0] = 1.0f;", "if (t == 0) x[group] = x[group ^ 1];"}) {
    const auto function = Make(source, "k", {{"BODY", body}});
    for (int seed = 1; seed <= 5; ++seed) {
      metal_emulator_seed(seed);
      CheckContains(function->Run(Grid(2, 64, {Bind("x", x)})), "of another threadgroup");
    }
  }
}

TEST(Poison) {
  std::vector<uint32_t> out(64 * 4);
  const auto function = Make(R"(
kernel void k(device uint* out [[buffer(0)]], threadgroup uint* more [[threadgroup(2)]],
              uint t [[thread_index_in_threadgroup]], uint group [[threadgroup_position_in_grid]]) {
  threadgroup uint tile[64], other[2][32];
  out[group * 64 + t] = tile[t] & other[t / 32][t % 32] & more[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  tile[t] = other[t / 32][t % 32] = more[t] = 0;
}
)");
  Check(function->static_threadgroup_bytes() == 512, "static_threadgroup_bytes");
  Dispatch dispatch = Grid(4, 64, {Bind("out", out)});
  dispatch.threadgroup_lengths[2] = 256;
  std::string error = function->Run(dispatch);
  Check(error.empty(), error);
  for (uint32_t each : out) Check(each == 0xffffffff, "threadgroup memory is NaN at first");
  dispatch.threadgroup_lengths[2] = 128;
  CheckContains(function->Run(dispatch), "of threadgroup memory 'more', which has 128");
  dispatch.threadgroup_lengths[2] = 32768 - 256;
  CheckContains(function->Run(dispatch), "bytes of threadgroup memory; there are 32768");
  dispatch.threads[1] = 17;
  CheckContains(function->Run(dispatch), "a threadgroup of 1088 threads");
}

TEST(SharedBinding) {
  // In place: two arguments, one array.
  std::vector<float> x = Iota(64);
  const std::string error = Make(R"(
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
              uint t [[thread_index_in_threadgroup]]) {
  y[t] = x[t] + 1.0f;
  y[t] += x[t];
}
)")
                                ->Run(Grid(1, 64, {Bind("x", x), Bind("x", x)}));
  Check(error.empty(), error);
  for (int i = 0; i < 64; ++i) Check(x[i] == 2.0f * (i + 1), "in place");
}

}  // namespace
}  // namespace metal_emulator
