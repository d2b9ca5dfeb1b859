#include <immintrin.h>

#include "gemm/kernel.h"

// Many tokens by tiles of bf16: codes become numbers once for all tokens of a call, and nothing is
// scaled between the products of a sum.
namespace quernstone::gemm::avx512_amx {
namespace {

constexpr std::int64_t kTile = 16;                       // tokens, or outputs, of a tile
constexpr std::int64_t kDepth = 32;                      // inputs of a product
constexpr std::int64_t kTileBytes = 1024;                // of 16 x 16 sums, or of 32 x 16 weights
constexpr std::int64_t kSteps = kRunInputs / kDepth;     // products of a run
constexpr std::int64_t kRunBytes = kSteps * kTileBytes;  // a run of a block's weights
constexpr std::int64_t kTogether = 16;                   // blocks whose runs are expanded together

// Sums in 0 to 3, tokens in 4 and 5, weights in 6 and 7: sum 2 i + j is of tokens i and weights j.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};

    TileConfig(std::int64_t first, std::int64_t second) {
        for (const int tile : {0, 1, 4}) {
            shape(tile, first);
        }
        for (const int tile : {2, 3, 5}) {
            shape(tile, second);
        }
        shape(6, kTile);
        shape(7, kTile);
    }

   private:
    void shape(int tile, std::int64_t row_count) {
        rows[tile] = static_cast<std::uint8_t>(row_count);
        bytes[tile] = row_count > 0 ? 64 : 0;
    }
};

constexpr std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Of lanes 0 to 7, or 8 to 15, each twice: an output's two inputs of a pair stand side by side.
template <int kHalf>
inline __m512i twice() {
    constexpr int h = 8 * kHalf;
    return _mm512_setr_epi32(h, h, h + 1, h + 1, h + 2, h + 2, h + 3, h + 3, h + 4, h + 4, h + 5,
                             h + 5, h + 6, h + 6, h + 7, h + 7);
}

inline __m512i shifts(int even, int odd) {
    return _mm512_set1_epi64((static_cast<long long>(odd) << 32) | even);
}

// A line of pairs, of outputs 0 to 7 and of 8 to 15.
inline void store_pairs(std::byte* to, __m512 low, __m512 high) {
    const __m512bh line = _mm512_cvtne2ps_pbh(high, low);
    __builtin_memcpy(to, &line, sizeof line);
}

// (c - z) s is a sum of twelve bits at most, so c s - z s is exact, and rounded once, to bf16.
struct ExpandInt4 {
    static constexpr std::int64_t kBytes = kDepth * kRows / 2;  // of a step of a block

    const __m512 number = _mm512_setr_ps(0.F, 1.F, 2.F, 3.F, 4.F, 5.F, 6.F, 7.F, 8.F, 9.F, 10.F,
                                         11.F, 12.F, 13.F, 14.F, 15.F);

    [[gnu::always_inline]] void step(const Block& w, std::int64_t at, std::byte* to) const {
        const std::int64_t group = (at >> w.group_shift) * kRows;
        const __m256i half =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.scales + 2 * group));
        const __m512 scale =
            _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        __m512 zero = _mm512_set1_ps(8.0F);
        if (w.zeros != nullptr) {
            const __m128i bytes =
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + group));
            zero = _mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_cvtepu8_epi16(bytes)));
        }
        const __m512 off = _mm512_mul_ps(zero, scale);
        const __m512 scales[2] = {_mm512_permutexvar_ps(twice<0>(), scale),
                                  _mm512_permutexvar_ps(twice<1>(), scale)};
        const __m512 offs[2] = {_mm512_permutexvar_ps(twice<0>(), off),
                                _mm512_permutexvar_ps(twice<1>(), off)};
        const std::byte* line = w.codes + at * kBytes;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512i codes = _mm512_loadu_si512(line + i * kLine);
            const __m512i words[2] = {_mm512_permutexvar_epi32(twice<0>(), codes),
                                      _mm512_permutexvar_epi32(twice<1>(), codes)};
            const auto pairs = [&](int half_of, __m512i by) __attribute__((always_inline)) {
                const __m512i index = _mm512_srlv_epi32(words[half_of], by);
                return _mm512_fmsub_ps(_mm512_permutexvar_ps(index, number), scales[half_of],
                                       offs[half_of]);
            };
            const __m512i by[4] = {shifts(0, 8), shifts(16, 24), shifts(4, 12), shifts(20, 28)};
#pragma GCC unroll 4
            for (int p = 0; p < 4; ++p) {
                store_pairs(to, pairs(0, by[p]), pairs(1, by[p]));
                to += kLine;
            }
        }
    }
};

