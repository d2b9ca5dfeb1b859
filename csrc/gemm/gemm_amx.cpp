#include <immintrin.h>

#include <utility>

#include "gemm/kernel.h"

// Many tokens by tiles of int8: a group of 32 inputs of 16 tokens and 16 outputs is one tile product,
// exact in int32, and is scaled and summed as the VNNI level does it. Everything else is that level's.
namespace quernstone::gemm::avx512_amx {

// gemm_amx_bf16.cpp
void bf16_bf16(const Block& blocks, const Tokens& x, float* out);
void int8_bf16(const Block& blocks, const Tokens& x, float* out);
void int4_bf16(const Block& blocks, const Tokens& x, float* out);
void narrow(const float* x, std::int64_t n, bf16* to);
void scale_outputs(const Block& blocks, const Tokens& x, float* out);

namespace {

constexpr int kTile = 16;                         // tokens of a tile
constexpr std::int64_t kTileBytes = 1024;         // of 16 x 16 sums
constexpr std::int64_t kGroupBytes = 32 * kRows;  // a group of a block's codes as int8
constexpr int kRun = 16;                          // groups that are expanded together
constexpr std::int64_t kMany = 64;                // tokens that one expansion serves
// Below so many tokens the rows of a tile that stay empty cost more than the VNNI level takes.
constexpr std::int64_t kFew = 9;

// The intrinsics want their registers as literals. Sums in 0 and 1, tokens in 2, weights in 3; 4 to 6
// are 0 to 2 with the rows of the last, shorter tile.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};

    explicit TileConfig(int last) {
        for (const int sums : {0, 1, 4, 5}) {
            shape(sums, sums < 4 ? kTile : last, kTile * 4);
        }
        shape(2, kTile, kScaleGroup);
        shape(6, last, kScaleGroup);
        shape(3, static_cast<int>(kScaleGroup / 4), kTile * 4);
    }

   private:
    void shape(int tile, int row_count, std::int64_t row_bytes) {
        rows[tile] = static_cast<std::uint8_t>(row_count);
        bytes[tile] = static_cast<std::uint16_t>(row_bytes);
    }
};

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline __m512 bf16_scales(const std::byte* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// A run of groups of one block as the tiles take them: signed codes, and int4's scales as fp32.
struct Run {
    alignas(64) std::int8_t codes[kRun * kGroupBytes];
    alignas(64) float scales[kRun * kRows];
};

template <bool kZeros>
inline void expand_int4(const Block& w, std::int64_t first, int groups, Run& run) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const std::byte* line = w.codes + first * (kGroupBytes / 2);
    std::int8_t* to = run.codes;
    for (int g = 0; g < groups; ++g) {
        const std::int64_t at = ((first + g) >> w.group_shift) * kRows;
        __m512i zero = _mm512_set1_epi8(8);
        if constexpr (kZeros) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at));
            zero = _mm512_mullo_epi32(_mm512_cvtepu16_epi32(_mm256_cvtepu8_epi16(bytes)),
                                      _mm512_set1_epi32(0x01010101));
        }
        _mm512_store_ps(run.scales + g * kRows, bf16_scales(w.scales + 2 * at));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512i both = _mm512_loadu_si512(line);
            const __m512i low = _mm512_and_si512(both, nibble);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi32(both, 4), nibble);
            _mm512_store_si512(to, _mm512_sub_epi8(low, zero));
            _mm512_store_si512(to + kLine, _mm512_sub_epi8(high, zero));
            line += kLine;
            to += 2 * kLine;
        }
    }
}

inline void expand_int8(const Block& w, std::int64_t first, int groups, Run& run) {
    const __m512i bias = _mm512_set1_epi8(-128);
    const std::byte* line = w.codes + first * kGroupBytes;
    for (std::int64_t at = 0; at < groups * kGroupBytes; at += kLine) {
        _mm512_store_si512(run.codes + at, _mm512_xor_si512(_mm512_loadu_si512(line + at), bias));
    }
}

