// attention.inl compiled for AVX-512F.
#include "cpu/attention.inl"

namespace dn::cpu {

const AttentionKernels kAttentionAvx512 = {
    {kVectorRows, 1, sizeof(float), 1, kVectorScores, forward_begin, forward_block, forward_end},
    backward_begin,
    backward_keys,
    backward_block,
    backward_keys_end,
    backward_end,
    annealed_word};

}  // namespace dn::cpu
