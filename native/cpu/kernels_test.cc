// Every kernel, storage type and instruction set against plain loops.
//
// Each operand is a heap block of exactly its size, so that AddressSanitizer sees a step over
// either end; results start as NaN, so that an entry left out shows; and so does the scratch
// memory, so that what an earlier call left there cannot help.
//
// Operands are small integers, whose products and sums are exact in float32 in any order: a result
// is right to the last bit or wrong, and no tolerance can hide a term lost or counted twice.

#include "native/cpu/kernels.h"

#include "native/cpu/amx.h"
#if JAX_FUSED_LORA_AMX
#include "native/cpu/amx_emulator.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "hwy/targets.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace jax_fused_lora {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kBfloat16, Storage::kFloat16};

const char* Name(Storage storage) {
  return storage == Storage::kFloat32    ? "float32"
         : storage == Storage::kBfloat16 ? "bfloat16"
                                         : "float16";
}

int passed = 0, failed = 0;

// Counts a case, and prints one that failed.
bool Check(bool ok, Storage storage, const char* format, ...) __attribute__((format(printf, 3, 4)));
bool Check(bool ok, Storage storage, const char* format, ...) {
  ok ? ++passed : ++failed;
  if (!ok) {
    std::printf("FAILED %s %s ", InstructionSet(), Name(storage));
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf("\n");
  }
  return ok;
}

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t ToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The two 16-bit formats by their definition: (-1)^sign · 2^(exponent - bias) · 1.mantissa.
struct Format {
  int mantissa_bits, bias;

  explicit Format(Storage storage)
      : mantissa_bits(storage == Storage::kBfloat16 ? 7 : 10),
        bias(storage == Storage::kBfloat16 ? 127 : 15) {}

  uint16_t Infinity() const { return (2 * bias + 1) << mantissa_bits; }

  double Widen(uint16_t half) const {
    const int magnitude = half & 0x7FFF, exponent = magnitude >> mantissa_bits;
    const int mantissa = magnitude & ((1 << mantissa_bits) - 1);
    double value;
    if (magnitude > Infinity()) {
      value = std::numeric_limits<double>::quiet_NaN();
    } else if (magnitude == Infinity()) {
      value = std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
      value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
    } else {
      value = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    }
    return half & 0x8000 ? -value : value;
  }

  // To the nearest, to the even one of two. Not for NaN.
  uint16_t Narrow(double value) const {
    const int sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(value);
    if (std::isinf(magnitude)) return sign | Infinity();
    const int exponent = magnitude == 0 ? 1 - bias : std::max(std::ilogb(magnitude), 1 - bias);
    // Counted in units of the last place. The leading one, and a carry out of rounding, add one
    // to the exponent field, up to infinity.
    const int units =
        static_cast<int>(std::nearbyint(std::ldexp(magnitude, mantissa_bits - exponent)));
    const int bits = ((exponent + bias - 1) << mantissa_bits) + units;
    return sign | std::min<int>(bits, Infinity());
  }
};

// A heap block of exactly `size` elements of a storage type, all NaN.
class Block {
 public:
  Block(Storage storage, size_t size)
      : storage_(storage), size_(size), data_(new unsigned char[size * Width()]) {
    for (size_t i = 0; i < size; ++i) SetNan(i);
  }

  static Block Integers(Storage storage, size_t size) {
    Block block(storage, size);
    for (size_t i = 0; i < size; ++i) block.Set(i, Integer());
    return block;
  }

  // ±1 to ±4: never 0, which would hide a term.
  static int Integer() {
    static uint32_t state = 1;
    state = state * 1664525 + 1013904223;
    const int magnitude = 1 + (state >> 30);
    return state >> 29 & 1 ? -magnitude : magnitude;
  }

  size_t size() const { return size_; }
  float* floats() { return reinterpret_cast<float*>(data_.get()); }
  void* at(size_t i) { return data_.get() + i * Width(); }

  double operator[](size_t i) const {
    if (storage_ == Storage::kFloat32) return FromBits(Load<uint32_t>(i));
    return Format(storage_).Widen(Load<uint16_t>(i));
  }