// A step of a transposition: of rows `step` apart the lanes whose number has that bit change places
// with those that lack it.
template <int step>
[[gnu::always_inline]] inline void exchange(__m512i (&rows)[kTile]) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i bit = _mm512_and_si512(lane, _mm512_set1_epi32(step));
    // From 16 on, lanes of the second row.
    const __m512i first =
        _mm512_add_epi32(lane, _mm512_mullo_epi32(bit, _mm512_set1_epi32((kTile - step) / step)));
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(step));
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) {
        if ((i & step) == 0) {
            const __m512i a = rows[i];
            const __m512i b = rows[i + step];
            rows[i] = _mm512_permutex2var_epi32(a, first, b);
            rows[i + step] = _mm512_permutex2var_epi32(a, second, b);
        }
    }
}

// Scales of up to 16 tokens for a run of groups, [group][token]; behind the last token comes it again.
inline void transpose_scales(const float* scales, std::int64_t stride, int tokens, int groups,
                             float* to) {
    static_assert(kTile == 16 && kRun == 16);
    const auto some = static_cast<__mmask16>((1U << groups) - 1U);
    __m512i rows[kTile];
#pragma GCC unroll 16
    for (int t = 0; t < kTile; ++t) {
        rows[t] = _mm512_castps_si512(
            _mm512_maskz_loadu_ps(some, scales + least(t, tokens - 1) * stride));
    }
    exchange<1>(rows);
    exchange<2>(rows);
    exchange<4>(rows);
    exchange<8>(rows);
#pragma GCC unroll 16
    for (int g = 0; g < kTile; ++g) {
        _mm512_store_si512(to + g * kTile, rows[g]);
    }
}

// Lines of weights that are wanted next, fetched a few at a time between products.
struct Ahead {
    const std::byte* line;
    const std::byte* end;
    int each;

    void fetch() {
        for (int i = 0; i < each && line < end; ++i) {
            _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
            line += kLine;
        }
    }
};

struct TileArgs {
    const std::int8_t* x;  // of the first token and group
    std::int64_t stride;   // bytes between tokens
    const Run* run;
    int groups;
    const float* scales;  // [group][kTile] of the tokens
    float* out;           // [kTile][kRows], the sums so far
    int tokens;
    bool first;
};

// The sums of a tile's tokens. Subscripts are constants from the start, so that gcc keeps them in
// registers.
struct Sums {
    __m512 of[kTile];

    template <class Body>
    [[gnu::always_inline]] void each(const Body& body) {
        [&]<int... t>(std::integer_sequence<int, t...>) __attribute__((always_inline)) {
            (body(std::integral_constant<int, t>{}, of[t]), ...);
        }(std::make_integer_sequence<int, kTile>{});
    }
};

#define QS_MULTIPLY(sums, tokens, x, w, stride) \
    _tile_zero(sums);                           \
    _tile_loadd(tokens, x, stride);             \
    _tile_loadd(3, w, kLine);                   \
    _tile_dpbssd(sums, tokens, 3)

// The products of one group, by the registers of an even or odd turn.
template <bool kLast, bool kOdd>
[[gnu::always_inline]] inline void multiply(const TileArgs& a, int g) {
    const std::int8_t* x = a.x + g * kScaleGroup;
    const std::int8_t* w = a.run->codes + g * kGroupBytes;
    if constexpr (kLast) {
        if constexpr (kOdd) {
            QS_MULTIPLY(5, 6, x, w, a.stride);
        } else {
            QS_MULTIPLY(4, 6, x, w, a.stride);
        }
    } else if constexpr (kOdd) {
        QS_MULTIPLY(1, 2, x, w, a.stride);
    } else {
        QS_MULTIPLY(0, 2, x, w, a.stride);
    }
}
#undef QS_MULTIPLY

template <bool kLast, bool kOdd>
[[gnu::always_inline]] inline void put_down(std::int32_t* to) {
    if constexpr (kLast) {
        if constexpr (kOdd) {
            _tile_stored(5, to, kLine);
        } else {
            _tile_stored(4, to, kLine);
        }
    } else if constexpr (kOdd) {
        _tile_stored(1, to, kLine);
    } else {
        _tile_stored(0, to, kLine);
    }
}

