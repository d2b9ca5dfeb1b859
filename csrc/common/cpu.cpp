#include "common/cpu.h"

#include <algorithm>
#include <array>
#include <atomic>

#if defined(QS_HAVE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace quernstone {
namespace {

constexpr std::array<std::string_view, kIsaCount> kNames = {"baseline", "avx2", "avx512",
                                                            "avx512_bf16_vnni", "avx512_amx"};

#if defined(QS_HAVE_X86)
constexpr bool bit(unsigned word, int index) { return ((word >> index) & 1U) != 0; }

// AMX's tile registers are 8 kB a thread, which Linux saves for a process that has asked.
[[maybe_unused]] bool tiles_granted([[maybe_unused]] unsigned xcr0) noexcept {
#if defined(__linux__)
    constexpr unsigned kTiles = 0x60000;  // the OS saves their configuration and their data
    constexpr long kRequestPermission = 0x1023;
    constexpr long kTileData = 18;
    return (xcr0 & kTiles) == kTiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

Isa probe() noexcept {
    unsigned a = 0;
    unsigned b = 0;
    unsigned c = 0;
    unsigned d = 0;
    constexpr int kFma = 12;
    constexpr int kOsxsave = 27;
    constexpr int kF16c = 29;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || !bit(c, kOsxsave)) {
        return Isa::kBaseline;
    }
    const bool fma = bit(c, kFma) && bit(c, kF16c);
    unsigned xcr0 = 0;
    unsigned high = 0;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    constexpr unsigned kYmm = 0x06;  // the OS saves xmm and ymm
    constexpr unsigned kZmm = 0xe6;  // ... and opmask and zmm
    if (!fma || (xcr0 & kYmm) != kYmm || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 ||
        !bit(b, 5)) {
        return Isa::kBaseline;
    }
#if defined(QS_EMULATE_AVX512)
    return Isa::kAvx512Amx;
#else
    const unsigned subleaves = a;
    const bool f_dq_bw_vl = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
    if ((xcr0 & kZmm) != kZmm || !f_dq_bw_vl) {
        return Isa::kAvx2;
    }
    const bool vnni = bit(c, 11);
    const bool amx = bit(d, 22) && bit(d, 24) && bit(d, 25) && tiles_granted(xcr0);
    const bool bf16 = subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && bit(a, 5);
    if (!vnni || !bf16) {
        return Isa::kAvx512;
    }
    return amx ? Isa::kAvx512Amx : Isa::kAvx512Bf16Vnni;
#endif
}
#else
Isa probe() noexcept { return Isa::kBaseline; }
#endif

constexpr std::array<Isa, kIsaCount> kAll = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512,
                                             Isa::kAvx512Bf16Vnni, Isa::kAvx512Amx};

std::atomic<Isa>& active() noexcept {
    static std::atomic<Isa> value{available_isas().back()};
    return value;
}

}  // namespace

std::string_view isa_name(Isa isa) noexcept { return kNames[static_cast<std::size_t>(isa)]; }

std::span<const Isa> available_isas() noexcept {
    static const auto count = static_cast<std::size_t>(probe()) + 1;
    return std::span(kAll).first(count);
}

Isa active_isa() noexcept { return active().load(std::memory_order_relaxed); }

bool set_isa(std::string_view name) noexcept {
    for (const Isa isa : available_isas()) {
        if (isa_name(isa) == name) {
            active().store(isa, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace quernstone