  // Rounds once, as the kernels must.
  void Set(size_t i, double value) {
    if (storage_ == Storage::kFloat32) {
      Store(i, ToBits(static_cast<float>(value)));
    } else {
      Store(i, Format(storage_).Narrow(value));
    }
  }

  void SetNan(size_t i) {
    if (storage_ == Storage::kFloat32) {
      Store<uint32_t>(i, 0x7FC00000);
    } else {
      Store<uint16_t>(i, 0x7FFF);
    }
  }

  bool operator==(const Block& other) const {
    return std::equal(data_.get(), data_.get() + size_ * Width(), other.data_.get());
  }

  Block Copy() const {
    Block copy(storage_, size_);
    std::copy_n(data_.get(), size_ * Width(), copy.data_.get());
    return copy;
  }

 private:
  size_t Width() const { return storage_ == Storage::kFloat32 ? 4 : 2; }

  template <class Bits>
  Bits Load(size_t i) const {
    Bits bits;
    std::memcpy(&bits, data_.get() + i * sizeof bits, sizeof bits);
    return bits;
  }

  template <class Bits>
  void Store(size_t i, Bits bits) {
    std::memcpy(data_.get() + i * sizeof bits, &bits, sizeof bits);
  }

  Storage storage_;
  size_t size_;
  std::unique_ptr<unsigned char[]> data_;
};

Block Floats(size_t size) { return Block(Storage::kFloat32, size); }
Block FloatIntegers(size_t size) { return Block::Integers(Storage::kFloat32, size); }

// Elements from the first of row 0 to the last of row m - 1.
size_t Extent(size_t m, size_t row, size_t n) { return m == 0 || n == 0 ? 0 : (m - 1) * row + n; }

// One after the other of both sides of every limit at which a kernel takes another path.
size_t NextSize() {
  constexpr size_t kSizes[] = {0,  1,  2,  3,  4,  5,  7,   8,   9,   15,  16,  17,  23,  31,
                               32, 33, 47, 63, 64, 65, 100, 127, 129, 130, 257, 511, 513, 1030};
  static size_t next = 0;
  // A stride that has no factor in common with the count, so that pairs of sizes vary too.
  return kSizes[(next += 11) % (sizeof kSizes / sizeof *kSizes)];
}

constexpr size_t kRows[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 35, 63, 64, 65, 71};
constexpr size_t kRanks[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12,
                             13, 14, 15, 16, 17, 18, 19, 20, 33, 64, 130};
// No rank, and some around what a panel has room for, once and twice.
constexpr size_t kOddRanks[] = {0, 143, 144, 145, 288, 289, 300};

class Suite {
 public:
  explicit Suite(Storage storage, By by = By::kNumbers)
      : storage_(storage), by_(by), kernels_(KernelsFor(storage, by)), scratch_(new Scratch) {}

  void Run() {
    for (size_t m : kRows) {
      for (size_t r : kRanks) {
        ShrinkAsItLies(m, NextSize(), r);
        Shrink(m, NextSize(), r);
        Expand(m, r, NextSize());
        ExpandTransposed(m, r, NextSize());
        Outer(m, r, NextSize());
      }
      for (int i = 0; i < 24; ++i) {
        if (m <= Scratch::kStreamed) Stream(m, NextSize(), NextSize());
        const size_t r = kRanks[(i * 5 + m) % (sizeof kRanks / sizeof *kRanks)];
        Product(m, NextSize(), NextSize(), r);
        ProductTransposed(m, NextSize(), NextSize(), r);
        for (size_t slices : {1, 2, 5}) Gather(slices, m, NextSize());
      }
    }
    for (size_t r : kOddRanks) {
      for (size_t m : {1, 7, 64}) ExpandTransposed(m, r, NextSize());
      Product(71, NextSize(), NextSize(), r);
      ProductTransposed(71, NextSize(), NextSize(), r);
    }
    ExpandTransposed(Scratch::kRows, 145, 70);
    for (size_t r : kRanks) {
      for (int i = 0; i < 6; ++i) {
        Transpose(NextSize(), r);
        for (size_t slices : {1, 3}) SumTransposed(slices, NextSize(), r);
      }
    }
    for (int i = 0; i < 28; ++i) {
      Pack(NextSize() % 20, NextSize());
      for (size_t slices : {0, 1, 4}) Sum(slices, NextSize());
    }
    if (storage_ != Storage::kFloat32) Conversions();
  }

