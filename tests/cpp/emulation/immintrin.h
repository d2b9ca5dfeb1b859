// Stands in for the compiler's <immintrin.h> when the AVX-512 and AMX sources are built for a
// processor that may lack them: SIMDe supplies the intrinsics from AVX2 and plain C, and what SIMDe 0.8.2 lacks
// follows here, after Intel's Intrinsics Guide. The product's sources do not know about it. One
// difference: SIMDe's VDPBF16PS keeps subnormals, the processor's takes them for zero.
#pragma once
#pragma GCC system_header

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
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

// VCVTNE2PS2BF16: b below a.
inline __m512bh emulated_cvtne2ps_pbh(__m512 a, __m512 b) noexcept {
    const auto high = emulated_cast<EmulatedLanes<float>>(a);
    const auto low = emulated_cast<EmulatedLanes<float>>(b);
    std::uint16_t out[32];
    for (int i = 0; i < 16; ++i) {
        out[i] = emulated_bf16(low.lane[i]);
        out[16 + i] = emulated_bf16(high.lane[i]);
    }
    return emulated_cast<__m512bh>(out);
}

__m256bh emulated_cvtneps_pbh(__m512 a) noexcept {
    const auto in = emulated_cast<EmulatedLanes<float>>(a);
    std::uint16_t out[16];
    for (int i = 0; i < 16; ++i) {
        out[i] = emulated_bf16(in.lane[i]);
    }
    return emulated_cast<__m256bh>(out);
}

// VPTESTNMB: the bytes that have no bit in common.
inline std::uint64_t emulated_testn_epi8_mask(__m512i a, __m512i b) noexcept {
    const auto left = emulated_cast<EmulatedLanes<std::uint8_t>>(a);
    const auto right = emulated_cast<EmulatedLanes<std::uint8_t>>(b);
    std::uint64_t mask = 0;
    for (unsigned i = 0; i < 64; ++i) {
        mask |= static_cast<std::uint64_t>((left.lane[i] & right.lane[i]) == 0) << i;
    }
    return mask;
}

inline std::int64_t emulated_reduce_add_epi64(__m512i a) noexcept {
    const auto in = emulated_cast<EmulatedLanes<std::uint64_t>>(a);
    std::uint64_t sum = 0;
    for (const std::uint64_t lane : in.lane) {
        sum += lane;
    }
    return static_cast<std::int64_t>(sum);
}

// VCVTPS2DQ with a rounding of its own; what fits no integer becomes the lowest.
inline __m512i emulated_cvt_roundps_epi32(__m512 a, int rounding) noexcept {
    const auto in = emulated_cast<EmulatedLanes<float>>(a);
    EmulatedLanes<std::int32_t> out;
    for (unsigned i = 0; i < 16; ++i) {
        const float x = in.lane[i];
        const int how = rounding & 3;
        const float y = how == 0   ? std::nearbyint(x)
                        : how == 1 ? std::floor(x)
                        : how == 2 ? std::ceil(x)
                                   : std::trunc(x);
        const bool fits = y >= -2147483648.0F && y < 2147483648.0F;
        out.lane[i] = fits ? static_cast<std::int32_t>(y) : INT32_MIN;
    }
    return emulated_cast<__m512i>(out);
}

inline __m128i emulated_cvtepi32_epi8(__m512i a) noexcept {
    const auto in = emulated_cast<EmulatedLanes<std::uint32_t>>(a);
    std::uint8_t out[16];
    for (int i = 0; i < 16; ++i) {
        out[i] = static_cast<std::uint8_t>(in.lane[i]);
    }
    return emulated_cast<__m128i>(out);
}

inline __m512i emulated_cvtepi8_epi32(__m128i a) noexcept {
    std::int8_t in[16];
    std::memcpy(in, &a, sizeof in);
    EmulatedLanes<std::int32_t> out;
    for (unsigned i = 0; i < 16; ++i) {
        out.lane[i] = in[i];
    }
    return emulated_cast<__m512i>(out);
}

// VMOVNTPS: what it does to the caches is not emulated.
inline void emulated_stream_ps(float* to, __m512 a) noexcept { std::memcpy(to, &a, sizeof a); }
inline void emulated_stream_si512(void* to, __m512i a) noexcept { std::memcpy(to, &a, sizeof a); }

