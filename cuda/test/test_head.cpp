// The head on the device: cross-entropy and its gradients against double precision; statistics and draws
// against the CPU backend on the same numbers, with every filter.

#include "cuda/head.h"
#include "cuda/test/support.h"

namespace dn::cuda_test {
namespace {

Weight head_weight(const void* data, int64_t V, int64_t C) {
  Weight w;
  w.data = data;
  w.order = WeightOrder::kOutIn;
  w.K = C;
  w.N = V;
  return w;
}

void check_cross_entropy(Dtype dtype, int64_t V, int64_t C, int64_t N, int64_t R) {
  Backend& device = backend(dtype);
  std::vector<float> weights_w = random_values(V * C, 1, 0.5f);
  if (dtype == Dtype::kBF16)
    for (float& x : weights_w) x = bf16_to_f32(f32_to_bf16(x));
  Array wte(device, Dtype::kF32, V, C, weights_w), hidden(device, dtype, N, C, random_values(N * C, 2));
  Array dhidden(device, dtype, N, C), dwte(device, Dtype::kF32, V, C, random_values(V * C, 3));
  std::vector<int64_t> rows;
  std::vector<int32_t> targets;
  std::vector<float> weights;
  for (int64_t r = 0; r < R; ++r) {
    rows.push_back((r * 7 + 3) % N);  // distinct while 7 and N share no factor
    targets.push_back(static_cast<int32_t>(r * 31 % V));
    weights.push_back(0.5f + 0.1f * static_cast<float>(r % 5));
  }
  Doubles losses, dh(idx(N * C), 0), dw = to_doubles(dwte.host());
  for (int64_t r = 0; r < R; ++r) {
    const float* h = hidden.host().data() + rows[idx(r)] * C;
    Doubles p(idx(V));
    double max = -1e300, sum = 0;
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t c = 0; c < C; ++c)
        p[idx(v)] += static_cast<double>(h[c]) * static_cast<double>(wte.host()[idx(v * C + c)]);
      max = std::max(max, p[idx(v)]);
    }
    const double target = p[idx(targets[idx(r)])];
    for (double& x : p) sum += x = std::exp(x - max);
    losses.push_back(std::log(sum) + max - target);
    for (int64_t v = 0; v < V; ++v) {
      const double d =
          static_cast<double>(weights[idx(r)]) * (p[idx(v)] / sum - (v == targets[idx(r)] ? 1 : 0));
      for (int64_t c = 0; c < C; ++c) {
        dh[idx(rows[idx(r)] * C + c)] += d * static_cast<double>(wte.host()[idx(v * C + c)]);
        dw[idx(v * C + c)] += d * static_cast<double>(h[c]);
      }
    }
  }
  const std::string what =
      std::string(dtype_name(dtype)) + " head, V = " + std::to_string(V) + ", R = " + std::to_string(R);
  std::vector<float> got(idx(R), kNan), alone(idx(R), kNan);
  device.head_cross_entropy(got.data(), dhidden.tensor(), dwte.tensor(), hidden.tensor(), rows.data(),
                            targets.data(), weights.data(), R, head_weight(wte.data(), V, C),
                            MatmulPrecision::kBF16, Store::kAdd);
  CHECK_ERROR(got, losses, 2e-5, what + ", losses");
  CHECK_ERROR(dhidden.get(), dh, tolerance(dtype), what + ", dhidden");
  CHECK_ERROR(dwte.get(), dw, dtype == Dtype::kBF16 ? 4e-3 : 1e-5, what + ", dwte");
  device.head_cross_entropy(alone.data(), Tensor(), Tensor(), hidden.tensor(), rows.data(), targets.data(),
                            weights.data(), R, head_weight(wte.data(), V, C), MatmulPrecision::kBF16,
                            Store::kAdd);
  CHECK(alone == got);
  for (size_t i = 0; i < dw.size(); ++i) dw[i] -= static_cast<double>(dwte.host()[i]);
  device.head_cross_entropy(got.data(), dhidden.tensor(), dwte.tensor(), hidden.tensor(), rows.data(),
                            targets.data(), weights.data(), R, head_weight(wte.data(), V, C),
                            MatmulPrecision::kBF16, Store::kSet);
  CHECK_ERROR(dwte.get(), dw, dtype == Dtype::kBF16 ? 4e-3 : 1e-5, what + ", dwte, set");
}