 private:
  Block Blank(size_t size) const { return Block(storage_, size); }
  Block Integers(size_t size) const { return Block::Integers(storage_, size); }

  Scratch* PoisonedScratch() {
    std::fill_n(scratch_->sums, Scratch::kRows * Scratch::kColumns, kNan);
    std::fill_n(scratch_->panel, Scratch::kPanelDepth * Scratch::kPanel, kNan);
    std::fill_n(scratch_->rows, Scratch::kRows * Scratch::kTilesRow, kNan);
    return scratch_.get();
  }

  void ShrinkAsItLies(size_t m, size_t k, size_t r) {
    Block x = Integers(m * k), a = Integers(k * r), h = Floats(m * r), expected = Floats(m * r);
    for (size_t i = 0; i < m; ++i) {
      for (size_t j = 0; j < r; ++j) {
        double sum = 0;
        for (size_t p = 0; p < k; ++p) sum += x[i * k + p] * a[p * r + j];
        expected.Set(i * r + j, sum);
      }
    }
    kernels_.shrink_few(x.at(0), m, k, a.at(0), r, h.floats(), PoisonedScratch());
    Check(h == expected, storage_, "shrink_few m=%zu k=%zu r=%zu", m, k, r);
    h = Floats(m * r);
    kernels_.shrink_panels(x.at(0), m, k, a.at(0), r, h.floats(), PoisonedScratch());
    Check(h == expected, storage_, "shrink_panels m=%zu k=%zu r=%zu", m, k, r);
  }

  void Shrink(size_t m, size_t k, size_t r) {
    const float scale = -0.75f;
    Block x = Integers(m * k), at = FloatIntegers(r * k), h = Floats(m * r);
    Block expected = Floats(m * r), narrow = Blank(r * k);
    for (size_t i = 0; i < r * k; ++i) narrow.Set(i, at[i]);
    for (size_t i = 0; i < m; ++i) {
      for (size_t j = 0; j < r; ++j) {
        double sum = 0;
        for (size_t p = 0; p < k; ++p) sum += x[i * k + p] * at[j * k + p];
        expected.Set(i * r + j, scale * sum + 0.0);  // no negative zero
      }
    }
    const auto check = [&](const char* name) {
      for (size_t i = 0; i < m * r; ++i) h.Set(i, h[i] + 0.0);
      Check(h == expected, storage_, "%s m=%zu k=%zu r=%zu", name, m, k, r);
      h = Floats(m * r);
    };
    kernels_.shrink(x.at(0), m, k, at.floats(), r, scale, h.floats(), PoisonedScratch());
    check("shrink");
    if (kernels_.shrink_as_is == nullptr) return;
    kernels_.shrink_as_is(x.at(0), m, k, narrow.at(0), r, scale, h.floats());
    check("shrink_as_is");
  }

  // Where a layout of (r, n) keeps element (p, j).
  static size_t Place(const Panels<float>& panels, size_t p, size_t j) {
    return j / panels.width * panels.panel + p * panels.row + j % panels.width;
  }

  // Calls `check` with row-major panels of (r, n) and with packed ones, and the floats they need.
  template <class Body>
  void EachLayout(size_t r, size_t n, Body check) {
    const size_t width = kernels_.panel, padded = (n + width - 1) / width * width;
    check(Panels<float>::RowMajor(nullptr, n, width), r * n);
    check(Panels<float>::Packed(nullptr, r, width), r * padded);
  }

  void Transpose(size_t k, size_t r) {
    Block a = Integers(k * r);
    const size_t k0 = k / 3 / 64 * 64, k1 = k - k / 5;
    EachLayout(r, k, [&](Panels<float> layout, size_t size) {
      Block at = Floats(size), expected = Floats(size);
      for (size_t p = k0; p < k1; ++p) {
        for (size_t j = 0; j < r; ++j) expected.Set(Place(layout, j, p), a[p * r + j]);
      }
      layout.data = at.floats();
      kernels_.transpose(a.at(0), r, k0, k1, layout);
      Check(at == expected, storage_, "transpose k=%zu r=%zu row=%zu", k, r, layout.row);
    });
  }

