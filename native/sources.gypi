{
  "variables": {
    "core_sources": [
      "native/core/batch_plan.cpp",
      "native/core/denoise_row.cpp",
      "native/core/divergence.cpp",
      "native/core/json.cpp",
      "native/core/model.cpp",
      "native/core/model_decode.cpp",
      "native/core/model_loop.cpp",
      "native/core/model_training.cpp",
      "native/core/noise.cpp",
      "native/core/page_pool.cpp",
      "native/core/pages.cpp",
      "native/core/parameter_file.cpp",
      "native/core/parameter_table.cpp",
      "native/core/params.cpp",
      "native/core/quantise.cpp",
      "native/core/safetensors.cpp",
      "native/core/safetensors_writer.cpp"
    ],
    "cpu_sources": [
      "native/cpu/attention.cpp",
      "native/cpu/attention_portable.cpp",
      "native/cpu/backend_cpu.cpp",
      "native/cpu/gemm.cpp",
      "native/cpu/gemm_chunk.cpp",
      "native/cpu/gemm_bf16.cpp",
      "native/cpu/gemm_int8.cpp",
      "native/cpu/gemm_int8_portable.cpp",
      "native/cpu/gemm_pairs.cpp",
      "native/cpu/gemm_portable.cpp",
      "native/cpu/head.cpp",
      "native/cpu/head_portable.cpp",
      "native/cpu/head_row.cpp",
      "native/cpu/isa.cpp",
      "native/cpu/matmul.cpp",
      "native/cpu/packed_weight.cpp",
      "native/cpu/rows.cpp",
      "native/cpu/rows_portable.cpp",
      "native/cpu/thread_pool.cpp",
      "native/cpu/cores.cpp"
    ],
    "cpu_avx2_sources": [
      "native/cpu/attention_avx2.cpp",
      "native/cpu/gemm_avx2.cpp",
      "native/cpu/gemm_int8_avx2.cpp",
      "native/cpu/head_avx2.cpp",
      "native/cpu/rows_avx2.cpp"
    ],
    "cpu_avx512_sources": [
      "native/cpu/attention_avx512.cpp",
      "native/cpu/attention_pairs_avx512.cpp",
      "native/cpu/gemm_avx512.cpp",
      "native/cpu/gemm_int8_avx512.cpp",
      "native/cpu/gemm_pairs_avx512.cpp",
      "native/cpu/head_avx512.cpp",
      "native/cpu/rows_avx512.cpp"
    ],
    "cpu_amx_sources": [
      "native/cpu/attention_amx.cpp",
      "native/cpu/gemm_bf16_amx.cpp",
      "native/cpu/gemm_bf16_avx512.cpp",
      "native/cpu/gemm_int8_amx.cpp",
      "native/cpu/gemm_split_rows.cpp"
    ],
    "addon_sources": [
      "native/addon/addon.cpp",
      "native/addon/model_parameters.cpp",
      "native/addon/model_wrap.cpp",
      "native/addon/requests.cpp"
    ],
    "no_cuda_sources": [
      "native/core/no_cuda.cpp"
    ],
    "cuda_sources": [
      "cuda/adamw.cu",
      "cuda/attention.cu",
      "cuda/attention_any.cu",
      "cuda/attention_backward.cu",
      "cuda/backend_attention.cu",
      "cuda/backend_cuda.cu",
      "cuda/backend_head.cu",
      "cuda/backend_loop.cu",
      "cuda/backend_ops.cu",
      "cuda/cublaslt.cu",
      "cuda/embedding.cu",
      "cuda/gemm.cu",
      "cuda/gemm_any.cu",
      "cuda/head.cu",
      "cuda/head_fused.cu",
      "cuda/head_tiles.cu",
      "cuda/layernorm.cu",
      "cuda/loop.cu",
      "cuda/memory.cu",
      "cuda/rows.cu"
    ],
    "cuda_runtime_sources": [
      "cuda/runtime.cu"
    ],
    "cuda_emulator_sources": [
      "cuda/emulator/emulator.cpp",
      "cuda/emulator/runtime.cpp"
    ],
    "cuda_test_sources": [
      "cuda/test/test_attention.cpp",
      "cuda/test/test_checkpoint.cpp",
      "cuda/test/test_cublaslt.cpp",
      "cuda/test/test_emulator.cpp",
      "cuda/test/test_graphs.cpp",
      "cuda/test/test_head.cpp",
      "cuda/test/test_head_fused.cpp",
      "cuda/test/test_loop.cpp",
      "cuda/test/test_memory.cpp",
      "cuda/test/test_model.cpp",
      "cuda/test/test_planted.cpp",
      "cuda/test/test_products.cpp",
      "cuda/test/test_rows.cpp"
    ],
    "cuda_fake_sources": [
      "cuda/test/fake_cublaslt.cpp"
    ],
    "cuda_bench_sources": [
      "native/bench/bench_gpu.cpp"
    ],
    "amx_emulator_sources": [
      "native/test/amx/attention_amx.cpp",
      "native/test/amx/gemm_bf16_amx.cpp",
      "native/test/amx/gemm_int8_amx.cpp",
      "native/test/amx/isa.cpp"
    ],
    "bench_sources": [
      "native/bench/bench_forward.cpp",
      "native/bench/bench_gemm.cpp",
      "native/bench/bench_int8.cpp",
      "native/bench/bench_machine.cpp",
      "native/bench/bench_train.cpp"
    ],
    "test_sources": [
      "native/test/fuzz_safetensors.cpp",
      "native/test/main.cpp",
      "native/test/test_attention.cpp",
      "native/test/test_attention_bits.cpp",
      "native/test/test_attention_pairs.cpp",
      "native/test/test_bf16_weights.cpp",
      "native/test/test_decode.cpp",
      "native/test/test_divergence.cpp",
      "native/test/test_half.cpp",
      "native/test/test_head.cpp",
      "native/test/test_head_denoise.cpp",
      "native/test/test_int8.cpp",
      "native/test/test_int8_model.cpp",
      "native/test/test_json.cpp",
      "native/test/test_layernorm.cpp",
      "native/test/test_matmul.cpp",
      "native/test/test_matmul_uses.cpp",
      "native/test/test_model.cpp",
      "native/test/test_model_cache.cpp",
      "native/test/test_model_parameters.cpp",
      "native/test/test_noise.cpp",
      "native/test/test_noise_schedules.cpp",
      "native/test/test_noise_statistics.cpp",
      "native/test/test_page_pool.cpp",
      "native/test/test_rng.cpp",
      "native/test/test_rows.cpp",
      "native/test/test_safetensors.cpp",
      "native/test/test_sampling.cpp",
      "native/test/test_sampling_filters.cpp",
      "native/test/test_scratch.cpp",
      "native/test/test_pairs.cpp",
      "native/test/test_split.cpp",
      "native/test/test_thread_pool.cpp",
      "native/test/test_training.cpp",
      "native/test/test_training_gradients.cpp",
      "native/test/test_training_rows.cpp"
    ]
  }
}