// Codes alone, which bf16 holds exactly; their scale is the output's.
struct ExpandInt8 {
    static constexpr std::int64_t kBytes = kDepth * kRows;

    [[gnu::always_inline]] void step(const Block& w, std::int64_t at, std::byte* to) const {
        const __m512i bias = _mm512_set1_epi8(-128);
        const std::byte* line = w.codes + at * kBytes;
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const __m512i codes = _mm512_xor_si512(_mm512_loadu_si512(line + i * kLine), bias);
            const __m512i words[2] = {_mm512_permutexvar_epi32(twice<0>(), codes),
                                      _mm512_permutexvar_epi32(twice<1>(), codes)};
            const auto pairs = [&](int half, __m512i by) __attribute__((always_inline)) {
                const __m512i high = _mm512_sllv_epi32(words[half], by);
                return _mm512_cvtepi32_ps(_mm512_srai_epi32(high, 24));
            };
            const __m512i by[2] = {shifts(24, 16), shifts(8, 0)};
#pragma GCC unroll 2
            for (int p = 0; p < 2; ++p) {
                store_pairs(to, pairs(0, by[p]), pairs(1, by[p]));
                to += kLine;
            }
        }
    }
};

// The sums of some tokens and one or two blocks over a run; they lie tile by tile.
struct TileArgs {
    const std::byte* x;  // of the first token
    const std::byte* w;  // tiles of the first block, and `w_stride` bytes behind them of the second
    std::int64_t w_stride;
    std::int64_t steps;
    float* out;               // of the first block and token
    std::int64_t out_stride;  // floats between blocks
    bool first;
};

template <int kTokens, int kBlocks>
[[gnu::always_inline]] inline void begin_sums(const TileArgs& a) {
    if (a.first) {
        _tile_zero(0);
        if constexpr (kBlocks > 1) {
            _tile_zero(1);
        }
        if constexpr (kTokens > 1) {
            _tile_zero(2);
        }
        if constexpr (kTokens > 1 && kBlocks > 1) {
            _tile_zero(3);
        }
        return;
    }
    constexpr std::int64_t kNext = kTile * kRows;
    _tile_loadd(0, a.out, kLine);
    if constexpr (kBlocks > 1) {
        _tile_loadd(1, a.out + a.out_stride, kLine);
    }
    if constexpr (kTokens > 1) {
        _tile_loadd(2, a.out + kNext, kLine);
    }
    if constexpr (kTokens > 1 && kBlocks > 1) {
        _tile_loadd(3, a.out + kNext + a.out_stride, kLine);
    }
}

template <int kTokens, int kBlocks>
[[gnu::always_inline]] inline void end_sums(const TileArgs& a) {
    constexpr std::int64_t kNext = kTile * kRows;
    _tile_stored(0, a.out, kLine);
    if constexpr (kBlocks > 1) {
        _tile_stored(1, a.out + a.out_stride, kLine);
    }
    if constexpr (kTokens > 1) {
        _tile_stored(2, a.out + kNext, kLine);
    }
    if constexpr (kTokens > 1 && kBlocks > 1) {
        _tile_stored(3, a.out + kNext + a.out_stride, kLine);
    }
}