DN_TEST(cuda_cross_entropy) {
  for (const Dtype dtype : {Dtype::kBF16, Dtype::kF32}) {
    for (const int64_t V : {1, 7, 64, 65, 200, 1031}) check_cross_entropy(dtype, V, 24, 12, 9);
    check_cross_entropy(dtype, 97, 13, 12, 1);
    check_cross_entropy(dtype, 97, 24, 12, 0);
  }
}

DN_TEST(cuda_cross_entropy_refuses_and_diverges) {
  Backend& device = backend(Dtype::kF32);
  Array wte(device, Dtype::kF32, 5, 4, random_values(20, 1)),
      hidden(device, Dtype::kF32, 2, 4, random_values(8, 2));
  Array dhidden(device, Dtype::kF32, 2, 4), dwte(device, Dtype::kF32, 5, 4, std::vector<float>(20, 0));
  const int64_t twice[] = {1, 1};
  const int32_t targets[] = {1, 9};
  const float weights[] = {1, 1};
  float losses[2] = {0, 0};
  const int32_t good[] = {1, 2};
  CHECK_THROWS(device.head_cross_entropy(losses, dhidden.tensor(), dwte.tensor(), hidden.tensor(), twice,
                                         good, weights, 2, head_weight(wte.data(), 5, 4),
                                         MatmulPrecision::kFP32, Store::kAdd),
               Code::kArgument, "listed twice");
  CHECK_THROWS(
      device.head_cross_entropy(losses, Tensor(), Tensor(), hidden.tensor(), twice, targets, weights, 2,
                                head_weight(wte.data(), 5, 4), MatmulPrecision::kFP32, Store::kAdd),
      Code::kArgument, "id 9");
  hidden.set({1, 1, 1, 1, kNan, 1, 1, 1});
  const int64_t rows[] = {0, 1};
  device.head_cross_entropy(losses, Tensor(), Tensor(), hidden.tensor(), rows, good, weights, 2,
                            head_weight(wte.data(), 5, 4), MatmulPrecision::kFP32, Store::kAdd);
  CHECK(std::isfinite(losses[0]) && std::isnan(losses[1]));
}

DN_TEST(cuda_head_logits) {
  for (const Dtype dtype : {Dtype::kBF16, Dtype::kF32}) {
    Backend& device = backend(dtype);
    const int64_t V = 71, C = 16, N = 9;
    std::vector<float> w = random_values(V * C, 1);
    for (float& x : w) x = bf16_to_f32(f32_to_bf16(x));
    Array wte(device, Dtype::kF32, V, C, w), hidden(device, dtype, N, C, random_values(N * C, 2)),
        out(device, Dtype::kF32, 3, V);
    const int64_t rows[] = {8, 0, 8};
    Doubles expected;
    for (const int64_t row : rows) {
      for (int64_t v = 0; v < V; ++v) {
        double sum = 0;
        for (int64_t c = 0; c < C; ++c)
          sum +=
              static_cast<double>(hidden.host()[idx(row * C + c)]) * static_cast<double>(w[idx(v * C + c)]);
        expected.push_back(sum);
      }
    }
    device.head_logits(out.tensor(), hidden.tensor(), rows, 3, head_weight(wte.data(), V, C));
    CHECK_ERROR(out.get(), expected, 1e-5, std::string(dtype_name(dtype)) + " logits");
  }
}

