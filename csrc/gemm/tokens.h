#pragma once

#include <cstddef>
#include <cstring>

#include "gemm/kernel.h"

namespace quernstone::gemm {

// Room for tokens as the kernels take them, in memory that the caller owns.
struct TokenRoom {
    std::int8_t* codes = nullptr;
    float* scales = nullptr;
    std::int32_t* sums = nullptr;
    float* values = nullptr;
    bf16* halves = nullptr;
    std::int64_t padded = 0;
    std::int64_t run_stride = 0;

    [[nodiscard]] static std::size_t bytes(std::int64_t count, std::int64_t padded,
                                           Operand operand) noexcept {
        const auto numbers = static_cast<std::size_t>(count * padded);
        switch (operand) {
            case Operand::kFloat:
                return aligned(numbers * sizeof(float));
            case Operand::kInt8:
                return aligned(numbers) + 2 * aligned(numbers / kScaleGroup * sizeof(float));
            case Operand::kBf16:
                return static_cast<std::size_t>(round_up(padded, kRunInputs) * count) *
                       sizeof(bf16);
        }
        return 0;
    }

    TokenRoom() = default;
    TokenRoom(std::byte* memory, std::int64_t count, std::int64_t padded_, Operand operand) noexcept
        : padded(padded_), run_stride(count * kRunInputs) {
        const auto numbers = static_cast<std::size_t>(count * padded);
        if (operand == Operand::kFloat) {
            values = reinterpret_cast<float*>(memory);
            return;
        }
        if (operand == Operand::kBf16) {
            halves = reinterpret_cast<bf16*>(memory);
            return;
        }
        codes = reinterpret_cast<std::int8_t*>(memory);
        memory += aligned(numbers);
        scales = reinterpret_cast<float*>(memory);
        memory += aligned(numbers / kScaleGroup * 4);
        sums = reinterpret_cast<std::int32_t*>(memory);
    }

    // Numbers begin..begin + n of token t; begin a multiple of kScaleGroup. What lies between
    // their end and the end of their last group becomes 0.
    void put(const Kernels& kernels, std::int64_t t, std::int64_t begin, const float* x,
             std::int64_t n) const noexcept {
        const std::int64_t end = round_up(n, kScaleGroup);
        const std::int64_t at = t * padded + begin;
        if (values != nullptr) {
            std::memcpy(values + at, x, static_cast<std::size_t>(n) * sizeof *x);
            std::memset(values + at + n, 0, static_cast<std::size_t>(end - n) * sizeof *x);
            return;
        }
        if (halves != nullptr) {
            each_run(t, begin, n, [&](bf16* to, std::int64_t done, std::int64_t some) {
                kernels.narrow(x + done, some, to);
            });
            put_bf16_zeros(t, begin + n, end - n);
            return;
        }
        kernels.quantize(x, n, end, codes + at, scales + at / kScaleGroup, sums + at / kScaleGroup);
    }

    // The whole row of token t: n numbers, then zeros.
    void put_token(const Kernels& kernels, std::int64_t t, const float* x,
                   std::int64_t n) const noexcept {
        put(kernels, t, 0, x, n);
        put_zeros(t, round_up(n, kScaleGroup));
    }

    // Zeros from `begin`, a multiple of kScaleGroup, to the end of the row.
    void put_zeros(std::int64_t t, std::int64_t begin) const noexcept {
        const std::int64_t at = t * padded + begin;
        const auto n = static_cast<std::size_t>(padded - begin);
        if (values != nullptr) {
            std::memset(values + at, 0, n * sizeof *values);
            return;
        }
        if (halves != nullptr) {
            put_bf16_zeros(t, begin, padded - begin);
            return;
        }
        std::memset(codes + at, 0, n);
        std::memset(scales + at / kScaleGroup, 0, n / kScaleGroup * sizeof *scales);
        std::memset(sums + at / kScaleGroup, 0, n / kScaleGroup * sizeof *sums);
    }

    // Token `from` of another room as token t.
    void copy(std::int64_t t, const TokenRoom& other, std::int64_t from) const noexcept {
        const auto n = static_cast<std::size_t>(padded);
        if (values != nullptr) {
            std::memcpy(values + t * padded, other.values + from * padded, n * sizeof *values);
            return;
        }
        if (halves != nullptr) {
            each_run(t, 0, padded, [&](bf16* to, std::int64_t done, std::int64_t some) {
                const bf16* row = other.halves + done / kRunInputs * other.run_stride;
                std::memcpy(to, row + from * kRunInputs,
                            static_cast<std::size_t>(some) * sizeof *to);
            });
            return;
        }
        const std::int64_t groups = padded / kScaleGroup;
        std::memcpy(codes + t * padded, other.codes + from * padded, n);
        std::memcpy(scales + t * groups, other.scales + from * groups,
                    n / kScaleGroup * sizeof *scales);
        std::memcpy(sums + t * groups, other.sums + from * groups, n / kScaleGroup * sizeof *sums);
    }

    [[nodiscard]] Tokens part(std::int64_t begin, std::int64_t count) const noexcept {
        if (values != nullptr) {
            return {nullptr, nullptr, nullptr, values + begin * padded, padded, count};
        }
        if (halves != nullptr) {
            return {
                nullptr,   nullptr, nullptr, nullptr, padded, count, halves + begin * kRunInputs,
                run_stride};
        }
        const std::int64_t group = begin * (padded / kScaleGroup);
        return {codes + begin * padded, scales + group, sums + group, nullptr, padded, count};
    }

   private:
    // Inputs begin..begin + n of token t by runs: body(where, how many before, how many).
    template <class Body>
    void each_run(std::int64_t t, std::int64_t begin, std::int64_t n,
                  const Body& body) const noexcept {
        for (std::int64_t done = 0; done < n;) {
            const std::int64_t at = begin + done, inside = at % kRunInputs;
            const std::int64_t some =
                inside + n - done < kRunInputs ? n - done : kRunInputs - inside;
            body(halves + at / kRunInputs * run_stride + t * kRunInputs + inside, done, some);
            done += some;
        }
    }

    void put_bf16_zeros(std::int64_t t, std::int64_t begin, std::int64_t n) const noexcept {
        each_run(t, begin, n, [](bf16* to, std::int64_t, std::int64_t some) {
            std::memset(to, 0, static_cast<std::size_t>(some) * sizeof *to);
        });
    }

    [[nodiscard]] static constexpr std::size_t aligned(std::size_t bytes) noexcept {
        return (bytes + kAlign - 1) / kAlign * kAlign;
    }
};

// Tokens whose products with some blocks fit on a task's stack.
inline constexpr std::int64_t kTokenChunk = 64;
inline constexpr std::int64_t kBlockChunk = 8;
inline constexpr std::int64_t kTileFloats = kTokenChunk * kBlockChunk * kRows;

// Where their numbers are expanded for all of a task's tokens, more of both.
inline constexpr std::int64_t kWideTokens = 256;
inline constexpr std::int64_t kWideBlocks = 16;
inline constexpr std::int64_t kWideFloats = kWideTokens * kWideBlocks * kRows;

// How many blocks a task multiplies at once: many where one token reads them from memory, some where
// their tokens are prepared once for all.
[[nodiscard]] constexpr std::int64_t blocks_at_once(std::int64_t tokens) noexcept {
    return tokens == 1 ? kTokenChunk : kBlockChunk;
}

}  // namespace quernstone::gemm