  void Pack(size_t r, size_t n) {
    Block b = Integers(r * n);
    const size_t j0 = n / 3 / 64 * 64, j1 = n - n / 5;
    EachLayout(r, n, [&](Panels<float> layout, size_t size) {
      Block to = Floats(size), expected = Floats(size);
      for (size_t p = 0; p < r; ++p) {
        for (size_t j = j0; j < j1; ++j) expected.Set(Place(layout, p, j), b[p * n + j]);
      }
      layout.data = to.floats();
      kernels_.pack(b.at(0), r, n, j0, j1, layout);
      Check(to == expected, storage_, "pack r=%zu n=%zu row=%zu", r, n, layout.row);
    });
  }

  void Expand(size_t m, size_t r, size_t n) {
    EachLayout(r, n, [&](Panels<float> layout, size_t size) {
      Expand(m, r, n, layout, size, false);
      if (layout.row == n && m <= kernels_.in_place) Expand(m, r, n, layout, size, true);
    });
  }

  void Expand(size_t m, size_t r, size_t n, Panels<float> layout, size_t size, bool few) {
    const float scale = 0.75f;
    const size_t y_row = n + m % 2;  // rows further apart than they are long
    Block h = FloatIntegers(m * r), b = Floats(size), bias = FloatIntegers(n);
    const Block values = FloatIntegers(r * n);
    layout.data = b.floats();
    std::vector<double> products(m * n);
    for (size_t p = 0; p < r; ++p) {
      for (size_t j = 0; j < n; ++j) {
        b.Set(Place(layout, p, j), values[p * n + j]);
        for (size_t i = 0; i < m; ++i) products[i * n + j] += h[i * r + p] * values[p * n + j];
      }
    }
    enum { kNone, kApart, kInPlace, kInits };
    for (int which = kNone; which < kInits; ++which) {
      if (which == kInPlace && storage_ != Storage::kFloat32) continue;
      for (bool biased : {false, true}) {
        const size_t init_row = which == kInPlace ? y_row : n + 1;
        Block init = FloatIntegers(Extent(m, init_row, n));
        Block y = which == kInPlace ? init.Copy() : Blank(Extent(m, y_row, n));
        Block expected = y.Copy();
        for (size_t i = 0; i < m; ++i) {
          for (size_t j = 0; j < n; ++j) {
            const double start = which == kNone ? 0.0 : init[i * init_row + j];
            expected.Set(i * y_row + j,
                         start + (biased ? bias[j] : 0.0) + scale * products[i * n + j]);
          }
        }
        const float* from = which == kNone      ? nullptr
                            : which == kInPlace ? y.floats()
                                                : init.floats();
        const float* add = biased ? bias.floats() : nullptr;
        if (few) {
          kernels_.expand_few(h.floats(), m, r, b.floats(), n, n, scale, from, init_row, add,
                              y.at(0), y_row, PoisonedScratch());
        } else {
          kernels_.expand(h.floats(), m, r, layout.Read(), n, scale, from, init_row, add, y.at(0),
                          y_row);
        }
        Check(y == expected, storage_,
              "expand m=%zu r=%zu n=%zu row=%zu y_row=%zu init=%d bias=%d few=%d", m, r, n,
              layout.row, y_row, which, biased, few);
      }
    }
  }

  // x (m, depth) · y[first : first + columns]ᵀ.
  static std::vector<double> TimesTransposed(const Block& x, size_t m, size_t depth, const Block& y,
                                             size_t first, size_t columns) {
    std::vector<double> sums(m * columns);
    for (size_t i = 0; i < m; ++i) {
      for (size_t j = 0; j < columns; ++j) {
        for (size_t p = 0; p < depth; ++p) {
          sums[i * columns + j] += x[i * depth + p] * y[(first + j) * depth + p];
        }
      }
    }
    return sums;
  }

