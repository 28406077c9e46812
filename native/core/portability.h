// DN_HD marks the small integer functions (random numbers, mask rules, noise) that CPU and CUDA code share,
// so that both sides compute the same bits from one source.
#pragma once

#if defined(__CUDACC__)
#define DN_HD __host__ __device__
#else
#define DN_HD
#endif
