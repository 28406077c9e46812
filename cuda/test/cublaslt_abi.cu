// Compares our declarations of cuBLASLt with NVIDIA's header, where that header is installed. Nothing runs:
// it compiles or it does not (bench/gpu.sh).

#if __has_include(<cublasLt.h>)

#include <cublasLt.h>

#include "cuda/cublaslt.h"

namespace lt = dn::cuda::lt;

static_assert(CUBLAS_COMPUTE_32F == lt::kComputeF32);
static_assert(CUDA_R_32F == lt::kTypeF32 && CUDA_R_16BF == lt::kTypeBF16);
static_assert(CUBLASLT_MATMUL_DESC_TRANSA == lt::kDescTransA &&
              CUBLASLT_MATMUL_DESC_TRANSB == lt::kDescTransB);
static_assert(CUBLASLT_MATMUL_DESC_EPILOGUE == lt::kDescEpilogue);
static_assert(CUBLASLT_MATMUL_DESC_BIAS_POINTER == lt::kDescBiasPointer);
static_assert(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE == lt::kDescBiasType);
static_assert(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES == lt::kPreferenceMaxWorkspace);
static_assert(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES == lt::kPreferenceAlignmentA &&
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES == lt::kPreferenceAlignmentB &&
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES == lt::kPreferenceAlignmentC &&
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES == lt::kPreferenceAlignmentD);
static_assert(CUBLASLT_EPILOGUE_DEFAULT == lt::kEpilogueDefault &&
              CUBLASLT_EPILOGUE_BIAS == lt::kEpilogueBias);
static_assert(CUBLAS_OP_N == lt::kOperationN && CUBLAS_OP_T == lt::kOperationT);
static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(lt::Algorithm));
static_assert(sizeof(cublasLtMatmulHeuristicResult_t) == sizeof(lt::HeuristicResult));
static_assert(offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize) ==
              offsetof(lt::HeuristicResult, workspace_bytes));
static_assert(offsetof(cublasLtMatmulHeuristicResult_t, state) == offsetof(lt::HeuristicResult, state));
static_assert(offsetof(cublasLtMatmulHeuristicResult_t, wavesCount) == offsetof(lt::HeuristicResult, waves));

#else
#error "cublasLt.h was not found"
#endif
