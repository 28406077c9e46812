// The random bits of annealed attention on vectors: Philox (core/attention_mask.h) for many counters at once.
// Everything has internal linkage.
#include "cpu/simd.inl"

namespace dn::cpu {
namespace {

#if defined(__AVX512F__)

// The bits of 32 keys: eight Philox counters, one in each 64-bit lane. A word is the low half of its lane;
// what the high half holds never reaches a low one, because the products read low halves only.
inline uint32_t annealed_half(__m512i c0, uint32_t q, uint32_t step, uint32_t stream, uint64_t seed,
                              uint32_t threshold) {
  __m512i c1 = _mm512_set1_epi64(q), c2 = _mm512_set1_epi64(step), c3 = _mm512_set1_epi64(stream);
  const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  DN_UNROLL for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(m0, c0), p1 = _mm512_mul_epu32(m1, c2);
    c0 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p1, 32), c1), _mm512_set1_epi64(k0));
    c2 = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(p0, 32), c3), _mm512_set1_epi64(k1));
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m512i low = _mm512_set1_epi64(0xFFFFFFFF), limit = _mm512_set1_epi64(threshold);
  const __m512i words[4] = {c0, c1, c2, c3};
  __m512i bits = _mm512_setzero_si512();
  DN_UNROLL for (int i = 0; i < 4; ++i) {
    const __mmask8 on = _mm512_cmplt_epu64_mask(_mm512_and_si512(words[i], low), limit);
    bits = _mm512_or_si512(bits, _mm512_maskz_set1_epi64(on, 1 << i));
  }
  bits = _mm512_sllv_epi64(bits, _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28));
  return static_cast<uint32_t>(_mm512_reduce_or_epi64(bits));
}

static uint64_t annealed_word(uint64_t seed, uint32_t stream, uint32_t step, uint32_t threshold, uint32_t q,
                              uint32_t k0) {
  const __m512i first =
      _mm512_add_epi64(_mm512_set1_epi64(k0 / 4), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i second = _mm512_add_epi64(first, _mm512_set1_epi64(8));
  return annealed_half(first, q, step, stream, seed, threshold) |
         static_cast<uint64_t>(annealed_half(second, q, step, stream, seed, threshold)) << 32;
}

#else  // AVX2

// The bits of 16 keys: four Philox counters, one in each 64-bit lane; see the AVX-512 form.
inline uint32_t annealed_quarter(__m256i c0, uint32_t q, uint32_t step, uint32_t stream, uint64_t seed,
                                 uint32_t threshold) {
  __m256i c1 = _mm256_set1_epi64x(q), c2 = _mm256_set1_epi64x(step), c3 = _mm256_set1_epi64x(stream);
  const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  DN_UNROLL for (int round = 0; round < 10; ++round) {
    const __m256i p0 = _mm256_mul_epu32(m0, c0), p1 = _mm256_mul_epu32(m1, c2);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1), _mm256_set1_epi64x(k0));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3), _mm256_set1_epi64x(k1));
    c1 = p1;
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const __m256i low = _mm256_set1_epi64x(0xFFFFFFFF), limit = _mm256_set1_epi64x(threshold);
  const __m256i words[4] = {c0, c1, c2, c3};
  uint32_t bits = 0;
  DN_UNROLL for (int i = 0; i < 4; ++i) {
    const __m256i on =
        _mm256_cmpgt_epi64(limit, _mm256_and_si256(words[i], low));  // both below 2^32: signed is fine
    const uint32_t lanes = static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(on)));
    // Lane j becomes bit 4j + i.
    bits |= ((lanes & 1) | (lanes & 2) << 3 | (lanes & 4) << 6 | (lanes & 8) << 9) << i;
  }
  return bits;
}

static uint64_t annealed_word(uint64_t seed, uint32_t stream, uint32_t step, uint32_t threshold, uint32_t q,
                              uint32_t k0) {
  uint64_t word = 0;
  for (uint32_t part = 0; part < 4; ++part) {
    const __m256i counters =
        _mm256_add_epi64(_mm256_set1_epi64x(k0 / 4 + 4 * part), _mm256_setr_epi64x(0, 1, 2, 3));
    word |= static_cast<uint64_t>(annealed_quarter(counters, q, step, stream, seed, threshold))
            << (16 * part);
  }
  return word;
}

#endif

}  // namespace
}  // namespace dn::cpu
