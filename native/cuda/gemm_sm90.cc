// Which of its kernels the product takes, its tiles in which order, and what is computed beside it.
#include "native/cuda/gemm_sm90.h"

#include <algorithm>
#include <limits>

#include "native/cuda/gemm_sm90_kernel.h"
#include "native/cuda/gpu.h"
#include "native/cuda/shrink_beside.h"
#include "native/cuda/sweep_beside.h"

namespace jax_fused_lora {
namespace {

using Launcher = cudaError_t (*)(const Gemm&, const GemmPlan&, const unsigned*, int, int,
                                 cudaStream_t, bool);

// By tile, bf16 and transposed.
constexpr Launcher kLaunchers[kGemmTiles][2][2] = {
    {{LaunchGemm<0, false, false>, LaunchGemm<0, false, true>},
     {LaunchGemm<0, true, false>, LaunchGemm<0, true, true>}},
    {{LaunchGemm<1, false, false>, LaunchGemm<1, false, true>},
     {LaunchGemm<1, true, false>, LaunchGemm<1, true, true>}},
    {{LaunchGemm<2, false, false>, LaunchGemm<2, false, true>},
     {LaunchGemm<2, true, false>, LaunchGemm<2, true, true>}},
    {{LaunchGemm<3, false, false>, LaunchGemm<3, false, true>},
     {LaunchGemm<3, true, false>, LaunchGemm<3, true, true>}},
    {{LaunchGemm<4, false, false>, LaunchGemm<4, false, true>},
     {LaunchGemm<4, true, false>, LaunchGemm<4, true, true>}},
};

constexpr int kTileRows[kGemmTiles] = {128, 256, 128, 128, 64};
constexpr int kTileColumns[kGemmTiles] = {256, 128, 128, 128, 128};
constexpr bool kClusterAlongN[kGemmTiles] = {false, true};

// How long a tile takes, in halves of the largest's time: less reuse makes smaller ones slower.
constexpr double kTileTime[kGemmTiles] = {2, 2, 1.1, 1.1, .68};
// Cycles of the tensor cores for 64 of a tile's depth, by which the kernels beside are measured;
// the smallest takes a third more in that measure.
constexpr int64_t kTileCycles[kGemmTiles] = {1024, 1024, 512, 512, 340};

// Of the shrink beside. The bytes of x and A that a block reads in a cycle: 128 rows of 4096 took
// 16.5, 18.4 and 21.6 µs at rank 16, 32 and 64.
constexpr int64_t kMostBesideBlocks = 16, kBesideBytes = 50;

// Of the sweep beside: its start, and a block's step of 128×128, in the same cycles. (Shared memory
// bounds a step: 1000 cycles, while the product's tile takes 1.35 times what its tensor cores do.)
constexpr int64_t kSweepStart = 9300, kSweepStep = 740;

// Cycles that a product may wait for its h: to have it computed before takes longer.
constexpr int64_t kWait = 2700;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As TMA wants it.
bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// How a product goes over the GPU.
struct Rounds {
  int64_t rounds, blocks;
};

// In as few rounds of tiles as can be, and as few blocks as those need: of 1024 tiles 128 blocks
// have 8 each, as the first of all 132 would have, and 4 multiprocessors are free. CUTLASS's order
// counts clusters side by side in whole swizzles, whose last may lie outside of y (1024 rows of
// 4096→11008, four of them, where that was not seen: 219 µs for 164).
Rounds RoundsOf(const Gemm& gemm, const GemmPlan& plan, int multiprocessors) {
  const int64_t rows = kTileRows[plan.tile] * (kClusterAlongN[plan.tile] ? 1 : kClusterSize);
  const int64_t columns = kTileColumns[plan.tile] * (kClusterAlongN[plan.tile] ? kClusterSize : 1);
  const auto whole = [&](int64_t count) { return CeilDiv(count, plan.swizzle) * plan.swizzle; };
  const int64_t clusters = whole(CeilDiv(gemm.m, rows)) * whole(CeilDiv(gemm.n, columns));
  const int64_t rounds = CeilDiv(clusters, multiprocessors / kClusterSize);
  return {rounds, CeilDiv(clusters, rounds) * kClusterSize};
}

// Whether a kernel beside a product is ahead of it: one that takes so many tiles of rows at a time,
// `start` cycles and then `of_tile` for each.
bool Ahead(const Gemm& gemm, const GemmPlan& plan, const Rounds& product, int64_t side_by_side,
           int64_t start, int64_t of_tile) {
  const int64_t tiles = CeilDiv(gemm.m, kBesideRows);
  const int64_t of_product = CeilDiv(gemm.k, kTileK) * kTileCycles[plan.tile];
  // The rows that the first round wants.
  const int64_t columns = CeilDiv(gemm.n, kTileColumns[plan.tile]);
  const int64_t rows =
      plan.along_n
          ? std::max<int64_t>(CeilDiv(product.blocks, columns), plan.swizzle) * kTileRows[plan.tile]
          : gemm.m;
  const int64_t first = std::min(tiles, CeilDiv(rows, kBesideRows));
  return start + CeilDiv(first, side_by_side) * of_tile <= of_product &&
         start + CeilDiv(tiles, side_by_side) * of_tile <= product.rounds * of_product;
}

// Blocks of the shrink beside a product: an even number of the multiprocessors that it leaves free,
// or 0 where these are too few.
int BesideBlocks(const Gemm& gemm, const GemmPlan& plan, int multiprocessors) {
  const Rounds product = RoundsOf(gemm, plan, multiprocessors);
  const int64_t tiles = CeilDiv(gemm.m, kBesideRows);
  const int64_t blocks =
      std::min({multiprocessors - product.blocks, (tiles + 1) / 2 * 2, kMostBesideBlocks}) / 2 * 2;
  if (blocks == 0) return 0;
  const int64_t of_tile = gemm.k * 2 * (kBesideRows + CeilDiv(gemm.r, 16) * 16) / kBesideBytes;
  return Ahead(gemm, plan, product, blocks, -kWait, of_tile) ? static_cast<int>(blocks) : 0;
}

// The same of the sweep that has the gradient, too.
bool SweepsBeside(const Gemm& gemm, const GemmPlan& plan, int multiprocessors) {
  const Rounds product = RoundsOf(gemm, plan, multiprocessors);
  if (multiprocessors - product.blocks < kSweepBlocks) return false;
  return Ahead(gemm, plan, product, 1, kSweepStart, SweepSteps(gemm.k) * kSweepStep);
}

}  // namespace

int64_t GemmSm90ShrinkScratch(int64_t m) { return CeilDiv(m, kBesideRows); }

bool GemmSm90RunsOn(int major, int minor) { return major == 9 && minor == 0; }

bool GemmSm90Serves(const Gemm& gemm) {
  Gpu gpu;
  if (ThisGpu(&gpu) != cudaSuccess || !GemmSm90RunsOn(gpu.major, gpu.minor)) return false;
  // TMA's rows are multiples of 16 bytes; sizes and, rounded up to tiles, counts are ints.
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 4;
  const auto fits = [](int64_t size) { return size > 0 && size <= kMost; };
  if (!fits(gemm.m) || !fits(gemm.k) || !fits(gemm.n) || gemm.k % 8 != 0 || gemm.n % 8 != 0 ||
      !Aligned(gemm.x) || !Aligned(gemm.w) || !Aligned(gemm.bias) || !Aligned(gemm.y)) {
    return false;
  }
  return gemm.r == 0 || (gemm.r > 0 && gemm.r <= kMost && (!gemm.transposed || gemm.r % 8 == 0) &&
                         Aligned(gemm.h16) && Aligned(gemm.b));
}

GemmPlan GemmSm90Plan(const Gemm& gemm, int multiprocessors) {
  // Every multiprocessor takes a tile at a time, so a product lasts as long as the tiles that one
  // of them takes, and the last round may be nearly empty.
  GemmPlan plan = {};
  const auto rounds = [&](int tile) {
    return RoundsOf(gemm, {tile, 1, false}, multiprocessors).rounds;
  };
  double least = std::numeric_limits<double>::infinity();
  for (int tile : {1, 0, 2, 4}) {  // of equals the first
    const double time = static_cast<double>(rounds(tile)) * kTileTime[tile];
    if (time < least) least = time, plan.tile = tile;
  }
  if (plan.tile == 2 && rounds(2) == 1) plan.tile = 3;
  const int64_t rows = kTileRows[plan.tile], columns = kTileColumns[plan.tile];
  plan.along_n = CeilDiv(gemm.n, columns) <= CeilDiv(gemm.m, rows);
  plan.swizzle = 1;
  return plan;
}

namespace {

// A W of more bytes than stay in an H200's L2 cache, 60 MB; and an x of fewer.
constexpr int64_t kLargeW = 64 << 20, kSmallX = 32 << 20;

// GemmSm90Plan's, but that a round wants few rows: of a large W not the fewest, so that it does not
// read all of W (8192 rows of 8192→8192 in JAX on an H200: 1655 to 1711 µs before, now 1625 to
// 1650; of 8 tiles side by side the first round waits for h, 1658). Nor where a small x can be read
// again instead, and W once.
GemmPlan PlanBeside(const Gemm& gemm, int multiprocessors) {
  GemmPlan plan = GemmSm90Plan(gemm, multiprocessors);
  const bool large = gemm.k * gemm.n * 2 > kLargeW;
  const bool reads_w_once = !plan.along_n && gemm.m * gemm.k * 2 <= kSmallX;
  const int64_t rounds = RoundsOf(gemm, plan, multiprocessors).rounds;
  if (rounds == 1 || (large && reads_w_once)) return plan;
  plan.along_n = true;
  GemmPlan wider = plan;
  wider.swizzle = 4;
  const bool fits = RoundsOf(gemm, wider, multiprocessors).rounds == rounds;
  return large && fits && BesideBlocks(gemm, wider, multiprocessors) > 0 ? wider : plan;
}

}  // namespace

bool GemmSm90Shrinks(const Gemm& gemm, const GemmShrink& shrink, const GemmPlan& plan,
                     int multiprocessors) {
  return GemmSm90Serves(gemm) && gemm.r > 0 && gemm.r <= kBesideMostRanks &&
         (gemm.transposed || gemm.r % 8 == 0) && Aligned(shrink.a) &&
         BesideBlocks(gemm, plan, multiprocessors) > 0;
}

bool GemmSm90Shrinks(const Gemm& gemm, const GemmShrink& shrink) {
  Gpu gpu;
  return ThisGpu(&gpu) == cudaSuccess &&
         GemmSm90Shrinks(gemm, shrink, PlanBeside(gemm, gpu.multiprocessors), gpu.multiprocessors);
}

bool GemmSm90Sweeps(const Gemm& gemm, const GemmShrink& shrink, const GemmGrad& grad) {
  Gpu gpu;
  return grad.gradient != nullptr && gemm.bf16 && gemm.transposed && gemm.r > 0 &&
         gemm.r <= kSweepMostRanks && gemm.k <= kSweepMostColumns && GemmSm90Serves(gemm) &&
         Aligned(shrink.a) && Aligned(shrink.h) && Aligned(grad.h) &&
         ThisGpu(&gpu) == cudaSuccess &&
         SweepsBeside(gemm, PlanBeside(gemm, gpu.multiprocessors), gpu.multiprocessors);
}

namespace {

cudaError_t Start(const Gemm& gemm, const GemmPlan& plan, const unsigned* done, const Gpu& gpu,
                  cudaStream_t stream, bool programmatic_dependent) {
  const int64_t blocks = RoundsOf(gemm, plan, gpu.multiprocessors).blocks;
  return kLaunchers[plan.tile][gemm.bf16][gemm.transposed](
      gemm, plan, done, gpu.device, static_cast<int>(blocks), stream, programmatic_dependent);
}

}  // namespace

cudaError_t GemmSm90(const Gemm& gemm, const GemmPlan& plan, cudaStream_t stream,
                     bool programmatic_dependent) {
  if (!GemmSm90Serves(gemm) || plan.tile < 0 || plan.tile >= kGemmTiles) {
    return cudaErrorInvalidValue;
  }
  Gpu gpu;
  const cudaError_t error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  return Start(gemm, plan, nullptr, gpu, stream, programmatic_dependent);
}

cudaError_t GemmSm90(const Gemm& gemm, cudaStream_t stream, bool programmatic_dependent) {
  Gpu gpu;
  const cudaError_t error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  return GemmSm90(gemm, GemmSm90Plan(gemm, gpu.multiprocessors), stream, programmatic_dependent);
}

cudaError_t GemmSm90(const Gemm& gemm, const GemmShrink& shrink, const GemmPlan& plan,
                     cudaStream_t stream) {
  if (plan.tile < 0 || plan.tile >= kGemmTiles) return cudaErrorInvalidValue;
  Gpu gpu;
  cudaError_t error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  if (!GemmSm90Shrinks(gemm, shrink, plan, gpu.multiprocessors)) return cudaErrorInvalidValue;
  const bool one_round = RoundsOf(gemm, plan, gpu.multiprocessors).rounds == 1;
  auto* const done = one_round ? nullptr : reinterpret_cast<unsigned*>(shrink.scratch);
  error =
      LaunchShrinkBeside(gemm, shrink, done, BesideBlocks(gemm, plan, gpu.multiprocessors), stream);
  if (error != cudaSuccess) return error;
  return Start(gemm, plan, done, gpu, stream, /*programmatic_dependent=*/true);
}

cudaError_t GemmSm90(const Gemm& gemm, const GemmShrink& shrink, cudaStream_t stream) {
  Gpu gpu;
  const cudaError_t error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  return GemmSm90(gemm, shrink, PlanBeside(gemm, gpu.multiprocessors), stream);
}

cudaError_t GemmSm90(const Gemm& gemm, const GemmShrink& shrink, const GemmGrad& grad,
                     cudaStream_t stream) {
  if (!GemmSm90Sweeps(gemm, shrink, grad)) return cudaErrorInvalidValue;
  Gpu gpu;
  cudaError_t error = ThisGpu(&gpu);
  if (error != cudaSuccess) return error;
  auto* const done = reinterpret_cast<unsigned*>(shrink.scratch);
  error = LaunchSweepBeside(gemm, shrink, grad, done, stream);
  if (error != cudaSuccess) return error;
  return Start(gemm, PlanBeside(gemm, gpu.multiprocessors), done, gpu, stream,
               /*programmatic_dependent=*/true);
}

}  // namespace jax_fused_lora
