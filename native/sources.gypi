{
  "variables": {
    "core_sources": [
      "native/core/json.cpp",
      "native/core/model.cpp",
      "native/core/model_training.cpp",
      "native/core/no_cuda.cpp",
      "native/core/noise.cpp",
      "native/core/params.cpp",
      "native/core/safetensors.cpp",
      "native/core/safetensors_writer.cpp"
    ],
    "cpu_sources": [
      "native/cpu/attention.cpp",
      "native/cpu/attention_portable.cpp",
      "native/cpu/backend_cpu.cpp",
      "native/cpu/gemm.cpp",
      "native/cpu/gemm_bf16.cpp",
      "native/cpu/gemm_portable.cpp",
      "native/cpu/head.cpp",
      "native/cpu/head_portable.cpp",
      "native/cpu/head_row.cpp",
      "native/cpu/isa.cpp",
      "native/cpu/matmul.cpp",
      "native/cpu/rows.cpp",
      "native/cpu/rows_portable.cpp",
      "native/cpu/thread_pool.cpp"
    ],
    "cpu_avx2_sources": [
      "native/cpu/attention_avx2.cpp",
      "native/cpu/gemm_avx2.cpp",
      "native/cpu/head_avx2.cpp",
      "native/cpu/rows_avx2.cpp"
    ],
    "cpu_avx512_sources": [
      "native/cpu/attention_avx512.cpp",
      "native/cpu/gemm_avx512.cpp",
      "native/cpu/head_avx512.cpp",
      "native/cpu/rows_avx512.cpp"
    ],
    "cpu_amx_sources": [
      "native/cpu/gemm_amx.cpp"
    ],
    "addon_sources": [
      "native/addon/addon.cpp",
      "native/addon/model_wrap.cpp",
      "native/addon/requests.cpp"
    ],
    "cuda_sources": [],
    "bench_sources": [
      "native/bench/bench_forward.cpp",
      "native/bench/bench_gemm.cpp",
      "native/bench/bench_train.cpp"
    ],
    "test_sources": [
      "native/test/fuzz_safetensors.cpp",
      "native/test/main.cpp",
      "native/test/test_attention.cpp",
      "native/test/test_half.cpp",
      "native/test/test_head.cpp",
      "native/test/test_json.cpp",
      "native/test/test_matmul.cpp",
      "native/test/test_model.cpp",
      "native/test/test_noise.cpp",
      "native/test/test_noise_schedules.cpp",
      "native/test/test_rng.cpp",
      "native/test/test_rows.cpp",
      "native/test/test_safetensors.cpp",
      "native/test/test_sampling.cpp",
      "native/test/test_thread_pool.cpp",
      "native/test/test_training.cpp"
    ]
  }
}