  void ExpandTransposed(size_t m, size_t r, size_t k) {
    const size_t k0 = k / 3, columns = k - k0, row = columns + m % 3;
    Block t = FloatIntegers(m * r), a = Integers(k * r), init = FloatIntegers(m * columns);
    const std::vector<double> sums = TimesTransposed(t, m, r, a, k0, columns);
    Block dx = Blank(Extent(m, row, columns)), expected = dx.Copy();
    for (size_t i = 0; i < m; ++i) {
      for (size_t j = 0; j < columns; ++j) {
        expected.Set(i * row + j, init[i * columns + j] + sums[i * columns + j]);
      }
    }
    kernels_.expand_transposed(t.floats(), m, r, a.at(0), k0, columns, init.floats(), dx.at(0), row,
                               PoisonedScratch());
    Check(dx == expected, storage_, "expand_transposed m=%zu r=%zu k=%zu[%zu:]", m, r, k, k0);
  }

  void Outer(size_t m, size_t r, size_t n) {
    const float scale = 0.75f;
    const size_t h_row = r + 2, g_row = n + 3, out_row = n + 1;
    Block h = FloatIntegers(m * h_row), g = Integers(m * g_row);
    Block before = FloatIntegers(r * out_row);
    for (const bool add : {false, true}) {
      if (m == 0 && !add) continue;
      Block out = add ? before.Copy() : Floats(r * out_row), expected = out.Copy();
      for (size_t p = 0; p < r; ++p) {
        for (size_t j = 0; j < n; ++j) {
          double sum = 0;
          for (size_t i = 0; i < m; ++i) sum += h[i * h_row + p] * g[i * g_row + j];
          expected.Set(p * out_row + j, (add ? before[p * out_row + j] : 0.0) + scale * sum);
        }
      }
      kernels_.outer(h.floats(), h_row, m, r, g.at(0), g_row, n, scale, add, out.floats(), out_row,
                     PoisonedScratch());
      Check(out == expected, storage_, "outer m=%zu r=%zu n=%zu add=%d", m, r, n, add);
    }
  }

  void Stream(size_t m, size_t k, size_t n) {
    Block x = Integers(m * k), w = Integers(k * n);
    struct Range {
      size_t begin, end;
    };
    // All of W, and a part away from each of its edges. The column ranges reach both ends of W.
    for (const Range ks : {Range{0, k}, Range{k / 4, k - k / 3}}) {
      for (const Range js : {Range{0, n}, Range{0, n / 2}, Range{n / 2, n}}) {
        const size_t columns = js.end - js.begin, row = columns + m % 3;
        Block out = Floats(Extent(m, row, columns)), expected = out.Copy();
        for (size_t i = 0; i < m; ++i) {
          std::vector<double> sums(columns);
          for (size_t p = ks.begin; p < ks.end; ++p) {
            const double xp = x[i * k + p];
            for (size_t j = 0; j < columns; ++j) sums[j] += xp * w[p * n + js.begin + j];
          }
          for (size_t j = 0; j < columns; ++j) expected.Set(i * row + j, sums[j]);
        }
        kernels_.stream(x.at(0), m, k, ks.begin, ks.end, w.at(0), n, js.begin, columns,
                        out.floats(), row, PoisonedScratch());
        Check(out == expected, storage_, "stream m=%zu k=%zu[%zu:%zu] n=%zu[%zu:%zu]", m, k,
              ks.begin, ks.end, n, js.begin, js.end);
        if (m * k * n > 1000000) return;  // the plain loops are slow
      }
    }
  }

  // The low-rank part of a block: as a kernel takes it, and as the numbers it adds.
  struct Factors {
    Block h, b;
    LowRank low_rank;
    std::vector<double> sums;
  };

  Factors MakeFactors(size_t m, size_t r, size_t columns) {
    const size_t width = kernels_.panel, padded = (columns + width - 1) / width * width;
    Factors f = {FloatIntegers(m * r), Floats(r * padded), {}, std::vector<double>(m * columns)};
    const auto panels = Panels<float>::Packed(f.b.floats(), r, width);
    const Block values = FloatIntegers(r * columns);
    f.low_rank = {f.h.floats(), r, panels.Read(), 0.75f};
    for (size_t p = 0; p < r; ++p) {
      for (size_t j = 0; j < columns; ++j) {
        f.b.Set(Place(panels, p, j), values[p * columns + j]);
        for (size_t i = 0; i < m; ++i) {
          f.sums[i * columns + j] += 0.75 * f.h[i * r + p] * values[p * columns + j];
        }
      }
    }
    return f;
  }

