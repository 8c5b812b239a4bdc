// The SIMD kernels of the CPU backend, as a table of functions for one storage type T, chosen for
// the running machine's instruction set. `void*` operands hold T; everything computed on the way
// is float32. Matrices are row-major; a kernel works on the rows or columns its caller names and
// knows nothing of threads.
#ifndef JAX_FUSED_LORA_NATIVE_CPU_KERNELS_H_
#define JAX_FUSED_LORA_NATIVE_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>

namespace jax_fused_lora {

// Whether the CPU is AMD's, whose cores have other wishes in a few places.
inline bool IsAmd() {
#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// One thread's working memory. Sized so that what a pass takes of it stays in a second-level cache.
struct alignas(64) Scratch {
  static constexpr size_t kFew = 4;         // rows up to which a matrix is read row after row
  static constexpr size_t kStreamed = 8;    // and up to which slices of W are read from end to end
  static constexpr size_t kDepth = 512;     // elements of a row taken at a time
  static constexpr size_t kDepthRows = 64;  // and rows, at most

  // A block of a product, at most: of whole tiles of rows and panels of columns.
  static constexpr size_t kRows = 258, kColumns = 512;
  static constexpr size_t kPanel = 64;        // columns of W packed at a time
  static constexpr size_t kPanelDepth = 144;  // and rows: 36 KiB, in the first cache
  static constexpr size_t kPanelRow = 160;    // x's rows meanwhile, apart by no power of two
  static constexpr size_t kTilesDepth = 272;  // the same of AMX's tiles, 32 columns: 34 KiB
  static constexpr size_t kTilesRow = 288;

  float sums[kRows * kColumns];
  float panel[kPanelDepth * kPanel];
  float rows[kRows * kTilesRow];  // an operand's rows, widened
};
static_assert(Scratch::kRows * Scratch::kTilesRow >= Scratch::kDepthRows * Scratch::kDepth, "");

// A float32 factor of the low-rank part, (rank, columns), as `expand` reads it: in panels of
// `width` columns, whose rows are `row` apart. Row-major, `row` is the number of columns and
// panels lie side by side. Packed, `row` is the width and a panel is contiguous: its rows are no
// power of two apart, and so don't evict each other from the first cache (float32, 512×2048, rank
// 16, Zen 3: 555 → 365 µs).
template <class Float>
struct Panels {
  Float* data;
  size_t row, panel, width;

  static Panels RowMajor(Float* data, size_t columns, size_t width) {
    return {data, columns, width, width};
  }
  static Panels Packed(Float* data, size_t rank, size_t width) {
    return {data, width, rank * width, width};
  }
  // From the panel that holds column j on.
  Panels From(size_t j) const { return {data + j / width * panel, row, panel, width}; }
  Panels<const Float> Read() const { return {data, row, panel, width}; }
};

// What is added to a block of a product: scale · h (m, rank) · b, packed panels from its first
// column on.
struct LowRank {
  const float* h;
  size_t rank;
  Panels<const float> b;
  float scale;
};

struct Kernels {
  size_t rows;      // of a tile of a packed product
  size_t panel;     // columns of a panel of B; divides 64
  size_t ranks;     // of a panel of A
  size_t columns;   // of a block of a product, at most
  size_t in_place;  // rows up to which a matrix is better multiplied as it lies than packed

  // h (m, r) = x (m, k) · a (k, r), for few rows: a is read as it lies.
  void (*shrink_few)(const void* x, size_t m, size_t k, const void* a, size_t r, float* h,
                     Scratch* scratch);

  // The same for any number of rows and a rank of whole panels.
  void (*shrink_panels)(const void* x, size_t m, size_t k, const void* a, size_t r, float* h,
                        Scratch* scratch);

  // at (r, k)[:, k0:k1] = aᵀ, a (k, r), k0 a multiple of 64.
  void (*transpose)(const void* a, size_t r, size_t k0, size_t k1, Panels<float> at);

  // to (r, n)[:, j0:j1] = b, b (r, n), j0 a multiple of 64.
  void (*pack)(const void* b, size_t r, size_t n, size_t j0, size_t j1, Panels<float> to);

  // h (m, r) = scale · x (m, k) · atᵀ, at (r, k).
  void (*shrink)(const void* x, size_t m, size_t k, const float* at, size_t r, float scale,
                 float* h, Scratch* scratch);

  // The same of an `at` that is T's; null where it is better brought to float32.
  void (*shrink_as_is)(const void* x, size_t m, size_t k, const void* at, size_t r, float scale,
                       float* h);

  // y (m, n) = init + bias + scale · h (m, r) · b (r, n) with row distances for init and y.
  // `init` and `bias` (n) may be null, and `init` may be y where T is float32.
  void (*expand)(const float* h, size_t m, size_t r, Panels<const float> b, size_t n, float scale,
                 const float* init, size_t init_row, const float* bias, void* y, size_t y_row);

  // The same for m ≤ in_place and a row-major b.
  void (*expand_few)(const float* h, size_t m, size_t r, const float* b, size_t b_row, size_t n,
                     float scale, const float* init, size_t init_row, const float* bias, void* y,
                     size_t y_row, Scratch* scratch);

  // out (r, n) = [out +] scale · hᵀ · g, h (m, r), g (m, n), m > 0, their rows h_row, g_row and
  // out_row apart.
  void (*outer)(const float* h, size_t h_row, size_t m, size_t r, const void* g, size_t g_row,
                size_t n, float scale, bool add, float* out, size_t out_row, Scratch* scratch);

  // out (m, columns) = x (m, k)[:, k0:k1] · w (k, n)[k0:k1, j0 : j0 + columns], m ≤ kStreamed. Rows
  // of out are out_row apart.
  void (*stream)(const void* x, size_t m, size_t k, size_t k0, size_t k1, const void* w, size_t n,
                 size_t j0, size_t columns, float* out, size_t out_row, Scratch* scratch);

  // out (m, columns) = x (m, k) · w (k, n)[:, j0 : j0 + columns], m ≤ kRows.
  void (*product)(const void* x, size_t m, size_t k, const void* w, size_t n, size_t j0,
                  size_t columns, float* out, Scratch* scratch);

  // y (m, columns) = the same + bias + low_rank, rows of y being y_row apart; bias may be null.
  void (*layer)(const void* x, size_t m, size_t k, const void* w, size_t n, size_t j0,
                size_t columns, const LowRank& low_rank, const float* bias, void* y, size_t y_row,
                Scratch* scratch);

  // out (m, columns) = Σ over `slices` of partial[slice · stride + ...], partial's rows
  // partial_row apart.
  void (*gather)(const float* partial, size_t slices, size_t stride, size_t m, size_t partial_row,
                 size_t columns, float* out);

  // out (m, columns) = g (m, n) · w (k, n)[k0 : k0 + columns]ᵀ, m ≤ kRows.
  void (*product_transposed)(const void* g, size_t m, size_t n, const void* w, size_t k0,
                             size_t columns, float* out, Scratch* scratch);

  // dx (m, columns) = the same + t (m, r) · a (k, r)[k0 : k0 + columns]ᵀ, rows of dx being dx_row
  // apart; kDepthRows < m ≤ kRows.
  void (*layer_transposed)(const void* g, size_t m, size_t n, const void* w, size_t k0,
                           size_t columns, const float* t, size_t r, const void* a, void* dx,
                           size_t dx_row, Scratch* scratch);

  // dx (m, columns) = init (m, columns) + t (m, r) · a (k, r)[k0 : k0 + columns]ᵀ, m ≤ kRows.
  void (*expand_transposed)(const float* t, size_t m, size_t r, const void* a, size_t k0,
                            size_t columns, const float* init, void* dx, size_t dx_row,
                            Scratch* scratch);

  // out[i0:i1] = first[i] + Σ over `slices` of rest[slice · stride + i]; `first` may be out.
  void (*sum)(const float* first, const float* rest, size_t slices, size_t stride, size_t i0,
              size_t i1, void* out);

  // out (n, r) = Σ over `slices` of partialᵀ, partial (r, n) and `stride` apart. Rows of partial
  // are partial_row apart, of out out_row.
  void (*sum_transposed)(const float* partial, size_t slices, size_t stride, size_t partial_row,
                         size_t r, size_t n, void* out, size_t out_row);
};

enum class Storage { kFloat32, kBfloat16, kFloat16 };

// How the kernels of bfloat16 multiply it: widened to float32, as pairs (AVX512-BF16), or as tiles
// of pairs where there are many (AMX).
enum class By { kNumbers, kPairs, kTiles };

// The best that this machine has.
By BestForBfloat16();

const Kernels& KernelsFor(Storage storage, By by);

inline const Kernels& KernelsFor(Storage storage) {
  return KernelsFor(storage, storage == Storage::kBfloat16 ? BestForBfloat16() : By::kNumbers);
}

// The name of the instruction set in use.
const char* InstructionSet();

}  // namespace jax_fused_lora

#endif  // JAX_FUSED_LORA_NATIVE_CPU_KERNELS_H_