template <bool kGroupScales>
[[gnu::always_inline]] inline void scale(const TileArgs& a, int g, const std::int32_t* products,
                                         Sums& sums) {
    const float* x_scales = a.scales + g * kTile;
    const __m512 w_scale =
        kGroupScales ? _mm512_load_ps(a.run->scales + g * kRows) : _mm512_setzero_ps();
    sums.each([&](auto t, __m512& sum) __attribute__((always_inline)) {
        const __m512 number = _mm512_cvtepi32_ps(_mm512_load_si512(products + t * kRows));
        __m512 by = _mm512_set1_ps(x_scales[t]);
        if constexpr (kGroupScales) {
            by = _mm512_mul_ps(w_scale, by);
        }
        sum = _mm512_fmadd_ps(number, by, sum);
    });
}

// Adds a run of groups to the sums of a tile. While one group is multiplied, the one before it is put
// down and the one before that is scaled: a store that waited for its product would fill the
// processor's queue of stores.
template <bool kLast, bool kGroupScales>
inline void add_run(const TileArgs& a, Ahead& ahead) {
    alignas(64) std::int32_t products[2][kTileBytes / 4];
    Sums sums;
    const auto there = [&](int t) __attribute__((always_inline)) {
        return static_cast<__mmask16>(!kLast || t < a.tokens ? 0xffff : 0);
    };
    sums.each([&](auto t, __m512& sum) __attribute__((always_inline)) {
        sum = a.first ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there(t), a.out + t * kRows);
    });
    multiply<kLast, false>(a, 0);
    if (a.groups > 1) {
        multiply<kLast, true>(a, 1);
    }
    put_down<kLast, false>(products[0]);
    int g = 1;
    for (; g + 1 < a.groups; g += 2) {
        multiply<kLast, false>(a, g + 1);
        ahead.fetch();
        scale<kGroupScales>(a, g - 1, products[0], sums);
        put_down<kLast, true>(products[1]);
        if (g + 2 < a.groups) {
            multiply<kLast, true>(a, g + 2);
        }
        ahead.fetch();
        scale<kGroupScales>(a, g, products[1], sums);
        put_down<kLast, false>(products[0]);
    }
    scale<kGroupScales>(a, g - 1, products[0], sums);
    if (g < a.groups) {
        put_down<kLast, true>(products[1]);
        scale<kGroupScales>(a, g, products[1], sums);
    }
    sums.each([&](auto t, __m512& sum) __attribute__((always_inline)) {
        _mm512_mask_storeu_ps(a.out + t * kRows, there(t), sum);
    });
}