__m256i emulated_cvtepi32_epi16(__m512i a) noexcept {
    const auto in = emulated_cast<EmulatedLanes<std::uint32_t>>(a);
    std::uint16_t out[16];
    for (int i = 0; i < 16; ++i) {
        out[i] = static_cast<std::uint16_t>(in.lane[i]);
    }
    return emulated_cast<__m256i>(out);
}

// AMX: eight tiles of up to 16 rows of 64 bytes, shaped by a configuration of 64 bytes. What the
// processor would refuse ends the program.
struct EmulatedTiles {
    struct Tile {
        std::uint8_t row[16][64];
        unsigned rows, bytes;
    } tile[8];
    bool configured;
};
inline thread_local EmulatedTiles emulated_tiles{};

inline void emulated_tile_must(bool true_of_hardware) noexcept {
    if (!true_of_hardware) {
        std::abort();
    }
}

inline void emulated_tile_loadconfig(const void* config) noexcept {
    std::uint8_t bytes[64];
    std::memcpy(bytes, config, sizeof bytes);
    emulated_tile_must(bytes[0] == 1 && bytes[1] == 0);
    emulated_tiles = {};
    emulated_tiles.configured = true;
    for (int i = 0; i < 8; ++i) {
        auto& tile = emulated_tiles.tile[i];
        tile.rows = bytes[48 + i];
        tile.bytes = bytes[16 + 2 * i] + 256U * bytes[17 + 2 * i];
        emulated_tile_must(tile.rows <= 16 && tile.bytes <= 64 &&
                           (tile.rows == 0) == (tile.bytes == 0));
    }
}

inline void emulated_tile_release() noexcept { emulated_tiles = {}; }

inline EmulatedTiles::Tile& emulated_tile(int i) noexcept {
    emulated_tile_must(emulated_tiles.configured && emulated_tiles.tile[i].rows > 0);
    return emulated_tiles.tile[i];
}

inline void emulated_tile_zero(int i) noexcept {
    std::memset(emulated_tile(i).row, 0, sizeof emulated_tile(i).row);
}

inline void emulated_tile_loadd(int i, const void* from, std::ptrdiff_t stride) noexcept {
    auto& tile = emulated_tile(i);
    emulated_tile_zero(i);
    for (unsigned r = 0; r < tile.rows; ++r) {
        std::memcpy(tile.row[r],
                    static_cast<const char*>(from) + static_cast<std::ptrdiff_t>(r) * stride,
                    tile.bytes);
    }
}

inline void emulated_tile_stored(int i, void* to, std::ptrdiff_t stride) noexcept {
    const auto& tile = emulated_tile(i);
    for (unsigned r = 0; r < tile.rows; ++r) {
        std::memcpy(static_cast<char*>(to) + static_cast<std::ptrdiff_t>(r) * stride, tile.row[r],
                    tile.bytes);
    }
}

// TDPBSSD: sums[m][n] += the products of four signed bytes of a[m] and of b, for each of b's rows
inline void emulated_tile_dpbssd(int sums, int a, int b) noexcept {
    auto& to = emulated_tile(sums);
    const auto& left = emulated_tile(a);
    const auto& right = emulated_tile(b);
    emulated_tile_must(left.rows == to.rows && left.bytes == 4 * right.rows &&
                       right.bytes == to.bytes);
    for (unsigned m = 0; m < to.rows; ++m) {
        for (unsigned n = 0; n < to.bytes; n += 4) {
            std::int32_t sum;
            std::memcpy(&sum, to.row[m] + n, sizeof sum);
            for (unsigned k = 0; k < left.bytes; ++k) {
                sum += static_cast<std::int8_t>(left.row[m][k]) *
                       static_cast<std::int8_t>(right.row[k / 4][n + k % 4]);
            }
            std::memcpy(to.row[m] + n, &sum, sizeof sum);
        }
    }
}

// TDPBF16PS: of each pair the sums over the even inputs and over the odd ones, one added to the other
// and both to what was there; subnormals count as zero.
inline float emulated_normal(float x) noexcept {
    return std::fabs(x) < 0x1p-126F ? std::copysign(0.0F, x) : x;
}

