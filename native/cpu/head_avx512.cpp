// The head's row kernels for AVX-512 (head.inl). Compiled with flags for it: C headers only, nothing with
// external linkage but the table.

#include "cpu/head_kernels.h"

#if defined(__x86_64__)
#include "cpu/head.inl"

namespace dn::cpu {
const HeadKernels kHeadAvx512 = {scan, exponentiate, keep_above, collect, bounds, mass_above, diverge};
}  // namespace dn::cpu
#else
namespace dn::cpu {
const HeadKernels kHeadAvx512 = {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
}  // namespace dn::cpu
#endif
