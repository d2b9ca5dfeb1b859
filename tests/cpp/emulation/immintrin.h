// Stands in for the compiler's <immintrin.h> when the AVX-512 sources are built for a processor
// without AVX-512: SIMDe supplies the intrinsics from AVX2 and plain C, and what SIMDe 0.8.2 lacks
// follows here, after Intel's Intrinsics Guide. The product's sources do not know about it. One
// difference: SIMDe's VDPBF16PS keeps subnormals, the processor's takes them for zero.
#pragma once
#pragma GCC system_header

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <bit>
#include <cstdint>
#include <cstring>

namespace {

template <class To, class From>
To emulated_cast(const From& from) noexcept {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class T>
struct EmulatedLanes {
    T lane[64 / sizeof(T)];
};

// VCVTNEPS2BF16: ties to even whatever MXCSR says, subnormals count as zero, NaN stays NaN.
std::uint16_t emulated_bf16(float value) noexcept {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    if (magnitude > 0x7f800000U) {
        return static_cast<std::uint16_t>(bits >> 16 | 0x40U);
    }
    if (magnitude < 0x00800000U) {
        return static_cast<std::uint16_t>(bits >> 16 & 0x8000U);
    }
    return static_cast<std::uint16_t>((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16);
}

__m256bh emulated_cvtneps_pbh(__m512 a) noexcept {
    const auto in = emulated_cast<EmulatedLanes<float>>(a);
    std::uint16_t out[16];
    for (int i = 0; i < 16; ++i) {
        out[i] = emulated_bf16(in.lane[i]);
    }
    return emulated_cast<__m256bh>(out);
}

__m256i emulated_cvtepi32_epi16(__m512i a) noexcept {
    const auto in = emulated_cast<EmulatedLanes<std::uint32_t>>(a);
    std::uint16_t out[16];
    for (int i = 0; i < 16; ++i) {
        out[i] = static_cast<std::uint16_t>(in.lane[i]);
    }
    return emulated_cast<__m256i>(out);
}

// Tiles as the configuration that the sources load has them: eight of 16 rows of 64 bytes.
struct EmulatedTiles {
    unsigned char byte[8][16][64];
};

EmulatedTiles& emulated_tiles() noexcept {
    thread_local EmulatedTiles tiles;
    return tiles;
}

// TDPBUUD: a lane of 32 bits gains the sum of four products of unsigned bytes.
void emulated_dpbuud(int to, int a, int b) noexcept {
    EmulatedTiles& tiles = emulated_tiles();
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 16; ++n) {
            std::uint32_t sum = 0;
            std::memcpy(&sum, &tiles.byte[to][m][4 * n], sizeof(sum));
            for (int k = 0; k < 64; ++k) {
                sum += static_cast<std::uint32_t>(tiles.byte[a][m][k]) *
                       tiles.byte[b][k / 4][4 * n + k % 4];
            }
            std::memcpy(&tiles.byte[to][m][4 * n], &sum, sizeof(sum));
        }
    }
}

void emulated_loadd(int to, const void* from, std::size_t stride) noexcept {
    for (std::size_t row = 0; row < 16; ++row) {
        std::memcpy(emulated_tiles().byte[to][row],
                    static_cast<const unsigned char*>(from) + row * stride, 64);
    }
}

void emulated_stored(int tile, void* to, std::size_t stride) noexcept {
    for (std::size_t row = 0; row < 16; ++row) {
        std::memcpy(static_cast<unsigned char*>(to) + row * stride,
                    emulated_tiles().byte[tile][row], 64);
    }
}

}  // namespace

#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(tile) \
    static_cast<void>(   \
        std::memset(emulated_tiles().byte[tile], 0, sizeof(emulated_tiles().byte[tile])))
#define _tile_loadd(to, from, stride) emulated_loadd(to, from, static_cast<std::size_t>(stride))
#define _tile_stored(tile, to, stride) emulated_stored(tile, to, static_cast<std::size_t>(stride))
#define _tile_dpbuud(to, a, b) emulated_dpbuud(to, a, b)
#define _mm512_cvtneps_pbh(a) emulated_cvtneps_pbh(a)
#define _mm512_cvtepi32_epi16(a) emulated_cvtepi32_epi16(a)