// Tokens t0..t0 + count, at most kMany, of every block: a run of groups at a time, whose expanded
// codes stay in the first cache for all of them.
template <bool kGroupScales, class Expand>
inline void multiply_some(const Block& blocks, const Tokens& x, std::int64_t t0, int count,
                          float* out, const Expand& expand) {
    alignas(64) Run run;
    alignas(64) float scales[kMany * kRun];
    const std::int64_t groups = x.padded / kScaleGroup;
    const std::int64_t group_bytes = kGroupScales ? kGroupBytes / 2 : kGroupBytes;
    const int tiles = (count + kTile - 1) / kTile;
    for (std::int64_t first = 0; first < groups; first += kRun) {
        const int some = static_cast<int>(least(kRun, groups - first));
        for (int tile = 0; tile < tiles; ++tile) {
            transpose_scales(x.scales + (t0 + tile * kTile) * groups + first, groups,
                             static_cast<int>(least(kTile, count - tile * kTile)), some,
                             scales + tile * kTile * kRun);
        }
        for (std::int64_t b = 0; b < blocks.count; ++b) {
            const std::int64_t skip = b * blocks.bytes;
            const Block w{blocks.codes + skip,
                          blocks.scales + skip,
                          blocks.zeros == nullptr ? nullptr : blocks.zeros + skip,
                          blocks.bytes,
                          blocks.group_shift,
                          1};
            expand(w, first, some, run);
            // The compiler is not told that a tile reads memory.
            __asm__ volatile("" ::: "memory");
            // The next block's codes of this run, or, behind the last block, its next codes.
            const bool inside = b + 1 < blocks.count;
            const bool done = first + kRun >= groups;
            const std::byte* next = inside ? w.codes + blocks.bytes + first * group_bytes
                                    : done ? w.codes + blocks.bytes
                                           : blocks.codes + (first + kRun) * group_bytes;
            const std::int64_t lines = some * group_bytes / kLine;
            Ahead ahead{next, next + lines * kLine,
                        static_cast<int>((lines + tiles * some - 1) / (tiles * some))};
            for (int tile = 0; tile < tiles; ++tile) {
                const std::int64_t t = t0 + tile * kTile;
                const int tokens = static_cast<int>(least(kTile, count - tile * kTile));
                const TileArgs args{x.codes + t * x.padded + first * kScaleGroup,
                                    x.padded,
                                    &run,
                                    some,
                                    scales + tile * kTile * kRun,
                                    out + (b * x.count + t) * kRows,
                                    tokens,
                                    first == 0};
                if (tokens == kTile) {
                    add_run<false, kGroupScales>(args, ahead);
                } else {
                    add_run<true, kGroupScales>(args, ahead);
                }
            }
        }
    }
}

template <bool kGroupScales, class Expand>
inline void multiply_many(const Block& blocks, const Tokens& x, float* out, const Expand& expand) {
    int shaped = -1;
    for (std::int64_t t0 = 0; t0 < x.count; t0 += kMany) {
        const int count = static_cast<int>(least(kMany, x.count - t0));
        if (const int last = count % kTile; last != shaped) {
            const TileConfig config(last == 0 ? kTile : last);
            // gcc takes it that the first 8 bytes alone are read.
            __asm__ volatile("" ::"m"(config));
            _tile_loadconfig(&config);
            shaped = last;
        }
        multiply_some<kGroupScales>(blocks, x, t0, count, out, expand);
    }
    _tile_release();
}

void int4_int8(const Block& blocks, const Tokens& x, float* out) {
    if (x.count < kFew) {
        avx512_bf16_vnni::kKernels.int4_int8(blocks, x, out);
    } else if (blocks.zeros != nullptr) {
        multiply_many<true>(blocks, x, out, expand_int4<true>);
    } else {
        multiply_many<true>(blocks, x, out, expand_int4<false>);
    }
}

void int8_int8(const Block& blocks, const Tokens& x, float* out) {
    if (x.count < kFew) {
        avx512_bf16_vnni::kKernels.int8_int8(blocks, x, out);
        return;
    }
    multiply_many<false>(blocks, x, out, expand_int8);
    scale_outputs(blocks, x, out);
}

void bf16_float(const Block& blocks, const Tokens& x, float* out) {
    avx512_bf16_vnni::kKernels.bf16_float(blocks, x, out);
}
void int8_float(const Block& blocks, const Tokens& x, float* out) {
    avx512_bf16_vnni::kKernels.int8_float(blocks, x, out);
}
void int4_float(const Block& blocks, const Tokens& x, float* out) {
    avx512_bf16_vnni::kKernels.int4_float(blocks, x, out);
}
void quantize(const float* x, std::int64_t n, std::int64_t padded, std::int8_t* codes,
              float* scales, std::int32_t* sums) {
    avx512_bf16_vnni::kKernels.quantize(x, n, padded, codes, scales, sums);
}
void silu_multiply(float* gate, const float* up, std::int64_t n) {
    avx512_bf16_vnni::kKernels.silu_multiply(gate, up, n);
}

}  // namespace

const Kernels kKernels{bf16_float,    int8_float, int8_int8, int4_float, int4_int8, quantize,
                       silu_multiply, bf16_bf16,  int8_bf16, int4_bf16,  narrow};

}  // namespace quernstone::gemm::avx512_amx
