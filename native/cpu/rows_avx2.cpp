// rows.inl compiled for AVX2 and FMA; nothing on other machines, where nobody asks for it.
#if defined(__x86_64__) || defined(_M_X64)
#include "cpu/rows.inl"

namespace dn::cpu {

const RowsKernels kRowsAvx2 = {
    accumulate, layernorm_forward, layernorm_backward, gelu_backward,     adamw,   sum_of_squares,
    clear,      exp_each,          softmax_exp_each,   softmax_exp2_each, log_each};

}  // namespace dn::cpu

#endif
