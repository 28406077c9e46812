// The row and element kernels as plain loops: the reference that the vector ones are tested against, and what
// runs on processors without AVX2. Row statistics are accumulated in double.
#include <cmath>

#include "cpu/rows_kernels.h"

namespace dn::cpu {
namespace {

constexpr double kLayernormEps = 1e-5;
constexpr float kSqrtTwoOverPi = 0.797884561f;

void accumulate(float* out, const float* a, int64_t C) {
  for (int64_t c = 0; c < C; ++c) out[c] += a[c];
}

void layernorm_forward(float* out, int64_t out_stride, float* mean, float* rstd, const float* inp,
                       int64_t inp_stride, const float* weight, const float* bias, int64_t rows, int64_t C) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = inp + r * inp_stride;
    float* y = out + r * out_stride;
    double m = 0;
    for (int64_t c = 0; c < C; ++c) m += x[c];
    m /= static_cast<double>(C);
    // The variance from the centred values: no cancellation when |mean| is large.
    double variance = 0;
    for (int64_t c = 0; c < C; ++c) variance += (x[c] - m) * (x[c] - m);
    variance /= static_cast<double>(C);
    const double s = 1.0 / std::sqrt(variance + kLayernormEps);
    for (int64_t c = 0; c < C; ++c) y[c] = static_cast<float>((x[c] - m) * s * weight[c] + bias[c]);
    if (mean) mean[r] = static_cast<float>(m);
    if (rstd) rstd[r] = static_cast<float>(s);
  }
}

void layernorm_backward(float* dinp, int64_t dinp_stride, float* dweight, float* dbias, const float* dout,
                        int64_t dout_stride, const float* inp, int64_t inp_stride, const float* weight,
                        const float* mean, const float* rstd, int64_t rows, int64_t C) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* x = inp + r * inp_stride;
    const float* dy = dout + r * dout_stride;
    float* dx = dinp + r * dinp_stride;
    const float m = mean[r], s = rstd[r];
    // With norm = (x - mean) rstd and dnorm = dout * weight:
    // dx = rstd (dnorm - avg(dnorm) - norm avg(dnorm * norm)).
    double dnorm_avg = 0, dnorm_norm_avg = 0;
    for (int64_t c = 0; c < C; ++c) {
      const double norm = (x[c] - m) * s, dnorm = dy[c] * weight[c];
      dnorm_avg += dnorm;
      dnorm_norm_avg += dnorm * norm;
    }
    dnorm_avg /= static_cast<double>(C);
    dnorm_norm_avg /= static_cast<double>(C);
    for (int64_t c = 0; c < C; ++c) {
      const float norm = (x[c] - m) * s;
      dx[c] += static_cast<float>((dy[c] * weight[c] - dnorm_avg - norm * dnorm_norm_avg) * s);
      dweight[c] += dy[c] * norm;
      dbias[c] += dy[c];
    }
  }
}

// GELU in its tanh form: u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2.
void gelu_backward(float* dinp, const float* dout, const float* inp, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float u = inp[i];
    const float t = std::tanh(kSqrtTwoOverPi * (u + 0.044715f * u * u * u));
    const float dy_du = kSqrtTwoOverPi * (1.0f + 3.0f * 0.044715f * u * u);
    dinp[i] = dout[i] * (0.5f * (1.0f + t) + 0.5f * u * (1.0f - t * t) * dy_du);
  }
}

void adamw(float* params, const float* gradients, float* m, float* v, int64_t n, const AdamWConstants* c) {
  for (int64_t i = 0; i < n; ++i) {
    const float g = gradients[i] * c->gradient_scale;
    m[i] = c->beta1 * m[i] + (1.0f - c->beta1) * g;
    v[i] = c->beta2 * v[i] + (1.0f - c->beta2) * g * g;
    params[i] = c->decay * params[i] - c->step_size * m[i] / (std::sqrt(v[i] * c->v_scale) + c->eps);
  }
}

double sum_of_squares(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return sum;
}

void clear(float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0;
}

void exp_each(float* out, const float* inp, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::exp(inp[i]);
}

void exp2_each(float* out, const float* inp, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::exp2(inp[i]);
}

void log_each(float* out, const float* inp, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = std::log(inp[i]);
}

}  // namespace

const RowsKernels kRowsPortable = {
    accumulate, layernorm_forward, layernorm_backward, gelu_backward, adamw,   sum_of_squares,
    clear,      exp_each,          exp_each,           exp2_each,     log_each};

}  // namespace dn::cpu
