// The int8 product's kernels for AVX-512 with VNNI. A tile is up to 14 rows of two vectors: 28 sums, two
// vectors of weights and one broadcast of four inputs fill the 32 registers.

#include "cpu/gemm_int8_kernels.h"

#if defined(__x86_64__) && !defined(_MSC_VER)
#include "cpu/gemm_int8_avx512.inl"
#include "cpu/gemm_prefetch.inl"

namespace dn::cpu {
namespace {

constexpr int kMaxRows = 14;
constexpr int kPause = 4;  // steps of the reduction between prefetches; divides those of kInt8Step
static_assert(kInt8Step % (kPause * kInt8Group) == 0, "a slot is whole steps");

// sum += four products of a byte of a and a signed byte of w. By hand: the flags of this file stop short of
// VNNI, which other sources with them must not use, and GCC 12 copies every sum around its own intrinsic.
__attribute__((always_inline)) inline void multiply_add(__m512i& sum, __m512i a, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w));
}

template <int kRows, bool kFetch>
void tile_rows(const Int8Tile& t) {
  __m512i sum[kRows][2];
  const __m512i start0 = _mm512_loadu_si512(t.panel->correction);
  const __m512i start1 = _mm512_loadu_si512(t.panel->correction + 16);
#pragma GCC unroll 14
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = start0;
    sum[r][1] = start1;
  }
  // Every third row has a pointer: the two after it are within reach of one index register.
  const int64_t stride = t.a_stride;
  const uint8_t* a[(kRows + 2) / 3];
#pragma GCC unroll 5
  for (int i = 0; i < (kRows + 2) / 3; ++i) a[i] = t.a + 3 * i * stride;
  const char* w = reinterpret_cast<const char*>(t.panel + 1);
  int64_t k = 0;
  const auto step = [&]() __attribute__((always_inline)) {
    const __m512i w0 = _mm512_loadu_si512(w), w1 = _mm512_loadu_si512(w + 64);
    if (kFetch) {
      fetch_line<fetch_bytes(kRows)>(w);
      fetch_line<fetch_bytes(kRows)>(w + 64);
    }
#pragma GCC unroll 14
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      __builtin_memcpy(&four, a[r / 3] + r % 3 * stride + k, 4);
      const __m512i value = _mm512_set1_epi32(four);
      multiply_add(sum[r][0], value, w0);
      multiply_add(sum[r][1], value, w1);
    }
    k += kInt8Group;
    w += kGemmPanel * kInt8Group;
  };
  // A row of C and some lines of what comes next in every slot: in bursts they would keep the
  // few buffers that the tile's own loads need.
  const float* c_row = t.c;
  int64_t c_rows = kRows, lines = t.prefetch_lines;
  const char* wanted = t.prefetch;
  const int64_t slots = t.depth / (kPause * kInt8Group), burst = (lines + slots - 1) / slots;
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (c_rows-- > 0) {
      prefetch_row(c_row);
      c_row += t.c_stride;
    }
    for (int64_t i = lines < burst ? lines : burst; i > 0; --i, wanted += 64)
      _mm_prefetch(wanted, _MM_HINT_T1);
    lines -= burst;
    for (int i = 0; i < kPause; ++i) step();
  }
  const __m512 scales[2] = {_mm512_loadu_ps(t.panel->scales), _mm512_loadu_ps(t.panel->scales + 16)};
  finish_rows<kRows, TableGelu>(
      t.c, t.c_stride, t.cols, t.finish, [&](int r, int v) __attribute__((always_inline)) {
        const __m512 scale = _mm512_set1_ps(t.a_scales[r]);
        return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][v]), scale), scales[v]);
      });
}

template <bool kFetch>
void tile_of(const Int8Tile& t) {
  switch (t.rows) {
    case 1: return tile_rows<1, kFetch>(t);
    case 2: return tile_rows<2, kFetch>(t);
    case 3: return tile_rows<3, kFetch>(t);
    case 4: return tile_rows<4, kFetch>(t);
    case 5: return tile_rows<5, kFetch>(t);
    case 6: return tile_rows<6, kFetch>(t);
    case 7: return tile_rows<7, kFetch>(t);
    case 8: return tile_rows<8, kFetch>(t);
    case 9: return tile_rows<9, kFetch>(t);
    case 10: return tile_rows<10, kFetch>(t);
    case 11: return tile_rows<11, kFetch>(t);
    case 12: return tile_rows<12, kFetch>(t);
    case 13: return tile_rows<13, kFetch>(t);
    default: return tile_rows<14, kFetch>(t);
  }
}

void tile(const Int8Tile& t) { t.fetch ? tile_of<true>(t) : tile_of<false>(t); }

}  // namespace

const Int8Kernels kInt8Avx512 = {"avx512-vnni", kMaxRows, nullptr, nullptr, tile, quantise_row};

}  // namespace dn::cpu

#else

namespace dn::cpu {
const Int8Kernels kInt8Avx512 = {};
}  // namespace dn::cpu

#endif