// Hidden states are unit vectors, so that a row of logits is a row of wte^T to the bit on both backends and
// the statistics and draws can be compared one by one.
void check_denoise(Dtype dtype, const std::vector<int64_t>& vocabularies) {
  Backend& device = backend(dtype);
  const std::unique_ptr<Backend> cpu = make_cpu_backend(1);
  for (const int64_t V : vocabularies) {
    emulate_seed(static_cast<uint64_t>(V));
    const int64_t C = 8;
    std::vector<float> w = random_values(V * C, 1, 3), identity(idx(C * C), 0);
    if (dtype == Dtype::kBF16)
      for (float& x : w) x = bf16_to_f32(f32_to_bf16(x));
    if (V == 200) w[idx(5 * C)] = w[idx(9 * C)] = 20;  // a tie for the best of row 0
    for (int64_t c = 0; c < C; ++c) identity[idx(c * C + c)] = 1;
    std::vector<DenoiseRow> rows;
    for (int i = 0; i < 48; ++i) {
      DenoiseRow row;
      row.row = i % C;
      row.temperature = i % 4 == 0 ? 0.0f : i % 4 == 1 ? 1.0f : i % 4 == 2 ? 0.6f : 1.8f;
      row.top_p = i % 3 == 0 ? 1.0f : i % 3 == 1 ? 0.9f : 0.3f;
      row.top_k = i % 5 == 0 ? 3 : i % 5 == 1 ? 40 : 0;
      row.banned = i % 2 ? 1 : -1;
      row.banned_end = i % 4 == 3 && V > 6 ? 6 : -1;
      row.seed = 1234;
      row.step = static_cast<uint32_t>(i / 7);
      row.position = static_cast<uint32_t>(i);
      if (i % 6 == 5) {
        row.guide_row = (i + 3) % C;
        row.guidance = 1.5f;
      }
      rows.push_back(row);
    }
    const int64_t R = static_cast<int64_t>(rows.size());
    const int32_t watch[] = {0, static_cast<int32_t>(V - 1)};
    Array wte(device, Dtype::kF32, V, C, w), hidden(device, dtype, C, C, identity);
    std::vector<DenoiseStats> got(idx(R)), expected(idx(R));
    std::vector<float> watched(idx(R * 2), kNan), expected_watched(idx(R * 2), kNan);
    device.head_denoise(got.data(), watched.data(), hidden.tensor(), rows.data(), R, watch, 2,
                        head_weight(wte.data(), V, C));
    cpu->head_denoise(expected.data(), expected_watched.data(), Tensor(identity.data(), Dtype::kF32, C, C),
                      rows.data(), R, watch, 2, head_weight(w.data(), V, C));
    for (int64_t r = 0; r < R; ++r) {
      const DenoiseStats &a = got[idx(r)], &b = expected[idx(r)];
      const std::string what =
          std::string(dtype_name(dtype)) + ", V = " + std::to_string(V) + ", row " + std::to_string(r);
      CHECK_MSG(a.best == b.best,
                what + ": best " + std::to_string(a.best) + ", CPU " + std::to_string(b.best));
      CHECK_MSG(a.drawn == b.drawn,
                what + ": drawn " + std::to_string(a.drawn) + ", CPU " + std::to_string(b.drawn));
      // Guidance multiplies the rounding of the logits.
      const float allowed = rows[idx(r)].guide_row >= 0 ? 1e-5f : 1e-6f;
      CHECK_MSG(std::fabs(a.probability - b.probability) < allowed, what + ": probability");
      CHECK_MSG(std::fabs(a.margin - b.margin) < allowed, what + ": margin");
      CHECK_MSG(std::fabs(a.entropy - b.entropy) < 1e-5f, what + ": entropy");
      CHECK_MSG(std::fabs(a.drawn_log_prob - b.drawn_log_prob) < 1e-5f, what + ": log probability");
    }
    CHECK_CLOSE(watched.data(), expected_watched.data(), R * 2, 1e-6, "watched");
  }
}

// bf16: rows without guide and filters go through the fused head, the others through stored logits.
DN_TEST(cuda_denoise_agrees_with_the_cpu) {
  check_denoise(Dtype::kF32, {2, 7, 65, 200, 1000});
  check_denoise(Dtype::kBF16, {2, 7, 65, 200, 255, 256, 257, 1000});
}

// Draws follow the distribution: 50 ids, chi-square with 49 degrees of freedom (99.9 %: 85.4).
void check_draws(Dtype dtype) {
  Backend& device = backend(dtype);
  const int64_t V = 50, C = 8;
  const int draws = 3000;
  std::vector<float> w = random_values(V, 7), columns(idx(V * C), 0);
  for (int64_t v = 0; v < V; ++v) columns[idx(v * C)] = w[idx(v)] = bf16_to_f32(f32_to_bf16(w[idx(v)]));
  Array wte(device, Dtype::kF32, V, C, columns), hidden(device, dtype, 1, C, {1, 0, 0, 0, 0, 0, 0, 0});
  std::vector<DenoiseRow> rows(draws);
  for (int i = 0; i < draws; ++i) {
    rows[idx(i)].seed = 5;
    rows[idx(i)].position = static_cast<uint32_t>(i);
  }
  std::vector<DenoiseStats> stats(draws);
  device.head_denoise(stats.data(), nullptr, hidden.tensor(), rows.data(), draws, nullptr, 0,
                      head_weight(wte.data(), V, C));
  Doubles p, counts(idx(V), 0);
  double sum = 0, chi = 0;
  for (const float x : w) sum += std::exp(static_cast<double>(x));
  for (const float x : w) p.push_back(std::exp(static_cast<double>(x)) / sum);
  for (const DenoiseStats& s : stats) ++counts[idx(s.drawn)];
  for (size_t v = 0; v < p.size(); ++v)
    chi += (counts[v] - draws * p[v]) * (counts[v] - draws * p[v]) / (draws * p[v]);
  CHECK_MSG(chi < 85.4, std::string(dtype_name(dtype)) + ": chi-square " + std::to_string(chi));
}

