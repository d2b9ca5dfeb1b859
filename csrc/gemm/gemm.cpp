#include "gemm/gemm.h"

#include <algorithm>
#include <array>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "gemm/tokens.h"

namespace quernstone::gemm {

const Kernels& active_kernels() noexcept {
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kBaseline:
            return baseline::kKernels;
        case Isa::kAvx2:
            return avx2::kKernels;
        case Isa::kAvx512:
            return avx512::kKernels;
        case Isa::kAvx512Bf16Vnni:
            return avx512_bf16_vnni::kKernels;
        case Isa::kAvx512Amx:
            return avx512_amx::kKernels;
    }
#endif
    return baseline::kKernels;
}

Block blocks_at(const Layout& layout, const std::byte* data, std::int64_t count) noexcept {
    const std::byte* scales = data + layout.code_bytes();
    const int shift = layout.group == 128 ? 2 : layout.group == 64 ? 1 : 0;
    const std::byte* zeros = layout.zero_points ? scales + layout.scale_bytes() : nullptr;
    return {data, scales, zeros, layout.block_bytes(), shift, count};
}

Status multiply(const Matrix& w, View<const float, 2> x, Compute compute, View<float, 2> out,
                int threads) noexcept {
    const Layout& layout = w.layout;
    QS_TRY(check(layout));
    const std::int64_t tokens = x.extent[0];
    QS_TRY(same("x.shape[1]", x.extent[1], "", layout.inputs));
    QS_TRY(same("out.shape[0]", out.extent[0], "", tokens));
    QS_TRY(same("out.shape[1]", out.extent[1], "", layout.rows));
    if (compute == Compute::kInt8 && layout.format == Format::kBf16) {
        return invalid("compute", "int8", "float or mixed with bf16 weights");
    }
    if (tokens == 0) {
        return {};
    }
    const std::int64_t padded = layout.padded_inputs();
    const Kernels& kernels = active_kernels();
    const Operand operand = kernels.operand(layout.format, compute, tokens);
    const std::size_t bytes = TokenRoom::bytes(tokens, padded, operand);
    Scratch& scratch = Scratch::of_this_thread();
    std::byte* memory = scratch.reserve(bytes);
    if (memory == nullptr) {
        return no_memory("activations", static_cast<std::int64_t>(bytes));
    }
    const BlocksTimesTokens product = kernels.pick(layout.format, operand);
    const TokenRoom room(memory, tokens, padded, operand);
    parallel_for(tokens, tokens * padded < 16384 ? 1 : threads, [&](std::int64_t t) noexcept {
        room.put_token(kernels, t, x.at(t, 0), layout.inputs);
    });
    const std::int64_t blocks = layout.blocks();
    // Blocks begin..end times all tokens, so many of both at once, which is room for their products.
    const auto some_blocks = [&]<std::int64_t kChunk, std::int64_t kFloats>(
                                 std::int64_t begin, std::int64_t end, std::int64_t most) noexcept {
        alignas(kAlign) std::array<float, kFloats> tile;
        for (std::int64_t b = begin; b < end; b += most) {
            const std::int64_t some = std::min(most, end - b);
            const Block block = blocks_at(layout, w.block(b), some);
            for (std::int64_t t0 = 0; t0 < tokens; t0 += kChunk) {
                const std::int64_t count = std::min(kChunk, tokens - t0);
                product(block, room.part(t0, count), tile.data());
                for (std::int64_t i = 0; i < some; ++i) {
                    const std::int64_t row = (b + i) * kRows;
                    const std::int64_t rows = std::min(kRows, layout.rows - row);
                    for (std::int64_t t = 0; t < count; ++t) {
                        std::copy_n(tile.data() + (i * count + t) * kRows, rows,
                                    out.at(t0 + t, row));
                    }
                }
            }
        }
    };
    const bool wide = operand == Operand::kBf16;
    const std::int64_t share = std::max<std::int64_t>(1, blocks / (std::int64_t{16} * threads));
    const std::int64_t run =
        wide ? std::min(round_up(share, kWideBlocks), divide_up(blocks, threads)) : share;
    parallel_for(divide_up(blocks, run), threads, [&](std::int64_t task) noexcept {
        const std::int64_t begin = task * run;
        const std::int64_t end = std::min(blocks, begin + run);
        if (wide) {
            some_blocks.operator()<kWideTokens, kWideFloats>(begin, end, kWideBlocks);
        } else {
            some_blocks.operator()<kTokenChunk, kTileFloats>(begin, end, blocks_at_once(tokens));
        }
    });
    scratch.release_large();
    return {};
}

}  // namespace quernstone::gemm
