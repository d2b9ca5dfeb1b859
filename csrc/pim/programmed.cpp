#include "pim/programmed.h"

#include <algorithm>
#include <bit>

#include "common/round.h"

namespace quernstone::pim {

std::int64_t Programmed::columns() const noexcept {
    return content == Content::kRowOnes ? divide_up(outputs, banks) : outputs;
}
std::int64_t Programmed::row_tiles() const noexcept { return divide_up(inputs, rows); }
std::int64_t Programmed::padded_rows() const noexcept {
    return round_up(std::min(rows, inputs), kBlock);
}
int Programmed::digit_bits() const noexcept {
    return content == Content::kOnes ? 8 : content == Content::kWeights ? 4 : 6;
}
int Programmed::digits() const noexcept {
    if (content == Content::kOnes) {
        return 1;
    }
    const auto most = static_cast<std::uint64_t>(std::min(banks, outputs) * weight_bits);
    const int bits =
        content == Content::kWeights ? weight_bits : static_cast<int>(std::bit_width(most));
    return std::max(1, (bits + digit_bits() - 1) / digit_bits());
}
int Programmed::peak() const noexcept {
    return content == Content::kOnes
               ? weight_bits
               : std::min((1 << digit_bits()) - 1,
                          content == Content::kWeights ? (1 << weight_bits) - 1 : (1 << 6) - 1);
}
std::int64_t Programmed::columns_per_block() const noexcept { return kBlock / digits(); }
std::int64_t Programmed::blocks() const noexcept {
    return divide_up(columns(), columns_per_block());
}
std::int64_t Programmed::block_bytes() const noexcept {
    return padded_rows() * kBlock * (content == Content::kRowOnes ? 3 : 2);
}
std::int64_t Programmed::bytes() const noexcept {
    return std::max<std::int64_t>(1, row_tiles() * blocks() * block_bytes());
}

Status check(const Programmed& layer) noexcept {
    if (layer.weight_bits < 1 || layer.weight_bits > kMaxBits) {
        return invalid("weight_bits", layer.weight_bits, "1 to", kMaxBits);
    }
    if (layer.rows < 1 || layer.rows > kMaxRows) {
        return invalid("rows", layer.rows, "1 to", kMaxRows);
    }
    if (layer.banks < 1 || layer.banks > kMaxBanks) {
        return invalid("banks", layer.banks, "1 to", kMaxBanks);
    }
    constexpr std::int64_t kMost = std::int64_t{1} << 31;
    if (layer.outputs < 0 || layer.outputs >= kMost) {
        return invalid("outputs", layer.outputs, "0 or more and below", kMost);
    }
    if (layer.inputs < 0 || layer.inputs >= kMost) {
        return invalid("inputs", layer.inputs, "0 or more and below", kMost);
    }
    return {};
}

Status program(const Programmed& layer, const Integers& weights, std::byte* to) noexcept {
    QS_TRY(check(layer));
    QS_TRY(same("weights.shape[0]", weights.count, "", layer.outputs));
    QS_TRY(same("weights.shape[1]", weights.width, "", layer.inputs));
    if (!weights.wide && layer.weight_bits > 8) {
        return invalid("weights: bits of an integer", 8, "at least", layer.weight_bits);
    }
    std::fill_n(to, layer.bytes(), std::byte{0});
    const std::int64_t padded = layer.padded_rows();
    const std::int64_t plane = padded * kBlock;
    const std::int64_t each = layer.columns_per_block();
    const int digits = layer.digits();
    const auto mask =
        static_cast<std::uint32_t>((1U << static_cast<unsigned>(layer.weight_bits)) - 1U);
    const std::uint32_t offset =
        layer.weight_signed ? 1U << static_cast<unsigned>(layer.weight_bits - 1) : 0U;
    const std::int64_t outputs_per_column = layer.content == Content::kRowOnes ? layer.banks : 1;
    for (std::int64_t column = 0; column < layer.columns(); ++column) {
        const std::int64_t o0 = column * outputs_per_column;
        const std::int64_t o1 = std::min(o0 + outputs_per_column, layer.outputs);
        for (std::int64_t i = 0; i < layer.inputs; ++i) {
            std::uint32_t value = 0;
            for (std::int64_t o = o0; o < o1; ++o) {
                const auto w = static_cast<std::uint32_t>(integer(weights, o, i));
                value += layer.content == Content::kWeights
                             ? (w + offset) & mask
                             : static_cast<std::uint32_t>(std::popcount(w & mask));
            }
            const std::int64_t row = i % layer.rows;
            auto* block = reinterpret_cast<std::uint8_t*>(to) +
                          (i / layer.rows * layer.blocks() + column / each) * layer.block_bytes();
            for (int d = 0; d < digits; ++d) {
                const std::int64_t n = column % each * digits + d;
                const auto digit = static_cast<std::uint8_t>(
                    (value >> static_cast<unsigned>(d * layer.digit_bits())) &
                    ((1U << static_cast<unsigned>(layer.digit_bits())) - 1U));
                block[row * kBlock + n % 32 * 2 + n / 32] = digit;
                block[plane + (row / 4 * kBlock + n) * 4 + row % 4] = digit;
                if (layer.content == Content::kRowOnes) {
                    block[2 * plane + n * padded + row] = digit;
                }
            }
        }
    }
    return {};
}

Block block_at(const Programmed& layer, std::int64_t r, std::int64_t b) noexcept {
    const std::int64_t plane = layer.padded_rows() * kBlock;
    const auto* data = reinterpret_cast<const std::uint8_t*>(layer.data) +
                       (r * layer.blocks() + b) * layer.block_bytes();
    const std::int64_t each = layer.columns_per_block();
    const std::int64_t columns = std::min(each, layer.columns() - b * each);
    return {data,
            data + plane,
            data + 2 * plane,
            layer.padded_rows(),
            columns * layer.digits(),
            layer.digits(),
            layer.peak()};
}

}  // namespace quernstone::pim
