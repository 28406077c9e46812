// Counter-based randomness: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011). A number is a pure function of (seed, stream, step, index), so that results do not depend on thread
// count, batch composition or the order of completion, and CPU, CUDA and TypeScript (lib/random.ts) draw the
// same ones.
#pragma once

#include <cstdint>

#include "core/portability.h"

namespace dn {

// What a number is used for. Values are part of the meaning of a seed: never renumber.
enum class Stream : uint32_t {
  kInit = 1,    // weight initialisation: step = parameter index, index = element / 4
  kTime = 2,    // diffusion times: step = training step, index = sequence
  kMask = 3,    // token masks: step = training step, index = (sequence, token), see noise.h
  kAnneal = 4,  // annealed attention: step = training step, index = (q, k)
  kDraw = 5,    // sampled tokens: step = denoising step, index = position
  kOrder = 6,   // which positions a sampler reveals: step = denoising step, index = position
  kData = 7,    // order of training data (TypeScript): step = epoch
  kCount = 8,   // exact-count masks: the number masked, and the keys that choose which
};

struct Philox4 {
  uint32_t v[4];
};

DN_HD inline Philox4 philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = 0xD2511F53ull * c0;
    const uint64_t p1 = 0xCD9E8D57ull * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Philox4{{c0, c1, c2, c3}};
}

// Four numbers of (seed, stream, step, index). Counter words: index low, index high, step, stream.
DN_HD inline Philox4 philox(uint64_t seed, Stream stream, uint32_t step, uint64_t index) {
  return philox4x32(static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), step,
                    static_cast<uint32_t>(stream), static_cast<uint32_t>(seed),
                    static_cast<uint32_t>(seed >> 32));
}

// Uniform in [0, 1) with 53 bits, from two words.
DN_HD inline double uniform53(uint32_t high, uint32_t low) {
  return (static_cast<double>(high >> 5) * 67108864.0 + static_cast<double>(low >> 6)) *
         (1.0 / 9007199254740992.0);
}

// The first uniform of a counter: the usual way to ask for one number.
DN_HD inline double uniform(uint64_t seed, Stream stream, uint32_t step, uint64_t index) {
  const Philox4 r = philox(seed, stream, step, index);
  return uniform53(r.v[0], r.v[1]);
}

}  // namespace dn
