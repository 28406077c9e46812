// What the output head does with one row of logits in memory: the kernels that exist once per instruction
// set, and the statistics and the draw built on them (head_row.cpp), declared here so that tests can feed
// hand-made logits.
//
// This header is included by the files compiled for AVX2 and AVX-512: no STL, no inline functions.
#pragma once

#include <stdint.h>

#include "cpu/isa.h"

namespace dn {
struct DenoiseRow;
struct DenoiseStats;
}  // namespace dn

namespace dn::cpu {

// A row of V logits is summed in tiles of this many ids, tiles together in double. Part of the meaning of a
// seed: the sums of the tiles are the upper level of the inverse CDF.
constexpr int64_t kTileIds = 256;

static constexpr int64_t head_tiles(int64_t n) { return (n + kTileIds - 1) / kTileIds; }

// Exponents below this are treated as probability zero: e^-87 is the smallest power that is still a normal
// fp32 number.
constexpr float kMinExponent = -87.0f;

// Cuts that mass_above tries in one pass.
constexpr int kCuts = 4;

// Every kernel works through x (n) tile by tile; results for a tile depend on nothing else.
struct HeadKernels {
  // tile_max[t] = maximum of tile t, after x = guide + guide_scale * (x - guide) when a guide row is given.
  // False when x then holds a NaN or an infinity (tile_max is meaningless then).
  bool (*scan)(float* tile_max, float* x, const float* guide, float guide_scale, int64_t n);

  // With z = (x - max) * scale, max the maximum of x: mass[i] = e^z, exactly 0 for z < kMinExponent (also for
  // x = -inf). tile_mass[t] = sum of mass; tile_moment[t] = sum of mass * z, when given. mass may be x.
  void (*exponentiate)(float* mass, double* tile_mass, double* tile_moment, const float* x, float max,
                       float scale, int64_t n);

  // tile_max below: the maxima of the tiles of x, which spare reading a tile that has nothing, or null.

  // mass[i] = 0 where x[i] < threshold; tile_mass[t] = sum of what is left. A tile without any keeps its
  // mass: its sum of zero is what counts.
  void (*keep_above)(float* mass, double* tile_mass, const float* x, const float* tile_max, float threshold,
                     int64_t n);

  // Copies (x[i], mass[i]) of every low <= x[i] < high to (values, masses), in order, and returns how many
  // there are; *above = mass of every x[i] >= high. May write 16 elements past the last. values may be x and
  // masses may be mass.
  int64_t (*collect)(float* values, float* masses, double* above, const float* x, const float* mass,
                     const float* tile_max, float low, float high, int64_t n);

  // The least and the greatest of n >= 1 values.
  void (*bounds)(float* least, float* greatest, const float* x, int64_t n);

  // sums[c] = mass of every x[i] >= cuts[c], to about 1e-6 of it (exact for masses 1). No cut is above the
  // one before it.
  void (*mass_above)(double* sums, const float* cuts, const float* x, const float* mass,
                     const float* tile_max, int64_t n);

  // keep = (x - max) - log_total, log probabilities; returns the sum of mass * (keep - before) where mass >
  // 0, or 0 when before is null. x may hold -inf where mass is 0.
  double (*diverge)(float* keep, const float* before, const float* x, const float* mass, float max,
                    float log_total, int64_t n);
};

extern const HeadKernels kHeadPortable;
// On machines other than x86-64 these have no kernels (all null).
extern const HeadKernels kHeadAvx2;
extern const HeadKernels kHeadAvx512;

const HeadKernels& head_kernels(Isa isa);

// Floats of workspace that denoise_row needs, 64-byte aligned.
int64_t denoise_workspace_floats(int64_t V);

// Statistics and draw of one row (core/backend.h, DenoiseStats). logits (V) are overwritten; guide (V) are
// the logits of the unconditional twin, or null. watched (watch_count) receives the probabilities of the ids
// in watch. Returns -1, or the smallest id whose logit (after guidance) is not finite: then nothing was
// written. `row` must have been checked (core/backend.h, denoise_fault).
int64_t denoise_row(DenoiseStats* stats, float* watched, float* logits, const float* guide, int64_t V,
                    const DenoiseRow& row, const int32_t* watch, int64_t watch_count, float* workspace,
                    const HeadKernels& kernels);

// Numbers x (n) with masses, of which some in [low, high] are looked for.
struct Candidates {
  const float* x;
  const float* mass;
  const float* tile_max;  // of x, or null
  int64_t n;
  float low;   // finite
  float high;  // the greatest x
};

// The smallest candidate whose strictly greater ones weigh at most `budget` together; ties stand and fall
// together. With masses 1 and budget k - 1 that is the k-th largest. There must be one. values and masses:
// room for n + 16; they may be x and mass.
float select_threshold(const Candidates& candidates, double budget, float* values, float* masses,
                       const HeadKernels& kernels);

// The id at quantile u of the masses: the first whose running sum exceeds u times the total. Never an id of
// mass zero, for any u in [0, 1]; some mass must be positive.
int32_t draw_from(const float* mass, const double* tile_mass, int64_t V, double u);

}  // namespace dn::cpu
