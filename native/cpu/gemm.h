// The matrix product engine behind matmul.cpp, for the other CPU ops that multiply (head.cpp).
//
// One rule fixes every bit: an output element is a function of its row of A and its column of B only. The
// reduction runs in ascending order in blocks of GemmKernels::depth; inside a block one chain of fused
// multiply-adds starting from zero, and the sums of the blocks are added in order (to what is in C already
// when accumulating). Neither the place in the batch, the tiling, the threads nor the storage of the weight
// (plain, packed, or packed as bf16 that are widened on the way) takes part. With AMX, reductions of 128 and
// more run on its tiles instead, in steps of 32 and every number as the sum of three of bf16
// (gemm_kernels.h): as exact, and in an order of its own, which one or two rows, multiplied without tiles,
// keep. Where additions have units of their own, fp32 products over 96 and more numbers are made in pairs
// (gemm_kernels.h), in an order of their own, too. MatmulPrecision::kBF16, and a weight packed as bf16, have
// the same independence, with an order of their own and A rounded to bf16; where bf16_kernels has none they
// are fp32.
//
// Matrices are fp32, row-major, with a row stride in elements. Nothing here checks shapes: callers do.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/gemm_kernels.h"
#include "cpu/ops.h"

namespace dn::cpu {

// Vocabulary chunks of head_gemm begin at a multiple of this.
constexpr int64_t kHeadTile = kGemmPanel;

// out (R, n_end - n_begin) = logits of R gathered rows for the vocabulary columns [n_begin, n_end):
// out[r * out_stride + n - n_begin] = inp_rows[r] . wte[n]. inp_rows[r] points to wte.K floats. wte: order
// kOutIn, plain or packed, or packed as bf16 or int8. Multi-threaded; the same bits whatever the chunks.
void head_gemm(const Cpu& cpu, float* out, int64_t out_stride, const float* const* inp_rows, int64_t R,
               const Weight& wte, int64_t n_begin, int64_t n_end, MatmulPrecision precision);

// c (M, N) = or += a (M, K) * b (K, N). Head backward: dhidden rows (R, C) += dlogits (R, chunk) * wte rows
// (chunk, C).
void gemm_nn(const Cpu& cpu, float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, int64_t M, int64_t N, int64_t K, bool accumulate, MatmulPrecision precision);

// c (M, N) = or += a (M, K) * b^T, b stored as (N, K).
void gemm_nt(const Cpu& cpu, float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, int64_t M, int64_t N, int64_t K, bool accumulate, MatmulPrecision precision);

// c (M, N) = or += a^T * b (K, N), a stored as (K, M). Head backward: dwte (V, C) += dlogits^T * hidden rows
// (R, C), with a = dlogits (R, V) and the R hidden rows gathered by the caller. A large c that is set, the
// gradient of a weight, is not read soon and goes past the caches.
void gemm_tn(const Cpu& cpu, float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, int64_t M, int64_t N, int64_t K, bool accumulate, MatmulPrecision precision);

// How the elements of an operand lie in memory.
enum class GemmLayout : uint8_t {
  kPlain,       // A (M, K), B (K, N): row-major
  kTransposed,  // A stored as (K, M), B stored as (N, K)
  kPanels,      // B only: a packed weight
  kBf16Panels,  // B only: a weight packed as bf16, b its words (bf16_words)
};

// One product c (M, N) = or += A B and what happens to its elements: the engine itself.
struct GemmProduct {
  float* c = nullptr;
  int64_t c_stride = 0;
  const float* a = nullptr;
  int64_t a_stride = 0;
  const float* const* a_rows = nullptr;  // instead of a: every row of a plain A by itself
  GemmLayout a_layout = GemmLayout::kPlain;
  const float* b = nullptr;
  int64_t b_stride = 0;
  GemmLayout b_layout = GemmLayout::kPlain;
  int64_t M = 0;
  int64_t N = 0;
  int64_t K = 0;
  bool accumulate = false;
  int64_t column_parts = 1;            // of C: see Weight
  bool stream = false;                 // c is written past the caches where tiles can: see GemmTile
  const float* bias = nullptr;         // (N) or null, added to every row
  bool gelu = false;                   // after the bias
  float* pre = nullptr;                // (M, N) or null: the value before gelu
  const float* residual = nullptr;     // (M, N) or null: added last
  int64_t extra_stride = 0;            // of pre and residual
  const PairPanel* b_pairs = nullptr;  // of kPanels: see packed_pairs; null: no block of b is scaled
};

void gemm(const Cpu& cpu, const GemmProduct& product, MatmulPrecision precision);
// By the fp32 kernels, whatever else the machine has; M, N, K > 0. kBf16Panels are widened.
void gemm_fp32(const Cpu& cpu, const GemmProduct& product);
void gemm_fp32(const Cpu& cpu, const GemmProduct& product, const GemmKernels& kernels);
// The same for K = 0: the sum of nothing, finished.
void gemm_empty(const Cpu& cpu, const GemmProduct& product);

// Whether anything happens to the elements of p after the sums.
inline bool has_finish(const GemmProduct& p) { return p.bias || p.gelu || p.residual; }

// That of the cells [m, m + rows) x [n, n + cols).
inline GemmFinish finish_of(const GemmProduct& p, int64_t m, int64_t n, int64_t rows, int64_t cols) {
  const int64_t extra = m * p.extra_stride + n;
  return {p.c + m * p.c_stride + n,
          p.c_stride,
          rows,
          cols,
          p.bias ? p.bias + n : nullptr,
          p.gelu,
          p.pre ? p.pre + extra : nullptr,
          p.residual ? p.residual + extra : nullptr,
          p.extra_stride};
}

// The kernels of an instruction set.
const GemmKernels& gemm_kernels(Isa isa);
// Those that multiply in pairs (gemm_kernels.h); only where there is AVX-512.
const GemmKernels& pair_kernels();
// Whether they are the faster ones on this machine, limited to isa, for a reduction of K numbers.
bool pairs_pay(Isa isa, int64_t K);

// Whether a weight of K rows is to be packed for them.
bool packs_for_pairs(Isa isa, int64_t K);

// Where the PairPanels of a (K, N) weight packed as fp32, (panels, blocks), begin for the panel at n, in
// numbers.
inline int64_t packed_pairs(int64_t K, int64_t N, int64_t n) {
  const int64_t panels = (N + kGemmPanel - 1) / kGemmPanel, blocks = (K + kPairBlock - 1) / kPairBlock;
  return panels * K * kGemmPanel + n / kGemmPanel * blocks * kPairPanelFloats;
}
inline const PairPanel* pair_panels(const float* packed, int64_t K, int64_t N, int64_t n) {
  return reinterpret_cast<const PairPanel*>(packed + packed_pairs(K, N, n));
}
inline bool is_scaled(const PairPanel& pairs) { return pairs.form[0] == kScaledForm; }
// Scales a block (depth, kGemmPanel) of a panel where that can be undone, and undoes it.
void scale_block(PairPanel* pairs, float* block, int64_t depth);
void unscale_block(PairPanel* pairs, float* block, int64_t depth);
// numbers (count, kGemmPanel) of a scaled block as they were.
void unscale_rows(const PairPanel& pairs, float* numbers, int64_t count);

// Tasks that a product is cut into, at least, so that threads end together.
constexpr int64_t kTasksPerThread = 4;

// The panels of a weight cut into `count` groups of nearly equal size, as many for every thread; with
// `parts` of the columns, a thread's follow each other and are the same share of every part.
struct PanelGroups {
  int64_t panels;
  int64_t parts;
  int64_t shares;  // threads, of each part
  int64_t count;

