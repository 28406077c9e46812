// The inner loops of attention on vectors, compiled once per instruction set by attention_avx2.cpp and
// attention_avx512.cpp. The meaning of each kernel is in attention_kernels.h, the readable form in
// attention_portable.cpp.
//
// All products go through one register-blocked kernel, tile_product. Every element of a product is one chain
// of fma over the inner index, whatever the size of the tile that holds it, so a query's bits do not depend
// on its neighbours. Keys that a query does not see get probability 0, which adds nothing.
#include "cpu/attention_annealed.inl"
#include "cpu/attention_forward_vectors.inl"

namespace dn::cpu {
namespace {

// dst (HSp, kKeyBlock) = src (count, HS) transposed, zero where there is no source.
static void copy_transposed(float* dst, const float* src, int64_t stride, int64_t count, int64_t HS) {
  for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
    for (int64_t d = 0; d < HS; d += kLanes) {
      const Mask lanes = tail(d, HS);
      Vec v[kLanes];
      DN_UNROLL for (int i = 0; i < kLanes; ++i) {
        v[i] = j + i < count ? simd::load(src + (j + i) * stride + d, lanes) : simd::zero();
      }
      transpose_lanes(v);
      DN_UNROLL for (int i = 0; i < kLanes; ++i) simd::store(dst + (d + i) * kKeyBlock + j, v[i]);
    }
  }
}

// dst rows (HS) = src rows (HSp) * scale.
static void write_rows(float* dst, int64_t stride, const float* src, int64_t rows, int64_t HS, int64_t HSp,
                       float scale) {
  const Vec s = simd::set1(scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < HS; d += kLanes) {
      simd::store(dst + r * stride + d, simd::mul(simd::load(src + r * HSp + d), s), tail(d, HS));
    }
  }
}

// Scores as chains of fma, in base 2.
struct ChainScores {
  static constexpr bool kHasUnits = false;

  static void load_queries(const ForwardTile& t, const float* q, int64_t q_stride) {
    copy_rows(t.q, q, q_stride, t.rows, t.HS, t.HSp, t.scale * kLog2E);
  }
  ChainScores(const ForwardTile& tile, const KeyRows& keys)
      : t(tile), transposed(keys.transposed ? keys.k : nullptr) {
    if (!transposed) copy_transposed(t.keys, keys.k, keys.stride, keys.count, t.HS);
  }
  void multiply(int64_t first, int64_t rows, int64_t columns) const {
    Product p = {t.scores, kKeyBlock, t.q + first * t.HSp, t.HSp, 1, t.keys, kKeyBlock, t.HS, nullptr};
    if (!transposed) return product<Start::kZero>(p, rows, columns);
    p.b = transposed;
    p.b_stride = kKeyGroup;
    p.b_group = t.HS * kKeyGroup;
    product<Start::kZero, true>(p, rows, columns);
  }
  const float* units(int64_t) const { return nullptr; }

  const ForwardTile& t;
  const float* transposed;  // as KeyRows says, or null
};

static void backward_begin(const BackwardTile& t, const float* q, int64_t stride, const float* dout,
                           int64_t dout_stride, const float* out, int64_t out_stride, const float* lse,
                           int64_t lse_stride) {
  copy_rows(t.q, q, stride, t.T, t.HS, t.HSp, t.scale);
  copy_rows(t.dout, dout, dout_stride, t.T, t.HS, t.HSp, 1.0f);
  for (int64_t i = 0; i < t.T * t.HSp; ++i) t.dq[i] = 0;
  for (int64_t r = 0; r < t.T; ++r) {
    Vec sum = simd::zero();
    for (int64_t d = 0; d < t.HS; d += kLanes) {
      sum = simd::fma(simd::load(t.dout + r * t.HSp + d), simd::load(out + r * out_stride + d, tail(d, t.HS)),
                      sum);
    }
    t.delta[r] = simd::reduce_add(sum);
    t.lse[r] = lse[r * lse_stride];
  }
}

static void backward_keys(const BackwardTile& t, const float* k, const float* v, int64_t stride) {
  copy_rows(t.keys, k, stride, t.count, t.HS, t.HSp, 1.0f);
  copy_transposed(t.keys_t, k, stride, t.count, t.HS);
  copy_transposed(t.values_t, v, stride, t.count, t.HS);
  for (int64_t i = 0; i < t.count * t.HSp; ++i) t.dk[i] = t.dv[i] = 0;
}

static void backward_block(const BackwardTile& t, int64_t first, int64_t rows, const uint64_t* words) {
  const int64_t columns = round_up_lanes(t.count);
  const uint64_t all = t.count == kKeyBlock ? ~uint64_t{0} : (uint64_t{1} << t.count) - 1;
  const float* const q = t.q + first * t.HSp;
  const float* const dout = t.dout + first * t.HSp;
  product<Start::kZero>({t.p, kKeyBlock, q, t.HSp, 1, t.keys_t, kKeyBlock, t.HS, nullptr}, rows, columns);
  product<Start::kZero>({t.ds, kKeyBlock, dout, t.HSp, 1, t.values_t, kKeyBlock, t.HS, nullptr}, rows,
                        columns);
  for (int64_t r = 0; r < rows; ++r) {
    float* const p_row = t.p + r * kKeyBlock;
    float* const ds_row = t.ds + r * kKeyBlock;
    const Vec lse = simd::set1(t.lse[first + r]), delta = simd::set1(t.delta[first + r]);
    const uint64_t word = words ? words[r] : all;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Mask on = simd::lanes_of_bits(static_cast<uint32_t>(word >> c));
      const Vec e = simd::softmax_exp(simd::sub(simd::load(p_row + c), lse));
      const Vec p = simd::select(on, e, simd::zero());
      simd::store(p_row + c, p);
      simd::store(ds_row + c, simd::mul(p, simd::sub(simd::load(ds_row + c), delta)));
    }
  }
  product<Start::kAdd>({t.dv, t.HSp, t.p, 1, kKeyBlock, dout, t.HSp, rows, nullptr}, t.count, t.HSp);
  product<Start::kAdd>({t.dk, t.HSp, t.ds, 1, kKeyBlock, q, t.HSp, rows, nullptr}, t.count, t.HSp);
  product<Start::kAdd>({t.dq + first * t.HSp, t.HSp, t.ds, kKeyBlock, 1, t.keys, t.HSp, t.count, nullptr},
                       rows, t.HSp);
}

static void backward_keys_end(const BackwardTile& t, float* dk, float* dv, int64_t stride) {
  write_rows(dk, stride, t.dk, t.count, t.HS, t.HSp, 1.0f);
  write_rows(dv, stride, t.dv, t.count, t.HS, t.HSp, 1.0f);
}

static void backward_end(const BackwardTile& t, float* dq, int64_t stride) {
  write_rows(dq, stride, t.dq, t.T, t.HS, t.HSp, t.scale);
}

}  // namespace
}  // namespace dn::cpu
