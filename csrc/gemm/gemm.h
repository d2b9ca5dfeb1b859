#pragma once

#include <cstddef>
#include <cstdint>

#include "common/bf16.h"
#include "common/round.h"
#include "common/status.h"
#include "common/view.h"

// Products with packed weights on the CPU: out[t, n] = sum over k of x[t, k] w[n, k].
// See README.md for the layout and the arithmetic.
//
// Axes: t tokens, n outputs (rows of the weights), k inputs.
namespace quernstone::gemm {

inline constexpr std::int64_t kRows = 16;        // outputs of a block
inline constexpr std::int64_t kAlign = 64;       // bytes, of a block and of its parts
inline constexpr std::int64_t kScaleGroup = 32;  // inputs that share an activation's scale
inline constexpr std::int64_t kMaxSide = std::int64_t{1} << 24;

enum class Format : std::uint8_t { kBf16, kInt8, kInt4 };

// What activations are multiplied as. kInt8 takes int8 or int4 weights. kMixed: as bf16, with weights
// of bf16, where a level has tiles for it and kManyTokens or more share the weights; the others as
// int8, with weights of bf16 as float.
enum class Compute : std::uint8_t { kFloat, kInt8, kMixed };
inline constexpr std::int64_t kManyTokens = 64;

struct Layout {
    Format format = Format::kBf16;
    std::int64_t rows = 0;     // n
    std::int64_t inputs = 0;   // k
    std::int64_t group = 0;    // inputs that share a weight's scale: int4 32, 64 or 128; else 0
    bool zero_points = false;  // int4 only; without, code 8 is zero

    [[nodiscard]] constexpr std::int64_t blocks() const noexcept { return divide_up(rows, kRows); }
    // Inputs up to the end of the last group; codes beyond `inputs` are those of zero.
    [[nodiscard]] constexpr std::int64_t padded_inputs() const noexcept {
        return round_up(inputs, format == Format::kInt4 ? group : kScaleGroup);
    }
    [[nodiscard]] constexpr std::int64_t code_bytes() const noexcept {
        const std::int64_t codes = kRows * padded_inputs();
        return format == Format::kBf16 ? 2 * codes : format == Format::kInt8 ? codes : codes / 2;
    }
    [[nodiscard]] constexpr std::int64_t scale_bytes() const noexcept {
        return format == Format::kBf16   ? 0
               : format == Format::kInt8 ? kRows * std::int64_t{sizeof(float)}
                                         : kRows * 2 * (padded_inputs() / group);
    }
    [[nodiscard]] constexpr std::int64_t zero_bytes() const noexcept {
        return zero_points ? kRows * (padded_inputs() / group) : 0;
    }
    [[nodiscard]] constexpr std::int64_t block_bytes() const noexcept {
        return round_up(code_bytes() + scale_bytes() + zero_bytes(), kAlign);
    }
    [[nodiscard]] constexpr std::int64_t bytes() const noexcept { return blocks() * block_bytes(); }
};

[[nodiscard]] Status check(const Layout& layout) noexcept;

struct Matrix {
    Layout layout;
    const std::byte* data = nullptr;  // layout.bytes(), aligned to kAlign

    [[nodiscard]] const std::byte* block(std::int64_t index) const noexcept {
        return data + index * layout.block_bytes();
    }
};

// Codes as quantisers make them, one byte each, to packed blocks. int8: -127..127; int4: 0..15.
struct Codes {
    View<const std::int8_t, 2> codes;         // [n, k]
    View<const float, 2> scales;              // [n, 1] or [n, groups]; int4's are rounded to bf16
    View<const std::uint8_t, 2> zero_points;  // [n, groups] 0..15; absent: 8
};
[[nodiscard]] Status pack(const Layout& layout, const Codes& from, std::byte* to) noexcept;
[[nodiscard]] Status pack(const Layout& layout, View<const bf16, 2> from, std::byte* to) noexcept;

// The weights as numbers again, for tests and tools.
[[nodiscard]] Status unpack(const Matrix& matrix, View<float, 2> to) noexcept;

// x and out are contiguous along their last axis. A token's result depends on that token alone, with
// kMixed on whether the call has kManyTokens too.
[[nodiscard]] Status multiply(const Matrix& w, View<const float, 2> x, Compute compute,
                              View<float, 2> out, int threads) noexcept;

}  // namespace quernstone::gemm