  void Product(size_t m, size_t k, size_t n, size_t r) {
    Block x = Integers(m * k), w = Integers(k * n), bias = FloatIntegers(n);
    // All of W, where a block takes so much, and the part at its end.
    for (const size_t j0 : {n - std::min(n, kernels_.columns), n - n / 3}) {
      const size_t columns = n - j0, row = columns + m % 3;
      std::vector<double> sums(m * columns);
      for (size_t i = 0; i < m; ++i) {
        for (size_t p = 0; p < k; ++p) {
          const double xp = x[i * k + p];
          for (size_t j = 0; j < columns; ++j) sums[i * columns + j] += xp * w[p * n + j0 + j];
        }
      }
      Block out = Floats(m * columns), expected = out.Copy();
      for (size_t i = 0; i < m * columns; ++i) expected.Set(i, sums[i]);
      kernels_.product(x.at(0), m, k, w.at(0), n, j0, columns, out.floats(), PoisonedScratch());
      Check(out == expected, storage_, "product m=%zu k=%zu n=%zu[%zu:]", m, k, n, j0);
      const Factors f = MakeFactors(m, r, columns);
      for (bool biased : {false, true}) {
        Block y = Blank(Extent(m, row, columns)), whole = y.Copy();
        for (size_t i = 0; i < m; ++i) {
          for (size_t j = 0; j < columns; ++j) {
            const size_t at = i * columns + j;
            whole.Set(i * row + j, sums[at] + (biased ? bias[j0 + j] : 0.0) + f.sums[at]);
          }
        }
        kernels_.layer(x.at(0), m, k, w.at(0), n, j0, columns, f.low_rank,
                       biased ? bias.floats() + j0 : nullptr, y.at(0), row, PoisonedScratch());
        Check(y == whole, storage_, "layer m=%zu k=%zu n=%zu[%zu:] r=%zu bias=%d", m, k, n, j0, r,
              biased);
      }
    }
  }

  void ProductTransposed(size_t m, size_t n, size_t k, size_t r) {
    const size_t k0 = k / 3, columns = std::min(k - k0, kernels_.columns);
    Block g = Integers(m * n), w = Integers((k0 + columns) * n), out = Floats(m * columns);
    Block expected = out.Copy();
    const std::vector<double> sums = TimesTransposed(g, m, n, w, k0, columns);
    for (size_t i = 0; i < m * columns; ++i) expected.Set(i, sums[i]);
    kernels_.product_transposed(g.at(0), m, n, w.at(0), k0, columns, out.floats(),
                                PoisonedScratch());
    Check(out == expected, storage_, "product_transposed m=%zu n=%zu k0=%zu columns=%zu", m, n, k0,
          columns);
    if (m <= Scratch::kDepthRows) return;
    Block t = FloatIntegers(m * r), a = Integers((k0 + columns) * r);
    const std::vector<double> more = TimesTransposed(t, m, r, a, k0, columns);
    const size_t row = columns + m % 3;
    Block dx = Blank(Extent(m, row, columns)), whole = dx.Copy();
    for (size_t i = 0; i < m; ++i) {
      for (size_t j = 0; j < columns; ++j) {
        whole.Set(i * row + j, sums[i * columns + j] + more[i * columns + j]);
      }
    }
    kernels_.layer_transposed(g.at(0), m, n, w.at(0), k0, columns, t.floats(), r, a.at(0), dx.at(0),
                              row, PoisonedScratch());
    Check(dx == whole, storage_, "layer_transposed m=%zu n=%zu k0=%zu columns=%zu r=%zu", m, n, k0,
          columns, r);
  }

  void Gather(size_t slices, size_t m, size_t columns) {
    const size_t row = columns + slices % 2, stride = Extent(m, row, columns) + m % 2;
    Block partial = FloatIntegers(Extent(slices, stride, Extent(m, row, columns)));
    Block out = Floats(m * columns), expected = Floats(m * columns);
    for (size_t i = 0; i < m; ++i) {
      for (size_t j = 0; j < columns; ++j) {
        double sum = 0;
        for (size_t s = 0; s < slices; ++s) sum += partial[s * stride + i * row + j];
        expected.Set(i * columns + j, sum);
      }
    }
    kernels_.gather(partial.floats(), slices, stride, m, row, columns, out.floats());
    Check(out == expected, storage_, "gather slices=%zu m=%zu columns=%zu", slices, m, columns);
  }

