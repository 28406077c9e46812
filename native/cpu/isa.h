// Which instruction set the kernels use. Chosen once per process from what the CPU and the operating system
// offer; the environment variable DN_ISA (portable, avx2, avx512, amx) forces a lower one, DN_PAIRS (0, 1)
// products in pairs or others.
#pragma once

namespace dn::cpu {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };  // each includes the ones before

// Throws Error(kArgument) when DN_ISA names an unknown set or one this machine lacks, or DN_PAIRS is neither
// 0 nor 1.
Isa active_isa();
// What the machine offers, DN_ISA aside.
Isa detected_isa();
const char* isa_name(Isa isa);

// Extensions for int8 products, DN_ISA aside: an instruction set uses them where the machine has them.
bool has_avx_vnni();     // 256-bit VNNI without AVX-512
bool has_avx512_vnni();  // beside kAvx512
bool has_amx_int8();     // beside kAmx
// Beside kAvx512: AVX512_BF16 whose products outrun fp32's (AMD since Zen 4). Intel's do not: with AMX they
// are not needed.
bool has_fast_bf16();
// Beside kAvx512: products and attention's scores in pairs (gemm_kernels.h) outrun others. So they do on Zen
// 4, whose units that add are not those that multiply and add; of other processors it is not known.
// DN_PAIRS=0 and 1 decide it for any.
bool has_fast_pairs();
// Name of the kernels that fp32 products of many numbers use here.
const char* active_fp32();
// Name of the kernels that int8 products of many rows use here (gemm_int8.cpp).
const char* active_int8();
// Name of those that products with bf16 weights use here (gemm_bf16.cpp): "fp32" where they are widened.
const char* active_bf16();

}  // namespace dn::cpu
