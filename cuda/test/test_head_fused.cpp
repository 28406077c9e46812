// Head + denoise without logits in memory: against double precision, against the head that stores its logits,
// and that a row's results depend on nothing but the row.

#include "cuda/backend_cuda.h"
#include "cuda/test/denoise_case.h"

namespace dn::cuda_test {
namespace {

bool same(const DenoiseStats& a, const DenoiseStats& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// Ids around the edges of a tile, rows around those of a block, k with and without a part of a stage.
DN_TEST(cuda_fused_head_sizes) {
  const auto check = [](int64_t V, int64_t C, int64_t R) {
    emulate_seed(static_cast<uint64_t>(V * R));
    const DenoiseCase c(V, C, R);
    const std::string mistake = c.mistake(c.run());
    CHECK_MSG(mistake.empty(), mistake);
  };
  for (const int64_t V : {255, 256, 257, 1000}) {
    for (const int64_t R : {1, 7, 64, 65, 200}) check(V, R == 65 ? 136 : 24, R);
  }
  check(9, 8, 7);
  check(64, 64, 7);
  check(65, 200, 7);
  check(1100, 104, 129);  // blocks of 128 rows, the second with one
}

// Hidden states whose rows are not aligned to 16 bytes take the other path.
DN_TEST(cuda_fused_head_agrees_with_stored_logits) {
  const DenoiseCase c(700, 40, 90);
  const int64_t stride = c.C + 4;
  std::vector<float> spread(idx(DenoiseCase::kHidden * stride), kNan);
  for (int64_t r = 0; r < DenoiseCase::kHidden; ++r)
    std::copy_n(c.hidden_values.begin() + r * c.C, c.C, spread.begin() + r * stride);
  const Array apart(c.device, Dtype::kBF16, DenoiseCase::kHidden, stride, spread);
  const DenoiseCase::Results fused = c.run(), stored = c.run(apart.tensor().columns(0, c.C), c.rows);
  CHECK_MSG(c.mistake(stored).empty(), c.mistake(stored));
  for (int64_t r = 0; r < c.R; ++r) {
    const DenoiseStats &a = fused.stats[idx(r)], &b = stored.stats[idx(r)];
    const std::string what = "row " + std::to_string(r);
#ifdef DN_CUDA_EMULATOR  // where both add in the same order; a library's products may not
    CHECK_MSG(a.best == b.best, what + ": best");
    CHECK_MSG(a.drawn == b.drawn, what + ": drawn " + std::to_string(a.drawn) + ", with stored logits " +
                                      std::to_string(b.drawn));
#endif
    CHECK_MSG(std::fabs(a.probability - b.probability) < 1e-6f, what + ": probability");
    CHECK_MSG(std::fabs(a.margin - b.margin) < 1e-6f, what + ": margin");
    CHECK_MSG(std::fabs(a.entropy - b.entropy) < 1e-5f, what + ": entropy");
  }
  CHECK_CLOSE(fused.watched.data(), stored.watched.data(), static_cast<int64_t>(fused.watched.size()), 1e-6,
              "watched");
}

// The same bits in a second run, alone or among others, whichever block size that takes.
DN_TEST(cuda_fused_head_rows_stand_alone) {
  const DenoiseCase c(1100, 40, 150);
  emulate_seed(1);
  const std::vector<DenoiseStats> all = c.run().stats;
  emulate_seed(2);
  const std::vector<DenoiseStats> again = c.run().stats;
  for (int64_t r = 0; r < c.R; ++r) CHECK_MSG(same(all[idx(r)], again[idx(r)]), "row " + std::to_string(r));
  std::vector<DenoiseRow> some;
  std::vector<int64_t> listed = {149, 3, 64, 0, 127, 128};
  for (const int64_t r : listed) some.push_back(c.rows[idx(r)]);
  // A row with a filter goes another way and comes back to its place.
  some.insert(some.begin() + 2, c.rows[2]);
  some[2].top_k = 5;
  listed.insert(listed.begin() + 2, 2);
  const std::vector<DenoiseStats> few = c.run(c.hidden->tensor(), some).stats;
  for (size_t i = 0; i < some.size(); ++i) {
    if (i == 2) {
      CHECK(few[i].best == all[2].best);
    } else {
      CHECK_MSG(same(few[i], all[idx(listed[i])]), "row " + std::to_string(listed[i]) + " among others");
    }
  }
}

// The rows that are there are counted on the device; those beyond are neither read nor written.
DN_TEST(cuda_fused_head_counts_rows_on_the_device) {
  const DenoiseCase c(600, 24, 200);
  const std::vector<DenoiseStats> expected = c.run().stats;
  auto& device = static_cast<cuda::CudaBackend&>(c.device);
  std::vector<DenoiseRow> rows = c.rows;
  const size_t bytes = idx(c.R) * sizeof(cuda::DenoiseResult);
  const std::unique_ptr<Buffer> list = device.alloc(rows.size() * sizeof(DenoiseRow)),
                                results = device.alloc(bytes), count = device.alloc(sizeof(int32_t));
  for (const int32_t live : {0, 1, 70, 130, 200, 1000, -1}) {
    for (int64_t r = live < 0 ? c.R : live; r < c.R; ++r) rows[idx(r)].row = int64_t{1} << 40;
    device.upload(list->data(), rows.data(), rows.size() * sizeof(DenoiseRow));
    std::vector<cuda::DenoiseResult> got(idx(c.R));
    for (cuda::DenoiseResult& result : got) result.not_finite = -77;
    device.upload(results->data(), got.data(), bytes);
    device.upload(count->data(), &live, sizeof live);
    device.head_denoise_listed(static_cast<cuda::DenoiseResult*>(results->data()), c.hidden->tensor(),
                               static_cast<const DenoiseRow*>(list->data()), c.R,
                               live < 0 ? nullptr : static_cast<const int32_t*>(count->data()), c.head());
    device.download(got.data(), results->data(), bytes);
    for (int64_t r = 0; r < c.R; ++r) {
      const bool there = live < 0 || r < live;
      CHECK_MSG(got[idx(r)].not_finite == (there ? -1 : -77),
                std::to_string(live) + " rows, row " + std::to_string(r));
      if (there) CHECK(same(got[idx(r)].stats, expected[idx(r)]));
    }
    rows = c.rows;
  }
  Backend& plain = backend(Dtype::kF32);
  const Array hidden(plain, Dtype::kF32, 1, 8, random_values(8, 1)), wte(plain, Dtype::kF32, 4, 8);
  Weight head;
  head.data = wte.data();
  head.order = WeightOrder::kOutIn;
  head.K = 8;
  head.N = 4;
  CHECK_THROWS(static_cast<cuda::CudaBackend&>(plain).head_denoise_listed(nullptr, hidden.tensor(), nullptr,
                                                                          1, nullptr, head),
               Code::kArgument, "do not fit the fused kernel");
}

// The first id, wherever in a tile, and the row as the caller listed it.
DN_TEST(cuda_fused_head_names_logits_that_are_not_finite) {
  for (const int64_t id : {2, 300, 511, 599}) {
    DenoiseCase c(600, 16, 3);
    c.wte_values[idx(id * c.C + 5)] = kNan;
    c.wte_values[idx(599 * c.C)] = kNan;
    c.wte->set(c.wte_values);
    CHECK_THROWS(c.run(), Code::kDiverged, "row 0 are not finite: id " + std::to_string(id));
  }
  DenoiseCase c(600, 16, 3);
  c.hidden_values[idx(c.rows[1].row * c.C)] = std::numeric_limits<float>::infinity();
  c.hidden->set(c.hidden_values);
  CHECK_THROWS(c.run(), Code::kDiverged, "row 1 are not finite: id 0");
}

}  // namespace
}  // namespace dn::cuda_test