DN_TEST(cuda_draws_follow_the_distribution) {
  check_draws(Dtype::kF32);
  check_draws(Dtype::kBF16);
}

// Of stored logits, too, only as many rows are looked at as the device counts.
DN_TEST(cuda_denoise_counts_rows_on_the_device) {
  Backend& device = backend(Dtype::kF32);
  const int64_t R = 3, V = 70, stride = cuda::logits_stride(V);
  const Array logits(device, Dtype::kF32, R, stride, random_values(R * stride, 1)),
      tile_mass(device, Dtype::kF32, R, 2 * cuda::head_tiles(V));
  std::vector<DenoiseRow> rows(idx(R));
  for (int64_t r = 0; r < R; ++r) rows[idx(r)].row = r;
  std::vector<cuda::DenoiseResult> results(idx(R));
  for (cuda::DenoiseResult& result : results) result.not_finite = -77;
  const int32_t live = 2;
  const std::unique_ptr<Buffer> list = device.alloc(rows.size() * sizeof(DenoiseRow)),
                                out = device.alloc(results.size() * sizeof(cuda::DenoiseResult)),
                                count = device.alloc(sizeof live);
  device.upload(list->data(), rows.data(), list->bytes());
  device.upload(out->data(), results.data(), out->bytes());
  device.upload(count->data(), &live, sizeof live);
  cuda::DenoiseCall call;
  call.logits = static_cast<float*>(logits.data());
  call.stride = stride;
  call.V = V;
  call.rows = static_cast<const DenoiseRow*>(list->data());
  call.R = R;
  call.live = {static_cast<const int32_t*>(count->data()), 0};
  call.tile_mass = static_cast<double*>(tile_mass.data());
  call.results = static_cast<cuda::DenoiseResult*>(out->data());
  cuda::denoise(call, nullptr);
  cuda::synchronize(nullptr);
  device.download(results.data(), out->data(), out->bytes());
  CHECK(results[0].not_finite == -1 && results[1].not_finite == -1 && results[2].not_finite == -77);
}

DN_TEST(cuda_denoise_refuses_what_the_cpu_refuses) {
  Backend& device = backend(Dtype::kF32);
  Array wte(device, Dtype::kF32, 4, 1, {1, 2, 3, 4}), hidden(device, Dtype::kF32, 1, 1, {1});
  const auto refused = [&](const char* part, void (*spoil)(DenoiseRow*)) {
    DenoiseRow row;
    DenoiseStats stats;
    spoil(&row);
    CHECK_THROWS(device.head_denoise(&stats, nullptr, hidden.tensor(), &row, 1, nullptr, 0,
                                     head_weight(wte.data(), 4, 1)),
                 Code::kArgument, part);
  };
  refused("temperature is inf", [](DenoiseRow* r) { r->temperature = INFINITY; });
  refused("guidance is nan", [](DenoiseRow* r) { r->guidance = kNan; });
  refused("top_p is 0", [](DenoiseRow* r) { r->top_p = 0; });
  refused("guide row -2", [](DenoiseRow* r) { r->guide_row = -2; });
  refused("banned id is 4", [](DenoiseRow* r) { r->banned_end = 4; });
}

DN_TEST(cuda_denoise_names_logits_that_are_not_finite) {
  Backend& device = backend(Dtype::kF32);
  Array wte(device, Dtype::kF32, 4, 1, {1, 2, kNan, 4}), hidden(device, Dtype::kF32, 1, 1, {1});
  DenoiseRow row;
  DenoiseStats stats;
  CHECK_THROWS(device.head_denoise(&stats, nullptr, hidden.tensor(), &row, 1, nullptr, 0,
                                   head_weight(wte.data(), 4, 1)),
               Code::kDiverged, "id 2");
}

}  // namespace
}  // namespace dn::cuda_test
