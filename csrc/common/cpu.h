#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace quernstone {

// Instruction-set levels, each a superset of the one before.
enum class Isa : std::uint8_t { kBaseline, kAvx2, kAvx512, kAvx512Bf16Vnni, kAvx512Amx };
inline constexpr int kIsaCount = 5;

[[nodiscard]] std::string_view isa_name(Isa isa) noexcept;

// The levels that this processor, its operating system and this build have,
// lowest first. Found by CPUID and XGETBV: __builtin_cpu_supports answers no
// to everything under some compilers. Linux is asked for the tiles' registers,
// once, for all threads of the process.
[[nodiscard]] std::span<const Isa> available_isas() noexcept;

// The level that the kernels take: the highest one available until set_isa.
[[nodiscard]] Isa active_isa() noexcept;

// False, and nothing changed, where `name` is unknown or not available.
[[nodiscard]] bool set_isa(std::string_view name) noexcept;

}  // namespace quernstone
