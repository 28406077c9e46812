// The kernels of the matrix product on AMX tiles of bf16 (gemm_bf16_tiles.inl). Between the products a piece
// of the next panel is packed.

#include "cpu/gemm_kernels.h"

#if defined(__x86_64__) && defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#include <string.h>

#include "cpu/gemm_bf16_tiles.inl"
#include "cpu/gemm_prefetch.inl"

namespace dn::cpu {
namespace {

void copy_cells(float* dst, int64_t dst_stride, const float* src, int64_t src_stride, int64_t rows,
                int64_t cols) {
  const __mmask16 m0 = lanes(cols), m1 = lanes(cols - 16);
  for (int64_t r = 0; r < rows; ++r) {
    _mm512_mask_storeu_ps(dst + r * dst_stride, m0, _mm512_maskz_loadu_ps(m0, src + r * src_stride));
    _mm512_mask_storeu_ps(dst + r * dst_stride + 16, m1,
                          _mm512_maskz_loadu_ps(m1, src + r * src_stride + 16));
  }
}

// Whole tiles only; `from` (when accumulating) and `to` have room for 32 columns and 16 rows, 32 when kTwo.
template <int kParts, bool kTwo, Source kSource>
void multiply(const Bf16Tile& t, const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  constexpr bool kStream = kSource == Source::kStream;
  asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
  t.accumulate ? load_c<kTwo>(from, from_stride) : zero_c<kTwo>();
  const int64_t pairs = kStream ? t.steps * kBf16Step / 2 : t.pack_pairs;
  Packing<kParts, kSource> packing(t.next, pairs, t.steps * places_in_step(kParts));
  multiply_steps<kParts, kTwo, kStream ? kStreamSteps : 0, kSource == Source::kLying>(
      t.a0, t.a1, t.b, t.steps, packing, t.stream);
  packing.end();
  store_c<kTwo>(to, to_stride);
}

template <int kParts, Source kSource>
constexpr auto multiply_rows(bool two) {
  return two ? multiply<kParts, true, kSource> : multiply<kParts, false, kSource>;
}

template <int kParts>
void tile(const Bf16Tile& t) {
  const bool two = t.a1 != nullptr;
  const bool whole = t.cols == kGemmPanel && t.rows == (two ? 32 : 16);
  for (int64_t r = 0; r < t.rows; ++r) prefetch_row(t.c + r * t.c_stride);
  prefetch_finish(t.finish);
  // Edges of C, and what is finished before it is stored: whole tiles beside it.
  alignas(64) float cells[32 * kGemmPanel];
  if (t.accumulate && !whole) {
    memset(cells, 0, sizeof cells);
    copy_cells(cells, kGemmPanel, t.c, t.c_stride, t.rows, t.cols);
  }
  const float* const from = whole ? t.c : cells;
  const int64_t from_stride = whole ? t.c_stride : kGemmPanel;
  const bool beside = !whole || t.finish;
  float* const to = beside ? cells : t.c;
  const int64_t to_stride = beside ? kGemmPanel : t.c_stride;
  constexpr Source kLies = kParts == 1 ? Source::kLying : Source::kPlain;
  const auto run = t.is_lying          ? multiply_rows<kParts, kLies>(two)
                   : t.next->turned    ? multiply_rows<kParts, Source::kTurned>(two)
                   : t.next->is_stream ? multiply_rows<kParts, Source::kStream>(two)
                                       : multiply_rows<kParts, Source::kPlain>(two);
  run(t, from, from_stride, to, to_stride);
  if (t.finish) {
    finish_from<true>(cells, kGemmPanel, *t.finish, FormulaGelu());
  } else if (beside) {
    copy_cells(t.c, t.c_stride, cells, kGemmPanel, t.rows, t.cols);
  }
}

}  // namespace

const Bf16Kernels kGemmBf16Amx = {1, begin, end, tile<1>, pack_rows<1>, pack_columns<1>};
const Bf16Kernels kGemmFp32Amx = {3, begin, end, tile<3>, pack_rows<3>, pack_columns<3>};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const Bf16Kernels kGemmBf16Amx = {};
const Bf16Kernels kGemmFp32Amx = {};
}  // namespace dn::cpu

#endif
