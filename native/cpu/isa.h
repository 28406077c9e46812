// Which instruction set the kernels use. Chosen once per process from what the CPU and the operating system
// offer; the environment variable DN_ISA (portable, avx2, avx512, amx) forces a lower one.
#pragma once

namespace dn::cpu {

enum class Isa { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };  // each includes the ones before

// Throws Error(kArgument) when DN_ISA names an unknown set or one this machine lacks.
Isa active_isa();
// What the machine offers, DN_ISA aside.
Isa detected_isa();
const char* isa_name(Isa isa);

}  // namespace dn::cpu
