// The table of inner kernels that every instruction set fills for the matrix product. C headers only: sources
// compiled for AVX2, AVX-512 or AMX include this and nothing from the C++ library.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace dn::cpu {

// Columns of a weight panel. A packed weight is ceil(N / kGemmPanel) panels, each (K, kGemmPanel) row-major,
// columns past N zero: one layout for every instruction set, which may hold numbers times a power of two
// (PairPanel).
constexpr int64_t kGemmPanel = 32;

// Memory that will be wanted in L2: runs of whole cache lines at a constant distance. Tiles take lines from
// it one by one between their multiply-adds, spread evenly: in bursts they would keep the few buffers that
// the tile's own loads need.
struct GemmPrefetch {
  const float* at = nullptr;
  int64_t left = 0;   // lines of the run still to come
  int64_t run = 0;    // lines of every run, at least 1
  int64_t jump = 0;   // floats from the end of a run to the next one
  int64_t lines = 0;  // of all runs still to come
};

// Bytes that a tile of so many rows asks ahead in a weight that it alone reads, which lies in memory in the
// order it is read in. Hardware follows that by itself and is slower when it is asked for far ahead, unless
// rows, or a bf16 weight that is widened, leave it time.
constexpr int64_t kFetchFar = 6 << 10;
static constexpr int64_t fetch_bytes(int64_t rows) { return rows <= 2 ? 3 << 10 : kFetchFar; }

// What happens to finished cells: c += bias; then, when gelu, pre = c (if given, and only then) and c =
// gelu(c); c += residual.
struct GemmFinish {
  float* c;
  int64_t c_stride;
  int64_t rows;
  int64_t cols;
  const float* bias;  // cols, or null
  bool gelu;
  float* pre;             // (rows, cols) with stride extra_stride, or null
  const float* residual;  // the same
  int64_t extra_stride;
};

// That of rows [first, first + rows) alone.
static inline GemmFinish rows_of(GemmFinish f, int64_t first, int64_t rows) {
  f.c += first * f.c_stride;
  f.rows = rows;
  if (f.pre) f.pre += first * f.extra_stride;
  if (f.residual) f.residual += first * f.extra_stride;
  return f;
}

// One tile of C: rows x cols, cols <= kGemmPanel; then what `finish` says of the same cells.
struct GemmTile {
  float* c;
  int64_t c_stride;
  int64_t rows;  // 1 .. GemmKernels::max_rows
  int64_t cols;
  const float* a;            // (depth, rows): the numbers of one step of the reduction lie together
  const float* b;            // (depth, kGemmPanel)
  int64_t depth;             // 1 .. GemmKernels::depth
  bool accumulate;           // C += instead of C =
  GemmPrefetch* prefetch;    // not null; advanced by prefetch_lines
  int64_t prefetch_lines;    // to ask for during this tile, no more than there are
  const GemmFinish* finish;  // or null
  // Given: b is not packed yet, its rows lie b_stride apart, and all kGemmPanel columns of it go to `packed`
  // (depth, kGemmPanel) on the way. Loads and stores find room beside the multiply-adds, a pass by itself
  // does not.
  float* packed = nullptr;
  int64_t b_stride = kGemmPanel;
  // A packed b comes from memory, and what lies behind it is multiplied next. Kernels may ask for it some
  // fetch_bytes ahead; those of x86 do.
  bool fetch = false;
  // b is the words of a packed bf16 weight (bf16_words), from a step of the reduction on: widened on the way,
  // and to `packed` where that is given.
  bool is_bf16 = false;
  // C is whole lines that need not stay in a cache: kernels may write them past it. Not with `accumulate` or
  // `finish`.
  bool stream = false;
  // For kernels of pairs. The first tile that meets a block of B which does not lie scaled (`is_first`) finds
  // it as it is, with the scale of each column, and leaves it scaled in `scaled` (unless it fetches) and the
  // sums of its pairs in b_sums; the others find b scaled.
  bool is_first = false;
  const float* b_scales = nullptr;     // (kGemmPanel)
  const float* b_exponents = nullptr;  // (kGemmPanel)
  float* scaled = nullptr;             // (depth, kGemmPanel)
  float* b_sums = nullptr;             // (pair_sums(depth), kGemmPanel)
};

// --- pairs ---
// Kernels that multiply some of the reduction in pairs, a1 b1 + a2 b2 = (a1 + b2) (a2 + b1) - a1 a2 - b1 b2.
// In floating point that is as good as a chain of multiply-adds under two conditions. Both factors have one
// size: in a block of kPairBlock steps every row of A and every column of B is scaled by the power of two
// that brings its root mean square nearest to 1. And what is subtracted stays small: of every second pair (a1
// - b2) (a2 - b1) is subtracted, so that means cancel, and sums are corrected every pair_depth steps and only
// then added up.
//
// The error of an element is bounded by the norms of its row and its column instead of by the sum of |a b|
// (docs/numerics.md): that is less than a chain's where they are dense, more where few large numbers meet in
// pairs. A row or a column that is not finite gives NaN.
constexpr int64_t kPairBlock = 768;
// Steps between two corrections in a block of so many, and the corrections it has.
static constexpr int64_t pair_depth(int64_t depth) { return depth > 384 ? 384 : 192; }
static constexpr int64_t pair_sums(int64_t depth) {
  return (depth + pair_depth(depth) - 1) / pair_depth(depth);
}

