// The row and element kernels on vectors, compiled once per instruction set by rows_avx2.cpp and
// rows_avx512.cpp. The meaning of each is in rows_kernels.h, the readable form in rows_portable.cpp. Element
// i of an elementwise kernel gets the same operations in a full vector and in a tail, so results do not
// depend on how the work was cut.
#include "cpu/rows_kernels.h"
#include "cpu/simd.inl"

namespace dn::cpu {
namespace {

using simd::kLanes;
using simd::Mask;
using simd::Vec;

// Lanes of the vector at c that lie inside [0, n).
inline Mask tail(int64_t c, int64_t n) {
  return simd::first_lanes(n - c < kLanes ? static_cast<int>(n - c) : kLanes);
}

// Calls f(offset, mask) for every vector of [0, n); only the last one has lanes off.
template <typename F>
inline void for_each_vector(int64_t n, F f) {
  const Mask all = simd::first_lanes(kLanes);
  int64_t c = 0;
  for (; c + kLanes <= n; c += kLanes) f(c, all);
  if (c < n) f(c, tail(c, n));
}

static void accumulate(float* out, const float* a, int64_t C) {
  for_each_vector(C, [=](int64_t c, Mask m) {
    simd::store(out + c, simd::add(simd::load(out + c, m), simd::load(a + c, m)), m);
  });
}

// Sum over a row of term(offset, mask), with four running sums; lanes that are off must give zero.
template <typename F>
inline float row_sum(int64_t C, F term) {
  const Mask all = simd::first_lanes(kLanes);
  Vec s0 = simd::zero(), s1 = simd::zero(), s2 = simd::zero(), s3 = simd::zero();
  int64_t c = 0;
  for (; c + 4 * kLanes <= C; c += 4 * kLanes) {
    s0 = simd::add(s0, term(c, all));
    s1 = simd::add(s1, term(c + kLanes, all));
    s2 = simd::add(s2, term(c + 2 * kLanes, all));
    s3 = simd::add(s3, term(c + 3 * kLanes, all));
  }
  for (; c < C; c += kLanes) s0 = simd::add(s0, term(c, tail(c, C)));
  return simd::reduce_add(simd::add(simd::add(s0, s1), simd::add(s2, s3)));
}

static void layernorm_forward(float* out, int64_t out_stride, float* mean, float* rstd, const float* inp,
                              int64_t inp_stride, const float* weight, const float* bias, int64_t rows,
                              int64_t C) {
  const float count = static_cast<float>(C);
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = inp + r * inp_stride;
    float* y = out + r * out_stride;
    // The row stays in the first-level cache over the three passes. The mean is refined by the mean of what
    // is left after subtracting it, so that a large common offset costs no accuracy.
    const float rough = row_sum(C, [=](int64_t c, Mask m) { return simd::load(x + c, m); }) / count;
    const Vec rough_v = simd::set1(rough);
    float first = 0, second = 0;
    {
      Vec s0 = simd::zero(), s1 = simd::zero(), q0 = simd::zero(), q1 = simd::zero();
      int64_t c = 0;
      for (; c + 2 * kLanes <= C; c += 2 * kLanes) {
        const Vec d0 = simd::sub(simd::load(x + c), rough_v),
                  d1 = simd::sub(simd::load(x + c + kLanes), rough_v);
        s0 = simd::add(s0, d0);
        s1 = simd::add(s1, d1);
        q0 = simd::fma(d0, d0, q0);
        q1 = simd::fma(d1, d1, q1);
      }
      for (; c < C; c += kLanes) {
        const Mask m = tail(c, C);
        const Vec d = simd::select(m, simd::sub(simd::load(x + c, m), rough_v), simd::zero());
        s0 = simd::add(s0, d);
        q0 = simd::fma(d, d, q0);
      }
      first = simd::reduce_add(simd::add(s0, s1)) / count;
      second = simd::reduce_add(simd::add(q0, q1)) / count;
    }
    const float row_mean = rough + first;
    const float variance = second - first * first;  // `first` is of rounding size
    float row_rstd[kLanes];
    simd::store(row_rstd, simd::div(simd::set1(1.0f), simd::sqrt(simd::set1(variance + 1e-5f))));
    const Vec s = simd::set1(row_rstd[0]);
    const Vec shift = simd::set1(first);
    for_each_vector(C, [=](int64_t c, Mask m) {
      const Vec centred = simd::sub(simd::sub(simd::load(x + c, m), rough_v), shift);
      simd::store(y + c, simd::fma(simd::mul(centred, s), simd::load(weight + c, m), simd::load(bias + c, m)),
                  m);
    });
    if (mean) mean[r] = row_mean;
    if (rstd) rstd[r] = row_rstd[0];
  }
}

static void layernorm_backward(float* dinp, int64_t dinp_stride, float* dweight, float* dbias,
                               const float* dout, int64_t dout_stride, const float* inp, int64_t inp_stride,
                               const float* weight, const float* mean, const float* rstd, int64_t rows,
                               int64_t C) {
  const float count = static_cast<float>(C);
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = inp + r * inp_stride;
    const float* dy = dout + r * dout_stride;
    float* dx = dinp + r * dinp_stride;
    const Vec mu = simd::set1(mean[r]), s = simd::set1(rstd[r]);
    const float dnorm_avg =
        row_sum(C, [=](int64_t c,
                       Mask m) { return simd::mul(simd::load(dy + c, m), simd::load(weight + c, m)); }) /
        count;
    const float dnorm_norm_avg =
        row_sum(C,
                [=](int64_t c, Mask m) {
                  const Vec norm = simd::mul(simd::sub(simd::load(x + c, m), mu), s);
                  return simd::mul(simd::mul(simd::load(dy + c, m), simd::load(weight + c, m)), norm);
                }) /
        count;
    const Vec a = simd::set1(dnorm_avg), b = simd::set1(dnorm_norm_avg);
    for_each_vector(C, [=](int64_t c, Mask m) {
      const Vec g = simd::load(dy + c, m);
      const Vec norm = simd::mul(simd::sub(simd::load(x + c, m), mu), s);
      const Vec d = simd::fnma(norm, b, simd::sub(simd::mul(g, simd::load(weight + c, m)), a));
      simd::store(dx + c, simd::fma(d, s, simd::load(dx + c, m)), m);
      simd::store(dweight + c, simd::fma(g, norm, simd::load(dweight + c, m)), m);
      simd::store(dbias + c, simd::add(simd::load(dbias + c, m), g), m);
    });
  }
}

