// Instruction set detection: what the CPU has and the operating system saves, and for AMX what Linux grants.

#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace dn::cpu {
namespace {

// Whether the tiles of AMX are those of native/test/amx, in plain C++.
#if defined(DN_AMX_EMULATOR)
constexpr bool kEmulatesAmx = true;
#else
constexpr bool kEmulatesAmx = false;
#endif

// Bit `bit` of register `index` (eax .. edx) of cpuid leaf 7.
bool feature(unsigned subleaf, int index, int bit) {
#if defined(__x86_64__)
  unsigned registers[4] = {};
  if (!__get_cpuid_count(7, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]))
    return false;
  return (registers[index] >> bit & 1u) != 0;
#else
  (void)subleaf, (void)index, (void)bit;
  return false;
#endif
}

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// AMX tiles and bf16, with AVX512_BF16 for the conversions, and leave to use the tile state. Linux grants it
// to the process on request; threads created later inherit it.
bool has_amx() {
  if (!feature(1, 0, 5)) return false;  // AVX512_BF16
  if (kEmulatesAmx) return true;
#if defined(__linux__) && defined(SYS_arch_prctl)
  if (!feature(0, 3, 22) || !feature(0, 3, 24)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kPortable;
  if (!has_avx512()) return Isa::kAvx2;
  return has_amx() ? Isa::kAmx : Isa::kAvx512;
#else
  return Isa::kPortable;
#endif
}

// What DN_PAIRS says of products in pairs.
enum class Pairs { kNever, kWhereFaster, kAlways };

Pairs wanted_pairs() {
  const char* const asked = std::getenv("DN_PAIRS");
  if (asked == nullptr || *asked == '\0') return Pairs::kWhereFaster;
  if (std::strcmp(asked, "0") == 0) return Pairs::kNever;
  if (std::strcmp(asked, "1") == 0) return Pairs::kAlways;
  throw Error(Code::kArgument, std::string("DN_PAIRS is '") + asked + "', expected 0 or 1");
}

// Zen 3 and 4, of which the latter has AVX-512.
bool is_amd_family_19h() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  return (eax >> 8 & 0xf) + (eax >> 20 & 0xff) == 0x19;
#else
  return false;
#endif
}

Isa choose() {
  wanted_pairs();  // refused with the rest
  const char* const forced = std::getenv("DN_ISA");
  if (forced == nullptr || *forced == '\0') return detected_isa();
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (std::strcmp(forced, isa_name(isa)) != 0) continue;
    if (isa > detected_isa()) {
      throw Error(Code::kArgument, std::string("DN_ISA asks for ") + forced +
                                       ", but this machine offers up to " + isa_name(detected_isa()));
    }
    return isa;
  }
  throw Error(Code::kArgument,
              std::string("DN_ISA is '") + forced + "', expected portable, avx2, avx512 or amx");
}

}  // namespace

Isa detected_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  static const Isa isa = choose();  // a throw leaves it unset, so the next call reports again
  return isa;
}

bool has_avx_vnni() {
  static const bool has = detected_isa() >= Isa::kAvx2 && feature(1, 0, 4);
  return has;
}

bool has_avx512_vnni() {
  static const bool has = detected_isa() >= Isa::kAvx512 && feature(0, 2, 11);
  return has;
}

bool has_amx_int8() {
  static const bool has = detected_isa() >= Isa::kAmx && (kEmulatesAmx || feature(0, 3, 25));
  return has;
}

bool has_fast_bf16() {
#if defined(__x86_64__)
  static const bool has = detected_isa() >= Isa::kAvx512 && feature(1, 0, 5) && __builtin_cpu_is("amd");
  return has;
#else
  return false;
#endif
}

bool has_fast_pairs() {
  static const bool has = [] {
    const Pairs wanted = wanted_pairs();
    return detected_isa() >= Isa::kAvx512 &&
           (wanted == Pairs::kWhereFaster ? is_amd_family_19h() : wanted == Pairs::kAlways);
  }();
  return has;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAmx: return "amx";
  }
  return "unknown";
}

}  // namespace dn::cpu
