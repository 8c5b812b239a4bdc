// The Metal Shading Language does what Metal says.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "runtime_test.h"

namespace metal_emulator {
namespace {

TEST(Types) {
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

TEST(Simd) {
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

TEST(Matrices) {
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

// A product as a GPU kernel does it, for its speed: 64×64 tiles, four simdgroups of 32×32.
TEST(Speed) {
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
}  // namespace metal_emulator
