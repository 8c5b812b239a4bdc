// Tests the runtime and metalc.py by small shaders, right ones and wrong ones. Returns how many
// checks failed; an argument runs only the tests whose name contains it.
//
//   clang++-16 -std=c++17 -O2 runtime.cc runtime_test.cc -o runtime_test -lboost_context -ldl

#include "runtime.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

using metal_emulator::Binding;
using metal_emulator::Dispatch;
using metal_emulator::Function;

namespace {

int failures = 0;

void Check(bool holds, const std::string& what) {
  if (holds) return;
  failures += 1;
  std::printf("  FAILED: %s\n", what.c_str());
}

void CheckContains(const std::string& text, const std::string& part) {
  Check(text.find(part) != std::string::npos, "\"" + text + "\" has no \"" + part + "\"");
}

using Constants = std::map<int, std::vector<char>>;

std::shared_ptr<Function> Make(const std::string& body, const std::string& name = "k",
                               const std::map<std::string, std::string>& macros = {},
                               const Constants& constants = {}) {
  std::string error;
  auto library = metal_emulator::Compile("#include <metal_stdlib>\nusing namespace metal;\n" + body,
                                         macros, &error);
  if (library == nullptr) {
    Check(false, error);
    std::exit(1);
  }
  auto function = library->MakeFunction(name, constants, &error);
  Check(function != nullptr, error);
  return function;
}

std::string CompileError(const std::string& source) {
  std::string error;
  Check(metal_emulator::Compile(source, {}, &error) == nullptr, "this compiles: " + source);
  return error;
}

template <class T>
Binding Bind(const char* name, std::vector<T>& values) {
  return {name, reinterpret_cast<char*>(values.data()), values.size() * sizeof(T), {}};
}

template <class T>
Binding Bytes(T value) {
  const char* begin = reinterpret_cast<const char*>(&value);
  return {"bytes", nullptr, sizeof value, std::vector<char>(begin, begin + sizeof value)};
}

Dispatch Grid(uint32_t groups, uint32_t threads, std::vector<Binding> buffers) {
  Dispatch dispatch;
  dispatch.groups[0] = groups;
  dispatch.threads[0] = threads;
  for (size_t i = 0; i < buffers.size(); ++i) dispatch.buffers[i] = std::move(buffers[i]);
  return dispatch;
}

std::vector<float> Iota(size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i);
  return values;
}

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

void TestAdd() {
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
  metal_emulator::CountCommandBuffer();
  metal_emulator::CountObject("MTLBuffer", 2);
  metal_emulator::CountObject("MTLBuffer", -1);
  CheckContains(metal_emulator_counters(), "\"command_buffers\": 1");
  CheckContains(metal_emulator_counters(), "\"live\": {\"MTLBuffer\": 1}");
}

void TestOutOfBounds() {
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

void TestReduction() {
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
  metal_emulator_seed(1);
}

// One pair of accesses is a race, whichever comes first, or is not.
void TestRaces() {
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
  metal_emulator_seed(1);
}

void TestDivergence() {
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
  metal_emulator_seed(1);
}

void TestSimd() {
  std::vector<float> out(9 * 40);
  const std::string error = Make(R"(
kernel void k(device float* out [[buffer(0)]], uint t [[thread_index_in_threadgroup]],
              uint lane [[thread_index_in_simdgroup]],
              ushort group [[simdgroup_index_in_threadgroup]],
              uint groups [[simdgroups_per_threadgroup]]) {
  const float x = t;
  device float* own = out + t * 9;
  own[0] = simd_sum(x);
  own[1] = simd_max(x);
  own[2] = simd_min(x);
  own[3] = simd_shuffle(x, lane / 2);
  own[4] = simd_shuffle_down(x, 3);
  own[5] = simd_shuffle_xor(x, 5);
  own[6] = simd_broadcast(x, 6);
  own[7] = float(simd_sum(int(t))) + groups + group;
  own[8] = simd_prefix_exclusive_sum(x) + simd_shuffle_up(x, 2);
}
)")
                                ->Run(Grid(1, 40, {Bind("out", out)}));
  Check(error.empty(), error);
  for (int t = 0; t < 40; ++t) {
    const int base = t / 32 * 32, lane = t % 32, size = base == 0 ? 32 : 8;
    const auto at = [&](int from) {
      return from < size ? static_cast<float>(base + from) : std::nanf("");
    };
    const float sum = size * base + size * (size - 1) / 2.0f;
    const float expected[] = {
        sum,
        at(size - 1),
        at(0),
        at(lane / 2),
        lane + 3 < 32 ? at(lane + 3) : at(lane),
        at(lane ^ 5),
        at(6),
        sum + 2 + t / 32,
        lane * base + lane * (lane - 1) / 2.0f + at(lane < 2 ? lane : lane - 2)};
    for (int i = 0; i < 9; ++i) {
      const float got = out[t * 9 + i];
      Check(got == expected[i] || (got != got && expected[i] != expected[i]),
            "simd operation " + std::to_string(i) + " of thread " + std::to_string(t));
    }
  }
}

// Of small whole numbers and halves, which all three types hold.
uint16_t ToHalf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value == 0) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000) | ((bits >> 23 & 0xff) - 112) << 10 |
                               (bits >> 13 & 0x3ff));
}
uint16_t ToBfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