  // Of p's N columns, at most `most` panels a group, at least `wanted` groups where there are as many panels.
  PanelGroups(const GemmProduct& p, int64_t most, int64_t threads, int64_t wanted)
      : panels((p.N + kGemmPanel - 1) / kGemmPanel),
        parts(threads > 1 && p.N % (p.column_parts * threads * kGemmPanel) == 0 ? p.column_parts : 1),
        shares(parts > 1 ? threads : 1) {
    const int64_t needed = std::max(wanted, (panels + most - 1) / most), together = parts * threads;
    count = std::min(panels, (needed + together - 1) / together * together);
  }
  // Panels [begin, end) of a group.
  int64_t begin(int64_t group) const { return place(group, 0); }
  int64_t end(int64_t group) const { return place(group, 1); }

 private:
  int64_t place(int64_t group, int64_t after) const {
    const int64_t own = count / (parts * shares);  // groups of a share in a part
    const int64_t share = group / (parts * own), part = group / own % parts;
    return panels / parts * part + panels / parts * (share * own + group % own + after) / (shares * own);
  }
};

// Scratch memory of the calling thread, 64-byte aligned, valid until its next request; grows and is kept, so
// that a repeated step allocates nothing. Throws Error(kOutOfMemory).
float* gemm_scratch(int64_t floats);

// `depth` rows of a panel in fp32, (depth, kGemmPanel), as words of a weight packed as bf16 from a step of
// the reduction on, numbers past the end zero; and back.
void pack_bf16(float* words, const float* rows, int64_t depth);
void unpack_bf16(float* rows, const float* words, int64_t depth);

// What multiplies in bf16 faster than in fp32 on this machine, limited to isa; null where nothing does.
const Bf16Kernels* bf16_kernels(Isa isa);

// What multiplies fp32 in parts of bf16 (gemm_kernels.h) faster than fp32 itself, limited to isa, or null:
// for a reduction of K numbers, since short ones are not worth it.
const Bf16Kernels* split_kernels(Isa isa, int64_t K);

// gemm on tiles of bf16, K > 0: in bf16 or, with kernels of three parts, in fp32. kBf16Panels take kernels of
// one part.
void gemm_bf16(const Cpu& cpu, const GemmProduct& product, const Bf16Kernels& kernels);

}  // namespace dn::cpu