inline float emulated_wide(const std::uint8_t* from) noexcept {
    std::uint16_t half;
    std::memcpy(&half, from, sizeof half);
    return emulated_normal(std::bit_cast<float>(std::uint32_t{half} << 16));
}

inline void emulated_tile_dpbf16ps(int sums, int a, int b) noexcept {
    auto& to = emulated_tile(sums);
    const auto& left = emulated_tile(a);
    const auto& right = emulated_tile(b);
    emulated_tile_must(left.rows == to.rows && left.bytes == 4 * right.rows &&
                       right.bytes == to.bytes);
    for (unsigned m = 0; m < to.rows; ++m) {
        for (unsigned n = 0; n < to.bytes; n += 4) {
            float part[2] = {0.0F, 0.0F};
            for (unsigned k = 0; k < left.bytes; k += 2) {
                float& sum = part[k / 2 % 2];
                sum = emulated_normal(std::fma(emulated_wide(left.row[m] + k),
                                               emulated_wide(right.row[k / 4] + n + k % 4), sum));
            }
            float sum;
            std::memcpy(&sum, to.row[m] + n, sizeof sum);
            sum = emulated_normal(emulated_normal(sum) + emulated_normal(part[0] + part[1]));
            std::memcpy(to.row[m] + n, &sum, sizeof sum);
        }
    }
}

// TDPBUUD: sums[m][n] += the products of four unsigned bytes of a[m] and of b, for each of b's rows
inline void emulated_tile_dpbuud(int sums, int a, int b) noexcept {
    auto& to = emulated_tile(sums);
    const auto& left = emulated_tile(a);
    const auto& right = emulated_tile(b);
    emulated_tile_must(left.rows == to.rows && left.bytes == 4 * right.rows &&
                       right.bytes == to.bytes);
    for (unsigned m = 0; m < to.rows; ++m) {
        for (unsigned n = 0; n < to.bytes; n += 4) {
            std::uint32_t sum;
            std::memcpy(&sum, to.row[m] + n, sizeof sum);
            for (unsigned k = 0; k < left.bytes; ++k) {
                sum += static_cast<std::uint32_t>(left.row[m][k]) *
                       static_cast<std::uint32_t>(right.row[k / 4][n + k % 4]);
            }
            std::memcpy(to.row[m] + n, &sum, sizeof sum);
        }
    }
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbuud
#undef _tile_dpbf16ps
#define _tile_dpbf16ps(sums, a, b) emulated_tile_dpbf16ps(sums, a, b)
#define _mm512_cvtne2ps_pbh(a, b) emulated_cvtne2ps_pbh(a, b)
#define _tile_dpbuud(sums, a, b) emulated_tile_dpbuud(sums, a, b)
#define _tile_loadconfig(config) emulated_tile_loadconfig(config)
#define _tile_release() emulated_tile_release()
#define _tile_zero(i) emulated_tile_zero(i)
#define _tile_loadd(i, from, stride) emulated_tile_loadd(i, from, stride)
#define _tile_stored(i, to, stride) emulated_tile_stored(i, to, stride)
#define _tile_dpbssd(sums, a, b) emulated_tile_dpbssd(sums, a, b)
#define _mm512_cvtneps_pbh(a) emulated_cvtneps_pbh(a)
#define _mm512_cvtepi32_epi16(a) emulated_cvtepi32_epi16(a)
#define _mm512_testn_epi8_mask(a, b) emulated_testn_epi8_mask(a, b)
#define _mm512_stream_ps(to, a) emulated_stream_ps(to, a)
#define _mm512_reduce_add_epi64(a) emulated_reduce_add_epi64(a)
#define _mm512_cvt_roundps_epi32(a, rounding) emulated_cvt_roundps_epi32(a, rounding)
#define _mm512_cvtepi32_epi8(a) emulated_cvtepi32_epi8(a)
#define _mm512_cvtepi8_epi32(a) emulated_cvtepi8_epi32(a)
#define _mm512_stream_si512(to, a) emulated_stream_si512(to, a)