// A weight packed as fp32 ends with one of these for every panel and block of kPairBlock rows. Where pairs
// pay (packs_for_pairs) the numbers of the block are held times the scales of their columns, so that no
// product has to scale them, except where one of them would not come back as it was.
constexpr int64_t kMostPairSums = 2;
static_assert(pair_sums(kPairBlock) <= kMostPairSums && pair_sums(384) <= kMostPairSums,
              "room for all corrections of a block");
struct PairPanel {
  float exponents[kGemmPanel] = {};             // of the powers of two that undo the scales
  float sums[kMostPairSums * kGemmPanel] = {};  // of the pairs of the scaled columns
  float form[16] = {};                          // [0]: kScaledForm, where the block is scaled
};
constexpr float kScaledForm = 0x1.5ca1edp+99f;
constexpr int64_t kPairPanelFloats = static_cast<int64_t>(sizeof(PairPanel) / sizeof(float));

constexpr int64_t kTurnedRows = 16;

struct GemmPairs {
  int64_t max_rows;  // as in GemmKernels
  void (*tile)(const GemmTile& tile);
  // steps (depth, kTurnedRows), whole squares of them, = the transpose of `count` rows of `depth` floats,
  // zero beyond; squares (count) = the sums of their squares, four steps at a time, added up one after the
  // other.
  void (*turn_rows)(float* steps, float* squares, const float* const* rows, int64_t count, int64_t depth);
  // Such squares of src (depth, count), count <= kGemmPanel.
  void (*column_squares)(float* squares, const float* src, int64_t src_stride, int64_t count, int64_t depth);
  // dst (depth, count <= kTurnedRows) = the columns of src times their scales, powers of two; after it the
  // sums of their pairs, (pair_sums(depth), count), and `exponents`, (count).
  void (*pack_steps)(float* dst, const float* src, int64_t src_stride, const float* scales,
                     const float* exponents, int64_t count, int64_t depth);
  // block (depth, kGemmPanel) times the scales of its columns, in place, and the sums of their pairs; false,
  // and nothing is done, where a number times the scale and its reciprocal is another one.
  bool (*scale_block)(float* block, float* sums, const float* scales, const float* factors, int64_t depth);
};

struct GemmKernels {
  int64_t max_rows;  // of a tile
  int64_t depth;     // of a block of the reduction: 1 .. 3072
  void (*tile)(const GemmTile& tile);
  void (*finish)(const GemmFinish& finish);  // of cells in memory, any number of columns
  // dst (depth, count) = the transpose of `count` rows of `depth` floats, count <= max_rows: A for a tile.
  void (*pack_rows)(float* dst, const float* const* rows, int64_t count, int64_t depth);
  // dst (rows, cols) = src (rows, cols)
  void (*copy)(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
               int64_t cols);
  // dst (cols, rows) = src^T, src (rows, cols)
  void (*transpose)(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
                    int64_t cols);
  // sums[0 .. cols) += rows of src in ascending order
  void (*column_sums)(float* sums, const float* src, int64_t src_stride, int64_t rows, int64_t cols);
  const GemmPairs* pairs = nullptr;  // given: `tile` is theirs
};

// Numbers of packed A that a row has in a block of the reduction.
static inline int64_t packed_depth(const GemmKernels& kernels, int64_t depth) {
  return kernels.pairs ? depth + pair_sums(depth) + 1 : depth;
}

extern const GemmKernels kGemmPortable;
// On machines other than x86-64 these have no kernels (tile is null).
extern const GemmKernels kGemmAvx2;
extern const GemmKernels kGemmAvx512;
extern const GemmPairs kGemmPairsAvx512;

// --- bf16 ---
// A tile is 16 rows of 64 bytes, as AMX has them. Operands are packed in steps of 32 of the reduction: A as
// [step][part] tiles of 16 rows x 32 numbers, B as [step][part][half] tiles of 16 pairs of the reduction x 16
// columns (the two of a pair adjacent). Rows, columns and numbers past the end are zero.
//
// A number has one part, itself rounded to the nearest bf16, ties to even; or three, whose sum it is: the
// upper half of its bits, then the rest rounded to the nearest, then what remains. A product of two such
// numbers is the sum of six products of parts; the three that are left out lie below 2^-22 of it, on
// average at 2^-26, and have either sign, so that the sums are as good as those of fp32. Denormal numbers
// count as zero, and a sum that meets an infinity is NaN.
constexpr int64_t kBf16Step = 32;
constexpr int64_t kBf16Rows = 16;
constexpr int64_t kBf16Tile = 512;  // numbers in a tile

