// rows.inl compiled for AVX-512F.
#include "cpu/rows.inl"

namespace dn::cpu {

const RowsKernels kRowsAvx512 = {add,
                                 accumulate,
                                 layernorm_forward,
                                 layernorm_backward,
                                 gelu_forward,
                                 gelu_backward,
                                 adamw,
                                 sum_of_squares,
                                 clear,
                                 exp_each,
                                 softmax_exp_each,
                                 log_each,
                                 tanh_each};

}  // namespace dn::cpu
