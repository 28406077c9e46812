// attention.inl compiled for AVX2 and FMA; nothing on other machines, where nobody asks for it.
#if defined(__x86_64__) || defined(_M_X64)
#include "cpu/attention.inl"

namespace dn::cpu {

const AttentionKernels kAttentionAvx2 = {
    {kVectorRows, 1, sizeof(float), 1, kVectorScores, 0, forward_begin<ChainScores>,
     forward_block<ChainScores>, forward_end},
    backward_begin,
    backward_keys,
    backward_block,
    backward_keys_end,
    backward_end,
    annealed_word};

}  // namespace dn::cpu

#endif
