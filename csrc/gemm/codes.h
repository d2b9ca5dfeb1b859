#pragma once

#include <cstring>

#include "gemm/kernel.h"

// Where a weight stands in a block, for what is written one weight at a time. Not for files with
// flags of an instruction set: these functions may be linked in whichever copy comes first.
namespace quernstone::gemm {

constexpr std::int64_t bf16_place(std::int64_t row, std::int64_t input) noexcept {
    return input / 2 * kLine + row * 4 + input % 2 * 2;
}

constexpr std::int64_t int8_place(std::int64_t row, std::int64_t input) noexcept {
    return input / 4 * kLine + row * 4 + input % 4;
}

constexpr std::int64_t int4_place(std::int64_t row, std::int64_t input) noexcept {
    return input / 8 * kLine + row * 4 + input % 4;
}

constexpr int int4_shift(std::int64_t input) noexcept { return input % 8 < 4 ? 0 : 4; }

template <class T>
T read(const std::byte* from) noexcept {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
void write(std::byte* to, T value) noexcept {
    std::memcpy(to, &value, sizeof value);
}

inline float read_bf16(const std::byte* from) noexcept {
    const std::uint32_t bits = std::uint32_t{read<std::uint16_t>(from)} << 16;
    float value = 0.0F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float bf16_weight(const Block& block, std::int64_t row, std::int64_t input) noexcept {
    return read_bf16(block.codes + bf16_place(row, input));
}

inline int int8_code(const Block& block, std::int64_t row, std::int64_t input) noexcept {
    return std::to_integer<int>(block.codes[int8_place(row, input)]) - 128;
}

inline float int8_scale(const Block& block, std::int64_t row) noexcept {
    return read<float>(block.scales + 4 * row);
}

// Code minus zero point
inline int int4_code(const Block& block, std::int64_t row, std::int64_t input) noexcept {
    const std::byte both = block.codes[int4_place(row, input)];
    const int code = std::to_integer<int>((both >> int4_shift(input)) & std::byte{15});
    const std::int64_t group = (input / kScaleGroup) >> block.group_shift;
    const int zero =
        block.zeros == nullptr ? 8 : std::to_integer<int>(block.zeros[group * kRows + row]);
    return code - zero;
}

inline float int4_scale(const Block& block, std::int64_t row, std::int64_t input) noexcept {
    const std::int64_t group = (input / kScaleGroup) >> block.group_shift;
    return read_bf16(block.scales + 2 * (group * kRows + row));
}

}  // namespace quernstone::gemm