template <int kTokens, int kBlocks>
inline void add_run(const TileArgs& a) {
    constexpr std::int64_t kRow = 2 * kRunInputs;  // bytes between tokens
    begin_sums<kTokens, kBlocks>(a);
    const std::byte* x = a.x;
    const std::byte* w = a.w;
    for (std::int64_t step = 0; step < a.steps; ++step) {
        _tile_loadd(4, x, kRow);
        _tile_loadd(6, w, kLine);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kBlocks > 1) {
            _tile_loadd(7, w + a.w_stride, kLine);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (kTokens > 1) {
            _tile_loadd(5, x + kTile * kRow, kRow);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (kTokens > 1 && kBlocks > 1) {
            _tile_dpbf16ps(3, 5, 7);
        }
        x += 2 * kDepth;
        w += kTileBytes;
    }
    end_sums<kTokens, kBlocks>(a);
}

template <int kTokens>
inline void add_blocks(TileArgs a, std::int64_t blocks) {
    for (; blocks > 1; blocks -= 2) {
        add_run<kTokens, 2>(a);
        a.w += 2 * a.w_stride;
        a.out += 2 * a.out_stride;
    }
    if (blocks > 0) {
        add_run<kTokens, 1>(a);
    }
}

inline void load(const TileConfig& config) {
    // gcc takes it that the first 8 bytes alone are read.
    __asm__ volatile("" ::"m"(config));
    _tile_loadconfig(&config);
}

// Adds a run of some blocks for all tokens, two tiles of tokens at a time: those stay in the first
// cache while the blocks' weights pass.
inline void add_tokens(TileArgs a, std::int64_t blocks, std::int64_t count) {
    // The compiler is not told that a tile reads memory.
    __asm__ volatile("" ::: "memory");
    const TileConfig full(kTile, kTile);
    load(full);
    constexpr std::int64_t kBoth = 2 * kTile;
    for (; count >= kBoth; count -= kBoth) {
        add_blocks<2>(a, blocks);
        a.x += kBoth * 2 * kRunInputs;
        a.out += kBoth * kRows;
    }
    if (count > 0) {
        const std::int64_t first = least(count, kTile);
        const TileConfig rest(first, count - first);
        load(rest);
        if (count > kTile) {
            add_blocks<2>(a, blocks);
        } else {
            add_blocks<1>(a, blocks);
        }
    }
    _tile_release();
    __asm__ volatile("" ::: "memory");
}

Block block_of(const Block& blocks, std::int64_t index) {
    const std::int64_t skip = index * blocks.bytes;
    return {blocks.codes + skip,
            blocks.scales + skip,
            blocks.zeros == nullptr ? nullptr : blocks.zeros + skip,
            blocks.bytes,
            blocks.group_shift,
            1};
}

// The first token's inputs of the run that begins with a step.
const std::byte* run_of(const Tokens& x, std::int64_t step) {
    return reinterpret_cast<const std::byte*>(x.halves + step / kSteps * x.run_stride);
}

template <class Expand>
inline void multiply_expanded(const Block& blocks, const Tokens& x, float* out) {
    alignas(64) std::byte expanded[kTogether * kRunBytes];
    const Expand expand{};
    const std::int64_t steps = x.padded / kDepth;
    for (std::int64_t b = 0; b < blocks.count; b += kTogether) {
        const std::int64_t some = least(kTogether, blocks.count - b);
        for (std::int64_t first = 0; first < steps; first += kSteps) {
            const std::int64_t length = least(kSteps, steps - first);
            for (std::int64_t i = 0; i < some; ++i) {
                const Block w = block_of(blocks, b + i);
                for (std::int64_t step = 0; step < length; ++step) {
                    expand.step(w, first + step, expanded + i * kRunBytes + step * kTileBytes);
                }
            }
            add_tokens({run_of(x, first), expanded, kRunBytes, length, out + b * x.count * kRows,
                        x.count * kRows, first == 0},
                       some, x.count);
        }
    }
}

}  // namespace

void int4_bf16(const Block& blocks, const Tokens& x, float* out) {
    multiply_expanded<ExpandInt4>(blocks, x, out);
}

// int8's scale of each output.
void scale_outputs(const Block& blocks, const Tokens& x, float* out) {
    for (std::int64_t b = 0; b < blocks.count; ++b) {
        const __m512 scale = _mm512_loadu_ps(blocks.scales + b * blocks.bytes);
        for (std::int64_t i = b * x.count; i < (b + 1) * x.count; ++i) {
            float* row = out + i * kRows;
            _mm512_storeu_ps(row, _mm512_mul_ps(_mm512_loadu_ps(row), scale));
        }
    }
}

void int8_bf16(const Block& blocks, const Tokens& x, float* out) {
    multiply_expanded<ExpandInt8>(blocks, x, out);
    scale_outputs(blocks, x, out);
}

// Packed bf16 lies as tiles want it.
void bf16_bf16(const Block& blocks, const Tokens& x, float* out) {
    const std::int64_t steps = x.padded / kDepth;
    for (std::int64_t first = 0; first < steps; first += kSteps) {
        add_tokens({run_of(x, first), blocks.codes + first * kTileBytes, blocks.bytes,
                    least(kSteps, steps - first), out, x.count * kRows, first == 0},
                   blocks.count, x.count);
    }
}

void narrow(const float* x, std::int64_t n, bf16* to) {
    std::int64_t i = 0;
    for (; i < n; i += kRows) {
        const auto some = static_cast<__mmask16>(n - i < kRows ? (1U << (n - i)) - 1U : 0xffffU);
        const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, x + i));
        const auto bits = reinterpret_cast<const __m256i&>(half);
        _mm256_mask_storeu_epi16(to + i, some, bits);
    }
}

}  // namespace quernstone::gemm::avx512_amx