  void Sum(size_t slices, size_t n) {
    const size_t stride = n + 1, i0 = n / 4, i1 = n - n / 5;
    Block first = FloatIntegers(n), rest = FloatIntegers(Extent(slices, stride, n));
    Block out = Blank(n), expected = Blank(n);
    for (size_t i = i0; i < i1; ++i) {
      double sum = first[i];
      for (size_t s = 0; s < slices; ++s) sum += rest[s * stride + i];
      expected.Set(i, sum);
    }
    kernels_.sum(first.floats(), rest.floats(), slices, stride, i0, i1, out.at(0));
    Check(out == expected, storage_, "sum slices=%zu n=%zu", slices, n);
  }

  void SumTransposed(size_t slices, size_t n, size_t r) {
    for (const size_t more : {0, 1}) {
      const size_t row = n + more, out_row = r + more, stride = r * row + 1;
      Block partial = FloatIntegers(Extent(slices, stride, r * row));
      Block out = Blank(n * out_row), expected = Blank(n * out_row);
      for (size_t p = 0; p < n; ++p) {
        for (size_t j = 0; j < r; ++j) {
          double sum = 0;
          for (size_t s = 0; s < slices; ++s) sum += partial[s * stride + j * row + p];
          expected.Set(p * out_row + j, sum);
        }
      }
      kernels_.sum_transposed(partial.floats(), slices, stride, row, r, n, out.at(0), out_row);
      Check(out == expected, storage_, "sum_transposed slices=%zu n=%zu r=%zu row=%zu", slices, n,
            r, row);
    }
  }

  // All 65536 patterns widened, and everything that lies between two of them narrowed.
  void Conversions() {
    const Format format(storage_);
    Block halves = Blank(65536), wide = Floats(65536);
    std::vector<float> floats;
    for (int half = 0; half < 65536; ++half) {
      const auto bits = static_cast<uint16_t>(half);
      std::memcpy(halves.at(half), &bits, sizeof bits);
      const double value = format.Widen(bits);
      if (!std::isfinite(value)) continue;
      const auto next_bits = static_cast<uint16_t>(half + 1);
      double next = format.Widen(next_bits);
      // What would follow the largest: at half way to it, overflow begins.
      if (std::isinf(next)) next = 2 * value - format.Widen(static_cast<uint16_t>(half - 1));
      const auto low = static_cast<float>(value), middle = static_cast<float>((value + next) / 2);
      for (float at : {low, middle}) {
        floats.push_back(std::nextafter(at, -kInfinity));
        floats.push_back(at);
        floats.push_back(std::nextafter(at, kInfinity));
      }
    }
    for (uint32_t exponent = 0; exponent < 512; ++exponent) {  // and sign
      for (uint32_t mantissa : {0u, 1u, 0x1000u, 0x123456u, 0x400000u, 0x7FFFFFu}) {
        floats.push_back(FromBits(exponent << 23 | mantissa));
      }
    }
    std::vector<double> widened(65536);
    std::vector<uint16_t> narrowed(floats.size());
    for (int half = 0; half < 65536; ++half) widened[half] = format.Widen(half);
    for (size_t i = 0; i < floats.size(); ++i) {
      if (!std::isnan(floats[i])) narrowed[i] = format.Narrow(floats[i]);
    }
    Block from = Floats(floats.size()), out = Blank(floats.size());
    std::copy(floats.begin(), floats.end(), from.floats());

    // XLA's threads flush subnormal floats to zero; a conversion may not depend on it.
    for (bool flush : {false, true}) {
      SetFlush(flush);
      kernels_.pack(halves.at(0), 1, 65536, 0, 65536,
                    Panels<float>::RowMajor(wide.floats(), 65536, kernels_.panel));
      kernels_.sum(from.floats(), nullptr, 0, 0, 0, floats.size(), out.at(0));
      SetFlush(false);
      int wrong = 0;
      for (int half = 0; half < 65536; ++half) {
        const float result = wide.floats()[half];
        const bool ok = std::isnan(widened[half])
                            ? std::isnan(result) && std::signbit(result) == (half >= 0x8000)
                            : ToBits(result) == ToBits(static_cast<float>(widened[half]));
        if (!ok && ++wrong <= 5) std::printf("widened 0x%04x to %a\n", half, result);
      }
      Check(wrong == 0, storage_, "widening, %d wrong, flush=%d", wrong, flush);
      wrong = 0;
      for (size_t i = 0; i < floats.size(); ++i) {
        uint16_t result;
        std::memcpy(&result, out.at(i), sizeof result);
        const uint32_t bits = ToBits(floats[i]);
        const bool ok = std::isnan(floats[i])
                            ? (result & 0x7FFF) > format.Infinity() && result >> 15 == bits >> 31
                            : result == narrowed[i];
        if (!ok && ++wrong <= 5) std::printf("narrowed 0x%08x to 0x%04x\n", bits, result);
      }
      Check(wrong == 0, storage_, "narrowing, %d wrong, flush=%d", wrong, flush);
    }

    // Results of arithmetic may be rounded by the CPU, which knows no subnormal bfloat16.
    kernels_.expand(nullptr, 1, 0, Panels<const float>::RowMajor(wide.floats(), 0, kernels_.panel),
                    floats.size(), 1.0f, from.floats(), floats.size(), nullptr, out.at(0),
                    floats.size());
    int wrong = 0;
    for (size_t i = 0; i < floats.size(); ++i) {
      uint16_t result;
      std::memcpy(&result, out.at(i), sizeof result);
      const bool subnormal = std::fabs(floats[i]) < std::ldexp(1.0, 1 - format.bias);
      const bool ok = std::isnan(floats[i])              ? (result & 0x7FFF) > format.Infinity()
                      : floats[i] == 0                   ? (result & 0x7FFF) == 0
                      : by_ != By::kNumbers && subnormal ? (result & 0x7FFF) == 0
                                                         : result == narrowed[i];
      if (!ok && ++wrong <= 5) std::printf("stored 0x%08x as 0x%04x\n", ToBits(floats[i]), result);
    }
    Check(wrong == 0, storage_, "a result's narrowing, %d wrong", wrong);
  }

