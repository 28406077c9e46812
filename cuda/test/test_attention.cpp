// Attention on the device against a double-precision reference: sizes around the tiles, every mask, ragged
// batches, caches with few queries, both number types, head sizes with and without tensor cores.

#include "cuda/test/attention_case.h"

namespace dn::cuda_test {
namespace {

constexpr MaskKind kKinds[] = {MaskKind::kFull,        MaskKind::kCausal,         MaskKind::kAnnealed,
                               MaskKind::kBlockCausal, MaskKind::kBlockDiffusion, MaskKind::kMatrix};

DN_TEST(cuda_attention_sizes) {
  for (const int64_t T : {1, 7, 64, 65, 200}) {
    emulate_seed(static_cast<uint64_t>(T));
    AttentionCase(Dtype::kBF16, 1, 64, {T}, {MaskKind::kFull}).check("bf16, T = " + std::to_string(T));
    if (T <= 65)
      AttentionCase(Dtype::kF32, 2, 16, {T}, {MaskKind::kFull}).check("fp32, T = " + std::to_string(T));
  }
}

DN_TEST(cuda_attention_masks) {
  int number = 0;
  for (const MaskKind kind : kKinds) {
    const std::string what = ", mask " + std::to_string(static_cast<int>(kind));
    emulate_seed(static_cast<uint64_t>(++number));
    AttentionCase(Dtype::kBF16, 1, 32, {140}, {kind}).check("bf16" + what);
    AttentionCase(Dtype::kF32, 1, 8, {70}, {kind}).check("fp32" + what);
  }
}

DN_TEST(cuda_attention_ragged_mixed_masks) {
  const std::vector<int64_t> lengths{3, 66, 1, 40, 64, 17};
  const std::vector<MaskKind> kinds(std::begin(kKinds), std::end(kKinds));
  AttentionCase(Dtype::kBF16, 2, 32, lengths, kinds).check("bf16, ragged");
  AttentionCase(Dtype::kF32, 2, 8, lengths, kinds).check("fp32, ragged");
}

DN_TEST(cuda_attention_head_sizes) {
  for (const int64_t HS : {8, 48, 128})
    AttentionCase(Dtype::kBF16, 1, HS, {70}, {MaskKind::kCausal}).check("bf16, HS = " + std::to_string(HS));
  // Without tensor cores: not whole 16-byte chunks, or wider than 128.
  for (const int64_t HS : {5, 136})
    AttentionCase(Dtype::kBF16, 1, HS, {35}, {MaskKind::kCausal}).check("bf16, HS = " + std::to_string(HS));
  AttentionCase(Dtype::kF32, 1, 33, {35}, {MaskKind::kCausal}).check("fp32, HS = 33");
}

// A query's output must not depend on its neighbours in the tile, on the batch, or on keys beyond its own
// mask.
DN_TEST(cuda_attention_rows_do_not_depend_on_the_batch) {
  AttentionCase alone(Dtype::kBF16, 1, 32, {70}, {MaskKind::kBlockCausal});
  AttentionCase batch(Dtype::kBF16, 1, 32, {70, 30, 90}, {MaskKind::kBlockCausal, MaskKind::kFull});
  emulate_seed(5);
  alone.forward();
  alone.backward();
  batch.forward();
  batch.backward();
  const std::vector<float> a = alone.out->get(), b = batch.out->get();
  CHECK(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
  const std::vector<float> da = alone.dqkv->get(), db = batch.dqkv->get();
  CHECK(std::memcmp(da.data(), db.data(), da.size() * sizeof(float)) == 0);
  // Again, in another order of threads and blocks: the same bits.
  emulate_seed(6);
  batch.forward();
  batch.backward();
  CHECK(batch.out->get() == b);
  CHECK(batch.dqkv->get() == db);
}

// Few queries against keys in a cache, and a sequence without one beside it.
DN_TEST(cuda_attention_cache_and_query_subset) {
  for (const Dtype dtype : {Dtype::kBF16, Dtype::kF32}) {
    Backend& device = backend(dtype);
    const int64_t HS = 32, C = HS, keys = 90;
    Array kv(device, dtype, keys, 2 * C, random_values(keys * 2 * C, 3));
    const std::unique_ptr<Buffer> cache = device.alloc(device.kv_cache_bytes(keys, C));
    device.kv_cache_write(cache->data(), 0, kv.tensor().slice(0, 70), 1);
    device.kv_cache_write(cache->data(), 70, kv.tensor().slice(70, keys - 70), 1);
    const std::vector<int32_t> positions{80, 3, 41, 0, 1};
    const int64_t Nq = 5;
    Array qkv(device, dtype, Nq, 3 * C, random_values(Nq * 3 * C, 5)), out(device, dtype, Nq, C);
    AttentionSequence cached, plain;
    cached.q_begin = 0;
    cached.q_end = 3;
    cached.k_len = keys;
    cached.cache = cache->data();
    cached.mask = mask_of(MaskKind::kCausal);
    plain.q_begin = plain.kv_begin = 3;
    plain.q_end = 5;
    plain.k_len = 2;
    const AttentionSequence sequences[] = {cached, plain};
    device.attention_forward(out.tensor(), Tensor(), qkv.tensor().columns(0, C),
                             qkv.tensor().columns(C, 2 * C), sequences, 2, positions.data(), 1);
    Doubles expected(idx(Nq * C), 0);
    for (int64_t n = 0; n < Nq; ++n) {
      const bool in_cache = n < 3;
      const int64_t count = in_cache ? keys : 2;
      Doubles w(idx(count), 0);
      double sum = 0;
      for (int64_t j = 0; j < count; ++j) {
        if (in_cache && j > positions[idx(n)]) continue;
        double score = 0;
        for (int64_t d = 0; d < C; ++d)
          score += static_cast<double>(qkv.host()[idx(n * 3 * C + d)]) *
                   static_cast<double>(in_cache ? kv.host()[idx(j * 2 * C + d)]
                                                : qkv.host()[idx((3 + j) * 3 * C + C + d)]);
        sum += w[idx(j)] = std::exp(score / std::sqrt(static_cast<double>(HS)));
      }
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t d = 0; d < C; ++d)
          expected[idx(n * C + d)] +=
              w[idx(j)] / sum *
              static_cast<double>(in_cache ? kv.host()[idx(j * 2 * C + C + d)]
                                           : qkv.host()[idx((3 + j) * 3 * C + 2 * C + d)]);
      }
    }
    CHECK_ERROR(out.get(), expected, tolerance(dtype), std::string("cache, ") + dtype_name(dtype));
  }
}

}  // namespace
}  // namespace dn::cuda_test
