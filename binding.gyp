{
  'includes': ['native/sources.gypi'],
  'variables': {
    'avx2_flags': ['-mavx2', '-mfma', '-mf16c'],
    'avx512_flags': ['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mfma', '-mprefer-vector-width=512'],
    'amx_flags': ['-mavx512bf16', '-mamx-tile', '-mamx-bf16', '-mamx-int8']
  },
  'target_defaults': {
    'include_dirs': ['native'],
    'cflags': ['-Wall', '-Wextra', '-Wshadow'],
    'cflags_cc': ['-std=c++17', '-O3', '-fvisibility=hidden', '-fexceptions', '-ffp-contract=off'],
    'cflags_cc!': ['-fno-exceptions', '-std=gnu++17', '-std=gnu++20', '-fno-rtti', '-fno-omit-frame-pointer'],
    'cflags!': ['-Wno-unused-parameter'],
    'xcode_settings': {
      'CLANG_CXX_LANGUAGE_STANDARD': 'c++17',
      'GCC_ENABLE_CPP_EXCEPTIONS': 'YES',
      'GCC_OPTIMIZATION_LEVEL': '3',
      'GCC_SYMBOLS_PRIVATE_EXTERN': 'YES',
      'MACOSX_DEPLOYMENT_TARGET': '12.0',
      'OTHER_CPLUSPLUSFLAGS': ['-ffp-contract=off']
    }
  },
  'targets': [
    {
      'target_name': 'dn_cpu_avx2',
      'type': 'static_library',
      'sources': ['<@(cpu_avx2_sources)'],
      'conditions': [['target_arch=="x64"', {
        'cflags_cc': ['<@(avx2_flags)'],
        'xcode_settings': { 'OTHER_CPLUSPLUSFLAGS': ['<@(avx2_flags)'] }
      }]]
    },
    {
      'target_name': 'dn_cpu_avx512',
      'type': 'static_library',
      'sources': ['<@(cpu_avx512_sources)'],
      'conditions': [['target_arch=="x64"', {
        'cflags_cc': ['<@(avx512_flags)'],
        'xcode_settings': { 'OTHER_CPLUSPLUSFLAGS': ['<@(avx512_flags)'] }
      }]]
    },
    {
      'target_name': 'dn_cpu_amx',
      'type': 'static_library',
      'sources': ['<@(cpu_amx_sources)'],
      'conditions': [['target_arch=="x64"', {
        'cflags_cc': ['<@(avx512_flags)', '<@(amx_flags)'],
        'xcode_settings': { 'OTHER_CPLUSPLUSFLAGS': ['<@(avx512_flags)', '<@(amx_flags)'] }
      }]]
    },
    {
      'target_name': 'dn_core',
      'type': 'static_library',
      'dependencies': ['dn_cpu_avx2', 'dn_cpu_avx512', 'dn_cpu_amx'],
      'sources': ['<@(core_sources)', '<@(no_cuda_sources)', '<@(cpu_sources)']
    },
    {
      'target_name': 'diffusion_native',
      'dependencies': ['dn_core', "<!(node -p \"require('node-addon-api').targets\"):node_addon_api_except"],
      'defines': ['NAPI_VERSION=8', 'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS'],
      'cflags!': ['-Wshadow'],
      'sources': ['<@(addon_sources)']
    }
  ]
}