void TestMatrices() {
  const char source[] = R"(
kernel void k(device const E* a [[buffer(0)]], device const E* b [[buffer(1)]],
              device float* d [[buffer(2)]], uint t [[thread_index_in_simdgroup]]) {
  threadgroup E tile[16 * 24];
  for (uint i = t; i < 16 * 24; i += 32) tile[i] = a[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<E, 8, 8> left, right, right2;
  simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_load(left, tile + 8, 24, ulong2(8, 8));  // rows and columns 16, 8
  simdgroup_load(right, b, 8);
  simdgroup_multiply_accumulate(sum, left, right, sum);
  simdgroup_store(sum, d, 8);
  simdgroup_load(right2, b, 8, ulong2(0), true);
  simdgroup_multiply(sum, left, right2);
  simdgroup_store(sum, d + 64, 8, ulong2(0), true);
  simdgroup_matrix<E, 8, 8> product;
  simdgroup_multiply(product, left, simdgroup_matrix<E, 8, 8>(E(2.0f)));
  simdgroup_multiply(sum, product, simdgroup_float8x8(1.0f));
  simdgroup_store(sum, d + 128, 8);
}
)";
  std::mt19937 random(5);
  std::vector<float> a(16 * 24), b(64);
  for (float& each : a) each = static_cast<int>(random() % 17) / 2.0f - 4.0f;
  for (float& each : b) each = static_cast<int>(random() % 17) / 2.0f - 4.0f;
  for (const char* type : {"float", "half", "bfloat"}) {
    const auto function = Make(source, "k", {{"E", type}});
    std::vector<uint16_t> a16, b16;
    for (float each : a) a16.push_back(*type == 'h' ? ToHalf(each) : ToBfloat(each));
    for (float each : b) b16.push_back(*type == 'h' ? ToHalf(each) : ToBfloat(each));
    std::vector<float> d(192);
    const bool wide = *type == 'f';
    const std::string error =
        function->Run(Grid(1, 32,
                           {wide ? Bind("a", a) : Bind("a", a16),
                            wide ? Bind("b", b) : Bind("b", b16), Bind("d", d)}));
    Check(error.empty(), error);
    for (int i = 0; i < 8; ++i) {
      for (int j = 0; j < 8; ++j) {
        float straight = 1.0f, transposed = 0.0f;
        for (int k = 0; k < 8; ++k) {
          straight += a[(i + 8) * 24 + 16 + k] * b[k * 8 + j];
          transposed += a[(i + 8) * 24 + 16 + k] * b[j * 8 + k];
        }
        const std::string where = std::string(type) + " product at " + std::to_string(i * 8 + j);
        Check(d[i * 8 + j] == straight, where);
        Check(d[64 + j * 8 + i] == transposed, where + ", transposed");
        Check(d[128 + i * 8 + j] == 2.0f * a[(i + 8) * 24 + 16 + j], where + " with a diagonal");
      }
    }
  }
}