static void gelu_backward(float* dinp, const float* dout, const float* inp, int64_t n) {
  for_each_vector(n, [=](int64_t c, Mask m) {
    simd::store(dinp + c, simd::mul(simd::load(dout + c, m), simd::gelu_slope(simd::load(inp + c, m))), m);
  });
}

static void adamw(float* params, const float* gradients, float* m, float* v, int64_t n,
                  const AdamWConstants* k) {
  const Vec decay = simd::set1(k->decay), step_size = simd::set1(k->step_size),
            v_scale = simd::set1(k->v_scale);
  const Vec beta1 = simd::set1(k->beta1), beta2 = simd::set1(k->beta2), eps = simd::set1(k->eps);
  const Vec rest1 = simd::set1(1.0f - k->beta1), rest2 = simd::set1(1.0f - k->beta2);
  const Vec scale = simd::set1(k->gradient_scale);
  for_each_vector(n, [=](int64_t c, Mask lanes) {
    const Vec g = simd::mul(simd::load(gradients + c, lanes), scale);
    const Vec new_m = simd::fma(beta1, simd::load(m + c, lanes), simd::mul(rest1, g));
    const Vec new_v = simd::fma(beta2, simd::load(v + c, lanes), simd::mul(rest2, simd::mul(g, g)));
    const Vec denominator = simd::add(simd::sqrt(simd::mul(new_v, v_scale)), eps);
    const Vec update = simd::div(simd::mul(step_size, new_m), denominator);
    simd::store(m + c, new_m, lanes);
    simd::store(v + c, new_v, lanes);
    simd::store(params + c, simd::sub(simd::mul(decay, simd::load(params + c, lanes)), update), lanes);
  });
}

// Widened to double before squaring: neither overflow nor loss for gradients of any size.
static double sum_of_squares(const float* x, int64_t n) {
  // Four places at once: one alone waits for memory.
  const int64_t quarter = n / (4 * kLanes) * kLanes;
  simd::SquareSum sums[4];
  for (int64_t c = 0; c < quarter; c += kLanes) {
    for (int i = 0; i < 4; ++i) sums[i].add(simd::load(x + i * quarter + c));
  }
  simd::SquareSum rest;
  for_each_vector(n - 4 * quarter, [&](int64_t c, Mask m) { rest.add(simd::load(x + 4 * quarter + c, m)); });
  return (sums[0].total() + sums[1].total()) + (sums[2].total() + sums[3].total()) + rest.total();
}

static void clear(float* out, int64_t n) {
  int64_t c = 0;
  for (; c < n && (reinterpret_cast<uintptr_t>(out + c) & (sizeof(Vec) - 1)) != 0; ++c) out[c] = 0;
  for (; c + kLanes <= n; c += kLanes) simd::stream(out + c, simd::zero());
  for (; c < n; ++c) out[c] = 0;
  simd::stream_end();
}

static void exp_each(float* out, const float* inp, int64_t n) {
  for_each_vector(n, [=](int64_t c, Mask m) { simd::store(out + c, simd::exp(simd::load(inp + c, m)), m); });
}

static void softmax_exp_each(float* out, const float* inp, int64_t n) {
  for_each_vector(
      n, [=](int64_t c, Mask m) { simd::store(out + c, simd::softmax_exp(simd::load(inp + c, m)), m); });
}

static void softmax_exp2_each(float* out, const float* inp, int64_t n) {
  for_each_vector(
      n, [=](int64_t c, Mask m) { simd::store(out + c, simd::softmax_exp2(simd::load(inp + c, m)), m); });
}

static void log_each(float* out, const float* inp, int64_t n) {
  for_each_vector(n, [=](int64_t c, Mask m) { simd::store(out + c, simd::log(simd::load(inp + c, m)), m); });
}

}  // namespace
}  // namespace dn::cpu