// A weight packed as bf16 has panels of (pairs of the reduction, kGemmPanel) words, whole steps of them: a
// word holds a pair, the even number in its lower half. So the pairs of a step are tiles of B, 128 bytes
// apart. Place of the pair at k, an even number, in a panel:
static constexpr int64_t bf16_words(int64_t k) { return k / 2 * kGemmPanel; }
// Words of a panel of K rows.
static constexpr int64_t bf16_panel_words(int64_t K) {
  return (K + kBf16Step - 1) / kBf16Step * bf16_words(kBf16Step);
}

// A block of a panel of fp32 to be packed as B, piece by piece: whole steps, two rows of it at a time. Where
// the panel lies transposed, squares of it are turned into `turned` before: those of the step that is packed
// and of the one that follows.
struct PanelPack {
  static constexpr int64_t kTurned = 2 * kBf16Step * kGemmPanel;  // floats

  const float* src = nullptr;  // (2 * pairs, kGemmPanel), or (cols, 2 * pairs) where turned is not null
  int64_t src_stride = 0;
  uint16_t* dst = nullptr;
  int64_t done = 0;              // pairs packed
  int64_t pairs = 0;             // of all rows
  const float* after = nullptr;  // where the block begins that is packed after this one, or null
  float* turned = nullptr;       // kTurned, or null
  int64_t squares = 0;           // turned
  int64_t cols = kGemmPanel;     // that there are; looked at where turned is not null
  bool is_stream = false;        // dst is a ring of kStreamSteps steps, see Bf16Tile::stream
};

// With few rows packing takes longer than multiplying, and a packed panel would leave L1 before it is read.
// Then the panels of a packed weight, which follow each other in memory, are one stream of steps through a
// ring: a step is packed kStreamLead steps before it is multiplied.
constexpr int64_t kStreamSteps = 4;
constexpr int64_t kStreamLead = 2;

// c (rows <= 32, cols <= kGemmPanel) = or += A B over `steps` steps, then what `finish` says of the same
// cells.
struct Bf16Tile {
  float* c;
  int64_t c_stride;
  int64_t rows;
  int64_t cols;
  const uint16_t* a0;  // rows 0 .. 15
  const uint16_t* a1;  // rows 16 .. 31, or null when rows <= 16
  const uint16_t* b;
  int64_t steps;
  bool accumulate;
  const GemmFinish* finish;  // or null
  PanelPack* next;           // not null; advanced by pack_pairs between the products
  int64_t pack_pairs;
  // When next->is_stream (AMX): the step of the stream that this tile begins with; b is the ring, and
  // pack_pairs is not looked at.
  int64_t stream = 0;
  bool is_lying = false;  // b lies as in a weight packed as bf16 (one part)
  bool fetch = false;     // as in GemmTile; AMX leaves it to the hardware
};

struct Bf16Kernels {
  int64_t parts;  // of a number
  // A thread calls begin before and end after any number of tiles or rows (SplitRows); in between, with AMX,
  // denormal numbers are zero to it.
  void (*begin)();
  void (*end)();
  void (*tile)(const Bf16Tile& tile);
  // One column of tiles from up to 16 rows that run along the reduction; the parts of a step lie part_step
  // numbers apart, one step after the other. transpose: as B wants them (the rows become columns), else as A
  // does.
  void (*pack_rows)(uint16_t* dst, int64_t part_step, const float* const* rows, int64_t count, int64_t depth,
                    bool transpose);
  // The same from `depth` rows that run across it, `count` numbers of each. transpose: as A wants them, else
  // as B does.
  void (*pack_columns)(uint16_t* dst, int64_t part_step, const float* src, int64_t src_stride, int64_t count,
                       int64_t depth, bool transpose);
};

// c (rows, cols <= kGemmPanel) = or += A B in three parts, then what `finish` says: the bits of the tiles,
// from a panel as it lies.
struct SplitRows {
  float* c;
  int64_t c_stride;
  int64_t rows;  // 1 .. SplitRowKernels::max_rows
  int64_t cols;
  const float* a;       // (rows, 3, part_stride): the parts of a row as fp32
  int64_t part_stride;  // at least depth
  const float* b;       // (depth, kGemmPanel)
  int64_t depth;        // whole steps
  bool accumulate;
  const GemmFinish* finish;  // or null
};

struct SplitRowKernels {
  int64_t max_rows;
  void (*rows)(const SplitRows& rows);
  // dst (3, part_stride) = the parts of `depth` numbers, a multiple of 16.
  void (*parts_of_row)(float* dst, int64_t part_stride, const float* src, int64_t depth);
};

// Where the machine lacks the instructions, or its type has none, these have no kernels (tile is null).
extern const Bf16Kernels kGemmBf16Amx;
extern const Bf16Kernels kGemmFp32Amx;  // three parts
extern const Bf16Kernels kGemmBf16Avx512;
extern const SplitRowKernels kSplitRowsAvx512;  // beside kGemmFp32Amx

}  // namespace dn::cpu