void TestTypes() {
  std::vector<uint32_t> out(24);
  const std::string error =
      Make(R"(
constant float table[] = {1.0f, 2.5f};
struct Sizes { uint rows; float scaling; };
kernel void k(device uint* out [[buffer(0)]], constant Sizes& s [[buffer(1)]],
              uint3 group [[threadgroup_position_in_grid]],
              uint3 threads [[threads_per_threadgroup]],
              uint2 position [[thread_position_in_grid]]) {
  out[0] = as_type<ushort>(bfloat(1.00390625f));  // a tie, to even
  out[1] = as_type<ushort>(bfloat(1.01171875f));  // a tie, to even
  out[2] = as_type<ushort>(bfloat(as_type<float>(0x7f800001u)));
  out[3] = as_type<ushort>(bfloat(as_type<float>(0x7f7fffffu)));
  out[4] = as_type<uint>(float(as_type<bfloat>(ushort(0x3fc0))));
  out[5] = as_type<ushort>(half(2049.0f));
  const float4 v = float4(float2(1.0f, 2.0f), 3.0f, 4.0f);
  out[6] = uint(v.x + v.w * v.zy.x);
  out[7] = uint(table[s.rows]* 2.0f);
  out[8] = min(3u, 5u) + max(10u, 20u) + clamp(7u, 1u, 2u);
  out[9] = as_type<uint>(fma(2.0f, 3.0f, s.scaling));
  out[10] = as_type<uint>(1.0 / 3.0);  // a float's
  out[11] = threads.x * 100 + threads.y * 10 + threads.z;
  out[12] = as_type<ushort>(bfloat(1.0f) + bfloat(0.001f));
  float worst = 0.0f;
  for (uint i = 0; i < 4; ++i) worst = max(worst, fabs(float4(0.0f, -7.0f, 2.0f, 1.0f)[i]));
  out[13] = uint(worst);
  out[14] = select(1u, 2u, true);
  out[15] = uint(dot(float2(2.0f), float2(3.0f, 4.0f)) + max(float2(1.0f), float2(0.0f, 5.0f)).y);
}
)")
          ->Run(Grid(1, 1, {Bind("out", out), Bytes(std::pair<uint32_t, float>{1, 0.5f})}));
  Check(error.empty(), error);
  const uint32_t expected[] = {0x3f80, 0x3f82,     0x7fc0,     0x7f80, 0x3fc00000, 0x6800, 13, 5,
                               25,     0x40d00000, 0x3eaaaaab, 111,    0x3f80,     7,      2,  19};
  for (int i = 0; i < 16; ++i) {
    Check(out[i] == expected[i], "value " + std::to_string(i) + " is " + std::to_string(out[i]));
  }
}

void TestPoison() {
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

void TestConstants() {
  const char source[] = R"(
constant bool flag [[function_constant(0)]];
constant uint amount [[ function_constant(3) ]];
constant constexpr uint kDouble = 2;
kernel void k(device uint* out [[buffer(0)]]) { out[0] = (flag ? 1000 : 0) + kDouble * amount; }
)";
  const auto bytes = [](uint32_t value) {
    const char* begin = reinterpret_cast<const char*>(&value);
    return std::vector<char>(begin, begin + 4);
  };
  const auto one = Make(source, "k", {}, {{0, {1}}, {3, bytes(21)}});
  const auto two = Make(source, "k", {}, {{0, {0}}, {3, bytes(7)}});
  std::vector<uint32_t> out(1);
  const Dispatch dispatch = Grid(1, 1, {Bind("out", out)});
  for (int i = 0; i < 2; ++i) {
    Check(one->Run(dispatch).empty() && out[0] == 1042, "one set of constants");
    Check(two->Run(dispatch).empty() && out[0] == 14, "another");
  }
  std::string error;
  const auto library =
      metal_emulator::Compile(std::string("#include <metal_stdlib>\n") + source, {}, &error);
  Check(!library->MakeFunction("k", {{0, {1}}}, &error), "a value is missing");
  CheckContains(error, "amount has no value");
  Check(!library->MakeFunction("k", {{0, {1}}, {3, {1}}}, &error), "a value is too short");
  Check(!library->MakeFunction("k", {{0, {1}}, {3, bytes(1)}, {4, {1}}}, &error), "unknown");
  CheckContains(error, "no function constant 4");
  Check(!library->MakeFunction("q", {{0, {1}}, {3, bytes(1)}}, &error), "no such kernel");
  CheckContains(error, "no kernel q");
}

// The thread that is first to do wrong is the one that an error names.
void TestOrder() {
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
  metal_emulator_seed(1);
}