  static void SetFlush(bool flush) {
#if defined(__x86_64__)
    constexpr unsigned kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
    constexpr unsigned kBoth = kFlushToZero | kDenormalsAreZero;
    _mm_setcsr(flush ? _mm_getcsr() | kBoth : _mm_getcsr() & ~kBoth);
#else
    (void)flush;
#endif
  }

  Storage storage_;
  By by_;
  const Kernels& kernels_;
  std::unique_ptr<Scratch> scratch_;
};

// The kernels of bfloat16 that are compiled for some sets only, where the CPU has what they want.
// Tiles can be emulated.
void RunOther(By by) {
  const Kernels& kernels = KernelsFor(Storage::kBfloat16, by);
  if (&kernels == &KernelsFor(Storage::kBfloat16, By::kNumbers)) return;
  const bool emulated = by == By::kTiles && BestForBfloat16() == By::kPairs;
  if (by > BestForBfloat16() && !emulated) return;
#if JAX_FUSED_LORA_AMX
  if (emulated) AmxEmulator::Install();
#endif
  const int before = passed + failed;
  Suite(Storage::kBfloat16, by).Run();
  const char* name = by == By::kPairs ? "pairs" : "tiles";
  std::printf("%s of bfloat16%s: %d cases\n", name, emulated ? ", emulated" : "",
              passed + failed - before);
}

void RunAll() {
  const int64_t supported = hwy::SupportedTargets();
  for (int bit = 0; bit < 63; ++bit) {
    const int64_t target = int64_t{1} << bit;
    if ((supported & target) == 0) continue;
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
    // The machine has it, but it was not compiled in: another one answers.
    if (std::strcmp(InstructionSet(), hwy::TargetName(target)) != 0) continue;
    const int before = passed + failed;
    for (Storage storage : kStorages) Suite(storage).Run();
    for (By by : {By::kPairs, By::kTiles}) RunOther(by);
    std::printf("%s: %d cases\n", InstructionSet(), passed + failed - before);
    std::fflush(stdout);
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

}  // namespace
}  // namespace jax_fused_lora

int main() {
  using namespace jax_fused_lora;
  RunAll();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 && passed > 0 ? 0 : 1;
}
