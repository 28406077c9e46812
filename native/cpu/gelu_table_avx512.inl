// GELU from a table, for the int8 product on AVX-512 and AMX: what it gives is quantised again, so that an
// absolute error is enough. It takes a third of the formula's instructions that multiply, compare or take a
// reciprocal, and permutations, maxima and additions instead, which Zen 4 can start beside its products.
// Everything has internal linkage.
#pragma once

#include "cpu/gemm_avx512.inl"

namespace dn::cpu {
namespace {

// Around i / 2, i = -16 .. 15, GELU is a polynomial of degree 4: kGeluTable[k][i mod 32] is its coefficient
// of (u - i / 2)^k, the minimax one over |u - i / 2| <= 1/4 (that of 0 passes through 0), and 0 and u at the
// ends.
// clang-format off
alignas(64) constexpr float kGeluTable[5][32] = {
    {0, 0.345714062f, 0.841191888f, 1.39957154f, 1.95459771f, 2.48491573f, 2.99636269f, 3.49938369f,
     3.99992967f, 4.49999475f, 5.0f, 5.5f, 6.0f, 6.5f, 7.0f, 7.5f, 0, 0, 0, 0, -8.50758353e-11f,
     -5.94399152e-09f, -2.29372262e-07f, -5.13783289e-06f, -7.02485777e-05f, -0.000616197591f,
     -0.00363737997f, -0.0150842397f, -0.0454022996f, -0.100428492f, -0.158808097f, -0.154285952f},
    {0.5f, 0.867342472f, 1.08294511f, 1.12771404f, 1.08610952f, 1.03795695f, 1.01158452f, 1.00242162f,
     1.0003345f, 1.00002921f, 1.00000155f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 0, 0, 0, -5.86495999e-12f,
     -7.27835292e-10f, -4.54868037e-08f, -1.52706082e-06f, -2.9170862e-05f, -0.000334513868f,
     -0.00242156233f, -0.0115844635f, -0.0379569158f, -0.086109519f, -0.127713993f, -0.0829450563f,
     0.132657513f},
    {0.398925334f, 0.307744175f, 0.121093586f, -0.0152450586f, -0.0539386831f, -0.0381281935f,
     -0.0158864819f, -0.0042747478f, -0.000736482849f, -7.83881696e-05f, -4.92716981e-06f,
     -1.74025729e-07f, -3.27262462e-09f, -3.08482233e-11f, 0, 0, 0, 0, 0, -3.08676765e-11f,
     -3.27265148e-09f, -1.74025814e-07f, -4.92716981e-06f, -7.83881696e-05f, -0.000736482849f,
     -0.0042747478f, -0.0158864819f, -0.0381281935f, -0.0539386831f, -0.0152450586f, 0.121093586f,
     0.307744175f},
    {0, -0.108440869f, -0.11906521f, -0.0568153895f, -0.00161427015f, 0.0160084534f, 0.0115943216f,
     0.00443155179f, 0.0010173429f, 0.000140271848f, 1.12868311e-05f, 5.1021442e-07f, 1.24220723e-08f,
     1.55815902e-10f, 1.13379651e-12f, 0, 0, 0, 0, -1.55799193e-10f, -1.24222144e-08f, -5.10214363e-07f,
     -1.12868311e-05f, -0.000140271848f, -0.0010173429f, -0.00443155179f, -0.0115943216f, -0.0160084534f,
     0.00161427015f, 0.0568153895f, 0.11906521f, 0.108440869f},
    {-0.0659395382f, -0.0333086774f, 0.0197459422f, 0.0348408483f, 0.0180465635f, 0.0012837965f,
     -0.00399373705f, -0.00270599662f, -0.000875085301f, -0.000156883034f, -1.57112827e-05f,
     -8.58624162e-07f, -2.47374228e-08f, -3.5994685e-10f, -4.76654827e-12f, 0, 0, 0, -2.55724196e-12f,
     -3.61070118e-10f, -2.47384069e-08f, -8.5862473e-07f, -1.57112827e-05f, -0.000156883034f,
     -0.000875085301f, -0.00270599662f, -0.00399373705f, 0.0012837965f, 0.0180465635f, 0.0348408483f,
     0.0197459422f, -0.0333086774f}};
// clang-format on

// Within 1.5e-6 of the tanh form, and the rounding of the result. NaN and infinity give NaN, what is
// quantised from either being the same; minus infinity gives 0, and -0 gives +0.
struct TableGelu {
  __m512 low[5], high[5];

  __attribute__((always_inline)) TableGelu() {
#pragma GCC unroll 5
    for (int k = 0; k < 5; ++k) {
      low[k] = _mm512_load_ps(kGeluTable[k]);
      high[k] = _mm512_load_ps(kGeluTable[k] + 16);
      asm("" : "+v"(low[k]), "+v"(high[k]));  // or they would be loaded again for every vector
    }
  }
  __attribute__((always_inline)) __m512 operator()(__m512 u) const {
    const __m512 round = _mm512_set1_ps(0x1.8p22f);            // a sum with it is a whole number of halves
    const __m512 v = _mm512_max_ps(_mm512_set1_ps(-8.0f), u);  // NaN: the second
    const __m512 shifted = _mm512_add_ps(_mm512_min_ps(_mm512_set1_ps(7.5f), v), round);
    const __m512 d = _mm512_sub_ps(v, _mm512_sub_ps(shifted, round));
    const __m512i i = _mm512_castps_si512(shifted);  // its low five bits
    __m512 y = _mm512_permutex2var_ps(low[4], i, high[4]);
#pragma GCC unroll 4
    for (int k = 3; k >= 0; --k) y = _mm512_fmadd_ps(y, d, _mm512_permutex2var_ps(low[k], i, high[k]));
    return y;
  }
};

}  // namespace
}  // namespace dn::cpu
