#pragma once

#include <cstdint>
#include <span>

#include "common/status.h"

// Codes of 2 to 8 bits one after the other in bytes, the lowest bit first; a code may lie across
// two bytes. The last byte is filled up with zeros.
namespace quernstone::quant {

inline constexpr int kMinBits = 2;
inline constexpr int kMaxBits = 8;

[[nodiscard]] constexpr std::int64_t packed_bytes(std::int64_t codes, int bits) noexcept {
    return (codes * bits + 7) / 8;
}

[[nodiscard]] Status pack_bits(std::span<const std::uint8_t> codes, int bits,
                               std::span<std::uint8_t> packed) noexcept;
[[nodiscard]] Status unpack_bits(std::span<const std::uint8_t> packed, int bits,
                                 std::span<std::uint8_t> codes) noexcept;

}  // namespace quernstone::quant
