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
    std::int64_t padded = 0;

    [[nodiscard]] static std::size_t bytes(std::int64_t count, std::int64_t padded,
                                           Compute compute) noexcept {
        const auto numbers = static_cast<std::size_t>(count * padded);
        return aligned(compute == Compute::kInt8 ? numbers : 0) +
               2 * aligned(compute == Compute::kInt8 ? numbers / kScaleGroup * 4 : 0) +
               aligned(compute == Compute::kFloat ? numbers * 4 : 0);
    }

    TokenRoom() = default;
    TokenRoom(std::byte* memory, std::int64_t count, std::int64_t padded_, Compute compute) noexcept
        : padded(padded_) {
        const auto numbers = static_cast<std::size_t>(count * padded);
        if (compute == Compute::kFloat) {
            values = reinterpret_cast<float*>(memory);
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
        const std::int64_t group = begin * (padded / kScaleGroup);
        return {codes + begin * padded, scales + group, sums + group, nullptr, padded, count};
    }

   private:
    [[nodiscard]] static constexpr std::size_t aligned(std::size_t bytes) noexcept {
        return (bytes + kAlign - 1) / kAlign * kAlign;
    }
};

// Tokens whose products with some blocks fit on a task's stack.
inline constexpr std::int64_t kTokenChunk = 64;
inline constexpr std::int64_t kBlockChunk = 8;
inline constexpr std::int64_t kTileFloats = kTokenChunk * kBlockChunk * kRows;

// How many blocks a task multiplies at once: many where one token reads them from memory, some where
// their tokens are prepared once for all.
[[nodiscard]] constexpr std::int64_t blocks_at_once(std::int64_t tokens) noexcept {
    return tokens == 1 ? kTokenChunk : kBlockChunk;
}

}  // namespace quernstone::gemm
