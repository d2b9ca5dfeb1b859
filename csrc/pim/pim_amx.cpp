#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "pim/kernel.h"

namespace quernstone::pim::amx {
namespace {

constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kTileBytes = 64;           // of a row
constexpr std::int64_t kCycles = 2 * kTileRows;   // of a step: two tiles of bits
constexpr std::int64_t kColumns = 2 * kTileRows;  // and two of digits

struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};
};

void configure() {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes[tile] = kTileBytes;
        config.rows[tile] = kTileRows;
    }
    _tile_loadconfig(&config);
}

// Bits of one cycle, a byte each, to every 64 rows' place.
void spread_cycle(const std::uint8_t* plane, int bit, std::int64_t rows, std::uint8_t* to) {
    const __m512i one = _mm512_set1_epi8(1);
    const __m128i shift = _mm_cvtsi32_si128(bit);
    for (std::int64_t i = 0; i < rows; i += kTileBytes) {
        const __m512i x = _mm512_loadu_si512(plane + i);
        _mm512_storeu_si512(to + i * kCycles, _mm512_and_si512(_mm512_srl_epi16(x, shift), one));
    }
}

// The same of the eight bits of a plane, `step` bytes from cycle to cycle.
void spread_plane(const std::uint8_t* plane, std::int64_t rows, std::uint8_t* to,
                  std::int64_t step) {
    const __m512i one = _mm512_set1_epi8(1);
    for (std::int64_t i = 0; i < rows; i += kTileBytes) {
        __m512i x = _mm512_loadu_si512(plane + i);
        std::uint8_t* at = to + i * kCycles;
        for (int bit = 0; bit < 8; ++bit, at += step) {
            _mm512_storeu_si512(at, _mm512_and_si512(x, one));
            x = _mm512_srli_epi16(x, 1);
        }
    }
}

// Bits of kCycles cycles from t0: [rows / 64][kCycles][64]. Cycles that are none are 0.
void spread(const CountArgs& args, std::int64_t t0, std::int64_t cycles, std::uint8_t* bits) {
    const Patterns& p = args.patterns;
    const CycleOrder& order = args.order;
    const int per_vector = order.cycles();
    std::int64_t v = t0 / per_vector;
    int c = static_cast<int>(t0 % per_vector);
    for (std::int64_t t = 0; t < kCycles;) {
        const int bit = t0 + t < cycles ? order.bit(c) : -1;
        std::uint8_t* to = bits + t * kTileBytes;
        const std::uint8_t* plane = p.data + (v * p.planes + bit / 8) * p.padded_rows;
        int done = 1;
        if (bit < 0) {
            for (std::int64_t i = 0; i < p.padded_rows; i += kTileBytes) {
                _mm512_storeu_si512(to + i * kCycles, _mm512_setzero_si512());
            }
        } else if (bit % 8 == (order.msb_first ? 7 : 0) && bit / 8 < order.bits / 8 &&
                   t + 8 <= kCycles) {
            done = 8;
            std::uint8_t* lowest = order.msb_first ? to + 7 * kTileBytes : to;
            spread_plane(plane, p.padded_rows, lowest, order.msb_first ? -kTileBytes : kTileBytes);
        } else {
            spread_cycle(plane, bit % 8, p.padded_rows, to);
        }
        t += done;
        c += done;
        if (c == per_vector) {
            c = 0;
            ++v;
        }
    }
}

// Two tiles of cycles times two, or one, of columns.
template <bool kTwo>
void step(const std::uint8_t* bits, std::int64_t rows, const std::uint8_t* quads, std::int32_t* out,
          std::int64_t stride) {
    constexpr auto kQuadRow = kBlock * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::int64_t i = 0; i < rows; i += kTileBytes) {
        const std::uint8_t* a = bits + i * kCycles;
        const std::uint8_t* b = quads + i * kBlock;
        _tile_loadd(4, a, kTileBytes);
        _tile_loadd(6, b, kQuadRow);
        _tile_loadd(5, a + kTileRows * kTileBytes, kTileBytes);
        _tile_dpbuud(0, 4, 6);
        _tile_dpbuud(2, 5, 6);
        if constexpr (kTwo) {
            _tile_loadd(7, b + kTileBytes, kQuadRow);
            _tile_dpbuud(1, 4, 7);
            _tile_dpbuud(3, 5, 7);
        }
    }
    const auto bytes = static_cast<std::size_t>(stride) * sizeof(std::int32_t);
    _tile_stored(0, out, bytes);
    _tile_stored(2, out + kTileRows * stride, bytes);
    if constexpr (kTwo) {
        _tile_stored(1, out + kTileRows, bytes);
        _tile_stored(3, out + kTileRows * stride + kTileRows, bytes);
    }
}

}  // namespace

void tiles(const CountArgs& args) {
    const std::int64_t rows = args.block.padded_rows;
    const std::int64_t cycles = args.patterns.vectors * args.order.cycles();
    auto* bits = reinterpret_cast<std::uint8_t*>(args.scratch);
    auto* sums = reinterpret_cast<std::int32_t*>(bits + kCycles * rows);
    configure();
    for (std::int64_t t0 = 0; t0 < cycles; t0 += kCycles) {
        spread(args, t0, cycles, bits);
        const std::int64_t some = std::min(kCycles, cycles - t0);
        for (std::int64_t n0 = 0; n0 < args.block.digits; n0 += kColumns) {
            const std::int64_t columns = std::min(kColumns, args.block.digits - n0);
            std::int32_t* out = args.out + t0 * args.out_stride + n0;
            const bool whole = some == kCycles && (columns == kColumns || columns == kTileRows);
            std::int32_t* to = whole ? out : sums;
            const std::int64_t stride = whole ? args.out_stride : kColumns;
            const auto run = columns > kTileRows ? step<true> : step<false>;
            run(bits, rows, args.block.quads + n0 * 4, to, stride);
            if (!whole) {
                for (std::int64_t t = 0; t < some; ++t) {
                    std::copy_n(sums + t * kColumns, columns, out + t * args.out_stride);
                }
            }
        }
    }
    _tile_release();
}

}  // namespace quernstone::pim::amx
