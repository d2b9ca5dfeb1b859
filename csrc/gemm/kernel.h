#pragma once

#include <cstdint>

#include "gemm/gemm.h"

// What an instruction-set level gives: blocks of weights times any number of tokens.
namespace quernstone::gemm {

inline constexpr std::int64_t kLine = 64;        // bytes: 4 of every row of a block
inline constexpr std::int64_t kRunInputs = 512;  // of activations in bf16 that lie together

// The parts of the first of `count` packed blocks, one behind the other; a plain struct, since the
// levels share no function.
struct Block {
    const std::byte* codes;
    const std::byte* scales;
    const std::byte* zeros;  // null: code 8 is zero
    std::int64_t bytes;      // of the block: where the next one begins
    int group_shift;         // groups of 32 << group_shift inputs share an int4 scale
    std::int64_t count;
};
[[nodiscard]] Block blocks_at(const Layout& layout, const std::byte* data,
                              std::int64_t count) noexcept;

// What a product takes of activations, see Compute.
enum class Operand : std::uint8_t { kFloat, kInt8, kBf16 };

// Tokens as a level wants them, made by TokenRoom: codes of int8 with a scale per
// kScaleGroup inputs, fp32, or bf16. Inputs beyond `inputs` are 0 up to `padded`.
struct Tokens {
    const std::int8_t* codes;  // [t, padded]
    const float* scales;       // [t, padded / kScaleGroup]
    // Eight times the sum of a group's codes: what the offset 8 of a nibble adds to its product.
    const std::int32_t* sums;  // as scales
    const float* values;       // [t, padded]
    std::int64_t padded;
    std::int64_t count;
    // [runs, t, kRunInputs], `run_stride` numbers between runs: some rows of a run lie side by side.
    const bf16* halves = nullptr;
    std::int64_t run_stride = 0;
};

// Writes out[b][t][0..kRows) for every block and token, rows of kRows floats.
using BlocksTimesTokens = void (*)(const Block& blocks, const Tokens& x, float* out);

struct Kernels {
    BlocksTimesTokens bf16_float, int8_float, int8_int8, int4_float, int4_int8;
    // One token to codes, scales and sums; inputs beyond n count as 0.
    void (*quantize)(const float* x, std::int64_t n, std::int64_t padded, std::int8_t* codes,
                     float* scales, std::int32_t* sums);
    // silu(gate) * up, element by element, in place of gate
    void (*silu_multiply)(float* gate, const float* up, std::int64_t n);

    // By tiles of bf16, and n numbers rounded to it; null where a level has none.
    BlocksTimesTokens bf16_bf16 = nullptr, int8_bf16 = nullptr, int4_bf16 = nullptr;
    void (*narrow)(const float* x, std::int64_t n, bf16* to) = nullptr;

    [[nodiscard]] constexpr BlocksTimesTokens pick(Format format, Operand operand) const noexcept {
        switch (format) {
            case Format::kBf16:
                return operand == Operand::kBf16 ? bf16_bf16 : bf16_float;
            case Format::kInt8:
                return operand == Operand::kBf16   ? int8_bf16
                       : operand == Operand::kInt8 ? int8_int8
                                                   : int8_float;
            case Format::kInt4:
                return operand == Operand::kBf16   ? int4_bf16
                       : operand == Operand::kInt8 ? int4_int8
                                                   : int4_float;
        }
        return nullptr;
    }

    // What so many tokens of a call are multiplied as, however many of them a task takes.
    [[nodiscard]] constexpr Operand operand(Format format, Compute compute,
                                            std::int64_t tokens) const noexcept {
        if (compute == Compute::kMixed && tokens >= kManyTokens && narrow != nullptr) {
            return Operand::kBf16;
        }
        return compute == Compute::kFloat || format == Format::kBf16 ? Operand::kFloat
                                                                     : Operand::kInt8;
    }
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16_vnni {
extern const Kernels kKernels;
}
namespace avx512_amx {
extern const Kernels kKernels;
}

[[nodiscard]] const Kernels& active_kernels() noexcept;

}  // namespace quernstone::gemm