void TestSharedBinding() {
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

void TestCompileErrors() {
  CheckContains(CompileError("#include <metal_stdlib>\n\nkernel void k() { nonsense(); }"),
                "program_source:3:19: error:");
  CheckContains(CompileError("#include <cmath>\n"), "file not found");
  CheckContains(CompileError("#include <metal_stdlib>\nvoid f() { threadgroup float x[3]; }"),
                "program_source:2: error: only a kernel can declare threadgroup memory");
  CheckContains(CompileError("kernel void k(device float* x) {}"), "has no attribute known here");
  CheckContains(CompileError("#include <metal_stdlib>\n"
                             "kernel void k(constant uint& n [[buffer(0)]]) { n = 1; }"),
                "const");
}

// A product as a GPU kernel does it, for its speed: 64×64 tiles, four simdgroups of 32×32.
void TestSpeed() {
  const auto function = Make(R"(
kernel void k(device const float* a [[buffer(0)]], device const float* b [[buffer(1)]],
              device float* d [[buffer(2)]], constant uint3& sizes [[buffer(3)]],
              uint2 group [[threadgroup_position_in_grid]],
              uint t [[thread_index_in_threadgroup]],
              uint simd [[simdgroup_index_in_threadgroup]]) {
  threadgroup float left[64 * 16], right[16 * 64];
  const uint n = sizes.y, depth = sizes.z;
  simdgroup_float8x8 sums[4][4], l[4], r[4];
  for (uint i = 0; i < 4; ++i) {
    for (uint j = 0; j < 4; ++j) sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  const uint row = simd / 2 * 32, column = simd % 2 * 32;
  for (uint begin = 0; begin < depth; begin += 16) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = t; i < 64 * 16; i += 128) {
      left[i] = a[(group.y * 64 + i / 16) * depth + begin + i % 16];
      right[i] = b[(begin + i / 64) * n + group.x * 64 + i % 64];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 0; k < 16; k += 8) {
      for (uint i = 0; i < 4; ++i) {
        simdgroup_load(l[i], left + (row + i * 8) * 16 + k, 16);
        simdgroup_load(r[i], right + k * 64 + column + i * 8, 64);
      }
      for (uint i = 0; i < 4; ++i) {
        for (uint j = 0; j < 4; ++j) {
          simdgroup_multiply_accumulate(sums[i][j], l[i], r[j], sums[i][j]);
        }
      }
    }
  }
  for (uint i = 0; i < 4; ++i) {
    for (uint j = 0; j < 4; ++j) {
      simdgroup_store(sums[i][j], d, n,
                      ulong2(group.x * 64 + column + j * 8, group.y * 64 + row + i * 8));
    }
  }
}
)");
  const uint32_t m = 512, n = 1024, k = 1024;
  std::vector<float> a(m * k), b(k * n), d(m * n);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 7 % 5);
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 11 % 3);
  Dispatch dispatch = Grid(n / 64, 128, {Bind("a", a), Bind("b", b), Bind("d", d)});
  dispatch.groups[1] = m / 64;
  dispatch.buffers[3] = Bytes(std::array<uint32_t, 4>{m, n, k, 0});
  const auto start = std::chrono::steady_clock::now();
  const std::string error = function->Run(dispatch);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  Check(error.empty(), error);
  std::printf("  512×1024×1024 in %.2f s\n", seconds.count());
  for (uint32_t at : {0u, 77u * n + 5, m * n - 1}) {
    float sum = 0.0f;
    for (uint32_t i = 0; i < k; ++i) sum += a[at / n * k + i] * b[i * n + at % n];
    Check(d[at] == sum, "the product");
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::setbuf(stdout, nullptr);
  const std::pair<const char*, void (*)()> tests[] = {
      {"add", TestAdd},
      {"out of bounds", TestOutOfBounds},
      {"reduction", TestReduction},
      {"races", TestRaces},
      {"divergence", TestDivergence},
      {"simd", TestSimd},
      {"matrices", TestMatrices},
      {"types", TestTypes},
      {"poison", TestPoison},
      {"constants", TestConstants},
      {"order", TestOrder},
      {"shared binding", TestSharedBinding},
      {"compile errors", TestCompileErrors},
      {"speed", TestSpeed},
  };
  for (const auto& [name, test] : tests) {
    if (argc > 1 && std::strstr(name, argv[1]) == nullptr) continue;
    std::printf("%s\n", name);
    test();
  }
  std::printf(failures == 0 ? "all well\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
