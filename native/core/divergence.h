// How far a step's distributions are from the step before, for backends whose logits are not in host memory;
// the CPU's head finds out while it has them (cpu/head_row.cpp).
#pragma once

#include "core/model.h"

namespace dn {

// DenoiseStats::divergence of a row from its logits (V), which are overwritten, and those of its guide (null:
// none), all in host memory. row.keep is given.
float update_divergence(const DenoiseRow& row, float* logits, const float* guide, int64_t V);

// The same for those of R rows that have a `keep`, with logits asked of the model's last forward.
void set_divergences(Model& model, DenoiseStats* stats, const DenoiseRow* rows, int64_t R);

}  // namespace dn
