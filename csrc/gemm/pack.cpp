#include <cmath>
#include <cstring>

#include "gemm/codes.h"

namespace quernstone::gemm {
namespace {

// To the nearest, ties to even
std::uint16_t narrow(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

float weight(Format format, const Block& block, std::int64_t row, std::int64_t input) {
    switch (format) {
        case Format::kBf16:
            return bf16_weight(block, row, input);
        case Format::kInt8:
            return static_cast<float>(int8_code(block, row, input)) * int8_scale(block, row);
        case Format::kInt4:
            return static_cast<float>(int4_code(block, row, input)) * int4_scale(block, row, input);
    }
    return 0.0F;
}

}  // namespace

Status check(const Layout& layout) noexcept {
    if (layout.rows < 1 || layout.rows > kMaxSide) {
        return invalid("rows", layout.rows, "1 to", kMaxSide);
    }
    if (layout.inputs < 1 || layout.inputs > kMaxSide) {
        return invalid("inputs", layout.inputs, "1 to", kMaxSide);
    }
    if (layout.format == Format::kInt4) {
        if (layout.group != 32 && layout.group != 64 && layout.group != 128) {
            return invalid("group", layout.group, "32, 64 or 128");
        }
        return {};
    }
    if (layout.group != 0) {
        return invalid("group", layout.group, "0: only int4 weights are scaled by groups");
    }
    if (layout.zero_points) {
        return invalid("zero_points", 1, "none: only int4 weights have zero points");
    }
    return {};
}

Status pack(const Layout& layout, const Codes& from, std::byte* to) noexcept {
    QS_TRY(check(layout));
    if (layout.format == Format::kBf16) {
        return invalid("format", "bf16", "int8 or int4");
    }
    const bool int4 = layout.format == Format::kInt4;
    const std::int64_t groups = int4 ? layout.padded_inputs() / layout.group : 1;
    QS_TRY(same("codes.shape[0]", from.codes.extent[0], "", layout.rows));
    QS_TRY(same("codes.shape[1]", from.codes.extent[1], "", layout.inputs));
    QS_TRY(same("scales.shape[0]", from.scales.extent[0], "", layout.rows));
    QS_TRY(same("scales.shape[1]", from.scales.extent[1], "", groups));
    if (from.zero_points.present() != layout.zero_points) {
        return invalid("zero_points", layout.zero_points ? "none" : "some",
                       layout.zero_points ? "one per group" : "none");
    }
    if (layout.zero_points) {
        QS_TRY(same("zero_points.shape[0]", from.zero_points.extent[0], "", layout.rows));
        QS_TRY(same("zero_points.shape[1]", from.zero_points.extent[1], "", groups));
    }
    const int least = int4 ? 0 : -127;
    const int most = int4 ? 15 : 127;
    for (std::int64_t n = 0; n < layout.rows; ++n) {
        for (std::int64_t g = 0; g < groups; ++g) {
            if (!std::isfinite(*from.scales.at(n, g))) {
                return invalid("scales", "a number that is not finite", "finite numbers");
            }
            if (layout.zero_points && *from.zero_points.at(n, g) > 15) {
                return invalid("zero_points", *from.zero_points.at(n, g), "0 to 15");
            }
        }
        for (std::int64_t k = 0; k < layout.inputs; ++k) {
            const int code = *from.codes.at(n, k);
            if (code < least || code > most) {
                return invalid("codes", code, int4 ? "0 to 15" : "-127 to 127");
            }
        }
    }
    std::memset(to, 0, static_cast<std::size_t>(layout.bytes()));
    for (std::int64_t n = 0; n < layout.blocks() * kRows; ++n) {
        std::byte* block = to + n / kRows * layout.block_bytes();
        const std::int64_t row = n % kRows;
        const bool real = n < layout.rows;
        std::byte* scales = block + layout.code_bytes();
        std::byte* zeros = scales + layout.scale_bytes();
        for (std::int64_t g = 0; g < groups; ++g) {
            const float scale = real ? *from.scales.at(n, g) : 0.0F;
            if (int4) {
                write(scales + 2 * (g * kRows + row), narrow(scale));
                if (layout.zero_points) {
                    zeros[g * kRows + row] =
                        std::byte{real ? *from.zero_points.at(n, g) : std::uint8_t{0}};
                }
            } else {
                write(scales + 4 * row, scale);
            }
        }
        for (std::int64_t k = 0; k < layout.padded_inputs(); ++k) {
            const bool inside = real && k < layout.inputs;
            if (int4) {
                const unsigned zero = layout.zero_points
                                          ? (real ? *from.zero_points.at(n, k / layout.group) : 0U)
                                          : 8U;
                const unsigned code = inside ? static_cast<unsigned>(*from.codes.at(n, k)) : zero;
                block[int4_place(row, k)] |= static_cast<std::byte>(code << int4_shift(k));
            } else {
                const int code = inside ? *from.codes.at(n, k) : 0;
                block[int8_place(row, k)] = static_cast<std::byte>(code + 128);
            }
        }
    }
    return {};
}

Status pack(const Layout& layout, View<const bf16, 2> from, std::byte* to) noexcept {
    QS_TRY(check(layout));
    if (layout.format != Format::kBf16) {
        return invalid("format", "int8 or int4", "bf16");
    }
    QS_TRY(same("weights.shape[0]", from.extent[0], "", layout.rows));
    QS_TRY(same("weights.shape[1]", from.extent[1], "", layout.inputs));
    std::memset(to, 0, static_cast<std::size_t>(layout.bytes()));
    for (std::int64_t n = 0; n < layout.rows; ++n) {
        std::byte* block = to + n / kRows * layout.block_bytes();
        for (std::int64_t k = 0; k < layout.inputs; ++k) {
            write(block + bf16_place(n % kRows, k), from.at(n, k)->bits);
        }
    }
    return {};
}

Status unpack(const Matrix& matrix, View<float, 2> to) noexcept {
    const Layout& layout = matrix.layout;
    QS_TRY(check(layout));
    QS_TRY(same("to.shape[0]", to.extent[0], "", layout.rows));
    QS_TRY(same("to.shape[1]", to.extent[1], "", layout.inputs));
    for (std::int64_t n = 0; n < layout.rows; ++n) {
        const Block block = blocks_at(layout, matrix.block(n / kRows), 1);
        const std::int64_t row = n % kRows;
        for (std::int64_t k = 0; k < layout.inputs; ++k) {
            *to.at(n, k) = weight(layout.format, block, row, k);
        }
    }
    return {};
}

}  // namespace quernstone::gemm
