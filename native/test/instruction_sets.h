// The instruction sets that tests try kernels with.
#pragma once

#include <vector>

#include "cpu/isa.h"

namespace dn::test {

// Those of this machine, at most the widest that the kernels distinguish.
inline std::vector<cpu::Isa> instruction_sets(cpu::Isa widest = cpu::Isa::kAmx) {
  std::vector<cpu::Isa> sets;
  for (const cpu::Isa isa : {cpu::Isa::kPortable, cpu::Isa::kAvx2, cpu::Isa::kAvx512, cpu::Isa::kAmx}) {
    if (isa <= widest && isa <= cpu::detected_isa()) sets.push_back(isa);
  }
  return sets;
}

}  // namespace dn::test
