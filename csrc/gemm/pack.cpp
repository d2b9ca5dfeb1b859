#include <cmath>
#include <cstring>

#include "gemm/gemm.h"

namespace quernstone::gemm {
namespace {

template <class T>
T read(const std::byte* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class T>
void write(std::byte* to, T value) {
    std::memcpy(to, &value, sizeof value);
}

float widen(std::uint16_t half) {
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value = 0.0F;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// To the nearest, ties to even
std::uint16_t narrow(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

std::byte* int4_byte(std::byte* block, std::int64_t row, std::int64_t input) {
    return block + input / 8 * kAlign + row * 4 + input % 4;
}

template <class V>
Status expect_extent(const V& view, std::size_t axis, std::int64_t want, const char* what) {
    return view.extent[axis] == want ? Status{} : invalid(what, view.extent[axis], "", want);
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
    QS_TRY(expect_extent(from.codes, 0, layout.rows, "codes.shape[0]"));
    QS_TRY(expect_extent(from.codes, 1, layout.inputs, "codes.shape[1]"));
    QS_TRY(expect_extent(from.scales, 0, layout.rows, "scales.shape[0]"));
    QS_TRY(expect_extent(from.scales, 1, groups, "scales.shape[1]"));
    if (from.zero_points.present() != layout.zero_points) {
        return invalid("zero_points", layout.zero_points ? "none" : "some",
                       layout.zero_points ? "one per group" : "none");
    }
    if (layout.zero_points) {
        QS_TRY(expect_extent(from.zero_points, 0, layout.rows, "zero_points.shape[0]"));
        QS_TRY(expect_extent(from.zero_points, 1, groups, "zero_points.shape[1]"));
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
                *int4_byte(block, row, k) |= static_cast<std::byte>(code << (k % 8 < 4 ? 0U : 4U));
            } else {
                const int code = inside ? *from.codes.at(n, k) : 0;
                block[k / 4 * kAlign + row * 4 + k % 4] = static_cast<std::byte>(code + 128);
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
    QS_TRY(expect_extent(from, 0, layout.rows, "weights.shape[0]"));
    QS_TRY(expect_extent(from, 1, layout.inputs, "weights.shape[1]"));
    std::memset(to, 0, static_cast<std::size_t>(layout.bytes()));
    for (std::int64_t n = 0; n < layout.rows; ++n) {
        std::byte* block = to + n / kRows * layout.block_bytes() + n % kRows * 4;
        for (std::int64_t k = 0; k < layout.inputs; ++k) {
            write(block + k / 2 * kAlign + k % 2 * 2, from.at(n, k)->bits);
        }
    }
    return {};
}

Status unpack(const Matrix& matrix, View<float, 2> to) noexcept {
    const Layout& layout = matrix.layout;
    QS_TRY(check(layout));
    QS_TRY(expect_extent(to, 0, layout.rows, "to.shape[0]"));
    QS_TRY(expect_extent(to, 1, layout.inputs, "to.shape[1]"));
    for (std::int64_t n = 0; n < layout.rows; ++n) {
        const std::byte* block = matrix.block(n / kRows);
        const std::int64_t row = n % kRows;
        const std::byte* scales = block + layout.code_bytes();
        const std::byte* zeros = scales + layout.scale_bytes();
        for (std::int64_t k = 0; k < layout.inputs; ++k) {
            float value = 0.0F;
            if (layout.format == Format::kBf16) {
                value = widen(read<std::uint16_t>(block + k / 2 * kAlign + row * 4 + k % 2 * 2));
            } else if (layout.format == Format::kInt8) {
                const int code =
                    std::to_integer<int>(block[k / 4 * kAlign + row * 4 + k % 4]) - 128;
                value = static_cast<float>(code) * read<float>(scales + 4 * row);
            } else {
                const std::int64_t at = k / layout.group * kRows + row;
                const std::byte both = block[k / 8 * kAlign + row * 4 + k % 4];
                const int code = std::to_integer<int>(k % 8 < 4 ? both & std::byte{15} : both >> 4);
                const int zero = layout.zero_points ? std::to_integer<int>(zeros[at]) : 8;
                value =
                    static_cast<float>(code - zero) * widen(read<std::uint16_t>(scales + 2 * at));
            }
            *to.at(n, k) = value;
        }
    }
    return {};
}

}  // namespace quernstone::gemm
