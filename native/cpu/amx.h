// Products of bfloat16 by Intel's AMX: tiles of 16 rows of 64 bytes, which multiply 16×32 by 32×16
// elements at once.
//
// The instructions are written out, as tile registers are: compilers that know them want functions
// of their own for them, and older ones that we support do not know them.
#ifndef JAX_FUSED_LORA_NATIVE_CPU_AMX_H_
#define JAX_FUSED_LORA_NATIVE_CPU_AMX_H_

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) || defined(__clang__))
#define JAX_FUSED_LORA_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <type_traits>
#else
#define JAX_FUSED_LORA_AMX 0
#endif

namespace jax_fused_lora {

// Whether the CPU has tiles for bfloat16 and Linux lets this process use them, which it is asked
// for here: their state is large, and signal handlers' stacks have to have room for it.
inline bool HasTiles() {
#if JAX_FUSED_LORA_AMX
  unsigned a, b, c, d = 0;
  constexpr unsigned kTiles = 1 << 24, kBfloat16 = 1 << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kTiles) == 0 || (d & kBfloat16) == 0) return false;
  constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}

#if JAX_FUSED_LORA_AMX

// The tiles of this thread, from construction to destruction.
class Tiles {
 public:
  static constexpr size_t kRows = 16;   // of a tile, at most
  static constexpr size_t kSteps = 16;  // pairs in a row of it, and float32 in one of a result
  static constexpr size_t kBlock = 2 * kRows;  // rows and columns that are multiplied at once

  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease"); }

  // out (m, n) = x (m, 2·steps) · w (2·steps, n), added to what is there if `add`. x and w are
  // pairs of bfloat16 that lie where a float32 would, the two of w being of two rows; steps are
  // whole tiles. Meanwhile `ask` is called for as many lines as 32 columns of w have.
  template <class Ask>
  void Multiply(size_t m, size_t n, size_t steps, const float* x, size_t x_row, const float* w,
                size_t w_row, bool add, float* out, size_t out_row, const Ask& ask_for) {
    const size_t blocks = (m + kBlock - 1) / kBlock;
    const size_t lines = (2 * kSteps + blocks - 1) / std::max<size_t>(blocks, 1);
    const auto ask = [&] { ask_for(lines); };
    for (size_t j = 0; j < n; j += kBlock) {
      for (size_t i = 0; i < m; i += kBlock) {
        Shape(std::min(kBlock, m - i), std::min(kBlock, n - j));
        const Rows<const float> from = {x + i * x_row, x_row}, by = {w + j, w_row};
        const Rows<float> to = {out + i * out_row + j, out_row};
        if (rows_ > kRows) {
          if (columns_ > kRows) {
            Block<true, true>(steps, from, by, add, to, ask);
          } else {
            Block<true, false>(steps, from, by, add, to, ask);
          }
        } else if (columns_ > kRows) {
          Block<false, true>(steps, from, by, add, to, ask);
        } else {
          Block<false, false>(steps, from, by, add, to, ask);
        }
      }
    }
  }

 private:
  template <class Float>
  struct Rows {
    Float* data;
    size_t row;  // distance
  };

  // What LDTILECFG reads.
  struct Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row of each tile
    uint8_t rows[16] = {};
  };
  static_assert(sizeof(Configuration) == 64, "");

  // Tiles 0 to 3 are a block's sums, 4 and 5 its rows of x, 6 and 7 its columns of w.
  void Shape(size_t rows, size_t columns) {
    if (rows == rows_ && columns == columns_) return;
    rows_ = rows, columns_ = columns;
    Configuration shape;
    const auto tile = [&](int index, size_t height, size_t width) {
      shape.rows[index] = static_cast<uint8_t>(height);
      shape.bytes[index] = static_cast<uint16_t>(width * sizeof(float));
    };
    for (size_t i = 0; i < 2 && rows > i * kRows; ++i) {
      const size_t height = std::min(kRows, rows - i * kRows);
      tile(4 + i, height, kSteps);
      for (size_t j = 0; j < 2 && columns > j * kRows; ++j) {
        const size_t width = std::min(kRows, columns - j * kRows);
        tile(6 + j, kSteps, width);
        tile(2 * i + j, height, width);
      }
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }

  // Tiles are named in the instructions.
  template <int kTile>
  static void Zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void Load(const float* from, size_t row) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row * sizeof(float)), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  static void Store(float* to, size_t row) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row * sizeof(float)), "i"(kTile)
                 : "memory");
  }
  template <int kSums, int kX, int kW>
  static void MultiplyAdd() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kX), "i"(kW));
  }

  template <bool kTwoRows, bool kTwoColumns, class Ask>
  static void Block(size_t steps, Rows<const float> x, Rows<const float> w, bool add,
                    Rows<float> out, const Ask& ask) {
    // body(tile's number, what it holds of `out`), for those that there are.
    const auto for_each_sum = [&](const auto& body) {
      float *to = out.data, *below = out.data + kRows * out.row;
      body(std::integral_constant<int, 0>(), to);
      if (kTwoColumns) body(std::integral_constant<int, 1>(), to + kRows);
      if (kTwoRows) body(std::integral_constant<int, 2>(), below);
      if (kTwoRows && kTwoColumns) body(std::integral_constant<int, 3>(), below + kRows);
    };
    for_each_sum([&](auto tile, const float* from) {
      add ? Load<decltype(tile)::value>(from, out.row) : Zero<decltype(tile)::value>();
    });
    for (size_t s = 0; s < steps; s += kSteps) {
      ask();
      const float *rows = x.data + s, *columns = w.data + s * w.row;
      Load<4>(rows, x.row);
      Load<6>(columns, w.row);
      MultiplyAdd<0, 4, 6>();
      if (kTwoColumns) {
        Load<7>(columns + kRows, w.row);
        MultiplyAdd<1, 4, 7>();
      }
      if (kTwoRows) {
        Load<5>(rows + kRows * x.row, x.row);
        MultiplyAdd<2, 5, 6>();
      }
      if (kTwoRows && kTwoColumns) MultiplyAdd<3, 5, 7>();
    }
    for_each_sum([&](auto tile, float* to) { Store<decltype(tile)::value>(to, out.row); });
  }

  size_t rows_ = 0, columns_ = 0;  // of the blocks that the tiles are shaped for
};

#endif  // JAX_FUSED_LORA_AMX

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_AMX_H_
