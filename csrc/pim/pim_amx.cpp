#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "pim/kernel.h"

namespace quernstone::pim::amx {
namespace {

constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kTileBytes = 64;          // of a row
constexpr std::int64_t kPlanes = kTileRows / 8;  // whole planes that a tile of bits may hold
constexpr int kMostTiles = kBlock / kTileRows;   // of digits

struct alignas(64) TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes[16] = {};
    std::uint8_t rows[16] = {};

    constexpr TileConfig() {
        for (int tile = 0; tile < 8; ++tile) {
            bytes[tile] = kTileBytes;
            rows[tile] = kTileRows;
        }
    }
};

// A constant: gcc takes the instruction to read eight bytes and may leave out stores of the others.
constexpr TileConfig kConfig;

// Where the bits of the next cycles of a tile are.
class Cycles {
   public:
    explicit Cycles(const CountArgs& args)
        : patterns_(args.patterns),
          order_(args.order),
          left_(args.patterns.vectors * args.order.cycles()) {
        next();
    }

    void next() {
        for (std::int64_t half = 0; half < kPlanes; ++half) {
            const int bit = left_ > 0 ? order_.bit(cycle_) : -1;
            const bool in_order =
                left_ >= 8 && cycle_ + 8 <= order_.bits && bit % 8 == (order_.msb_first ? 7 : 0);
            whole_[half] = in_order ? plane_of(bit) : nullptr;
            if (in_order) {
                advance(8);
                continue;
            }
            for (std::int64_t row = half * 8; row < half * 8 + 8; ++row) {
                const int one = left_ > 0 ? order_.bit(cycle_) : -1;
                plane_[row] = one < 0 ? nullptr : plane_of(one);
                shift_[row] = _mm_cvtsi32_si128(one % 8);
                advance(1);
            }
        }
    }

    // Bits of 64 rows from i, a byte each, to a tile.
    void spread(std::int64_t i, std::uint8_t* to) const {
        const __m512i one = _mm512_set1_epi8(1);
        for (std::int64_t half = 0; half < kPlanes; ++half, to += 8 * kTileBytes) {
            if (whole_[half] != nullptr) {
                __m512i x = _mm512_loadu_si512(whole_[half] + i);
                const std::int64_t step = order_.msb_first ? -kTileBytes : kTileBytes;
                std::uint8_t* at = order_.msb_first ? to + 7 * kTileBytes : to;
                for (int bit = 0; bit < 8; ++bit, at += step) {
                    _mm512_store_si512(at, _mm512_and_si512(x, one));
                    x = _mm512_srli_epi16(x, 1);
                }
                continue;
            }
            for (std::int64_t t = 0; t < 8; ++t) {
                const std::int64_t row = half * 8 + t;
                __m512i bits = _mm512_setzero_si512();
                if (plane_[row] != nullptr) {
                    const __m512i x = _mm512_loadu_si512(plane_[row] + i);
                    bits = _mm512_and_si512(_mm512_srl_epi16(x, shift_[row]), one);
                }
                _mm512_store_si512(to + t * kTileBytes, bits);
            }
        }
    }

   private:
    const std::uint8_t* plane_of(int bit) const {
        return patterns_.data + (vector_ * patterns_.planes + bit / 8) * patterns_.padded_rows;
    }
    void advance(int cycles) {
        left_ -= cycles;
        cycle_ += cycles;
        if (cycle_ == order_.cycles()) {
            cycle_ = 0;
            ++vector_;
        }
    }

    const Patterns& patterns_;
    const CycleOrder& order_;
    std::int64_t left_, vector_ = 0;
    int cycle_ = 0;
    const std::uint8_t* plane_[kTileRows];  // null: a cycle in which nothing changes
    __m128i shift_[kTileRows];
    const std::uint8_t* whole_[kPlanes];  // eight cycles that are a plane's bits, else null
};

// A tile of cycles times kTiles of columns. `bits` [rows / 64][16][64] are theirs, and become those
// of the next: vector registers spread them while the tiles multiply.
template <int kTiles>
void step(std::uint8_t* bits, const Cycles* next, std::int64_t rows, const std::uint8_t* quads,
          std::int32_t* out, std::int64_t stride) {
    constexpr auto kQuadRow = kBlock * 4;
    _tile_zero(0);
    if constexpr (kTiles > 1) _tile_zero(1);
    if constexpr (kTiles > 2) _tile_zero(2);
    if constexpr (kTiles > 3) _tile_zero(3);
    for (std::int64_t i = 0; i < rows; i += kTileBytes) {
        std::uint8_t* a = bits + i * kTileRows;
        const std::uint8_t* b = quads + i * kBlock;
        _tile_loadd(4, a, kTileBytes);
        _tile_loadd(5, b, kQuadRow);
        if constexpr (kTiles > 1) _tile_loadd(6, b + kTileBytes, kQuadRow);
        _tile_dpbuud(0, 4, 5);
        if constexpr (kTiles > 1) _tile_dpbuud(1, 4, 6);
        if constexpr (kTiles > 2) {
            _tile_loadd(7, b + 2 * kTileBytes, kQuadRow);
            _tile_dpbuud(2, 4, 7);
        }
        if constexpr (kTiles > 3) {
            _tile_loadd(5, b + 3 * kTileBytes, kQuadRow);
            _tile_dpbuud(3, 4, 5);
        }
        if (next != nullptr) {
            next->spread(i, a);
        }
    }
    const auto bytes = static_cast<std::size_t>(stride) * sizeof(std::int32_t);
    _tile_stored(0, out, bytes);
    if constexpr (kTiles > 1) _tile_stored(1, out + kTileRows, bytes);
    if constexpr (kTiles > 2) _tile_stored(2, out + 2 * kTileRows, bytes);
    if constexpr (kTiles > 3) _tile_stored(3, out + 3 * kTileRows, bytes);
}

// Whole cache lines of `to`, as far as there are any.
inline void copy(const std::int32_t* from, std::int64_t n, std::int32_t* to) {
    constexpr std::int64_t kLanes = kTileBytes / sizeof(std::int32_t);
    const auto past = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) / 4 % kLanes);
    for (std::int64_t i = 0, some = kLanes - past; i < n; i += some, some = kLanes) {
        some = std::min(some, n - i);
        if (some == kLanes) {
            _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
        } else {
            std::copy_n(from + i, some, to + i);
        }
    }
}

using Step = void (*)(std::uint8_t*, const Cycles*, std::int64_t, const std::uint8_t*,
                      std::int32_t*, std::int64_t);
constexpr Step kSteps[kMostTiles] = {step<1>, step<2>, step<3>, step<4>};

}  // namespace

void tiles(const CountArgs& args) {
    const std::int64_t rows = args.block.padded_rows;
    const std::int64_t cycles = args.patterns.vectors * args.order.cycles();
    auto* bits = reinterpret_cast<std::uint8_t*>(args.scratch);
    auto* sums = reinterpret_cast<std::int32_t*>(bits + kTileRows * rows);
    const std::int64_t digits = args.block.digits;
    const Step step = kSteps[(digits - 1) / kTileRows];
    _tile_loadconfig(&kConfig);
    Cycles next(args);
    for (std::int64_t i = 0; i < rows; i += kTileBytes) {
        next.spread(i, bits + i * kTileRows);
    }
    for (std::int64_t t0 = 0; t0 < cycles; t0 += kTileRows) {
        const std::int64_t some = std::min(kTileRows, cycles - t0);
        const bool last = t0 + kTileRows >= cycles;
        if (!last) {
            next.next();
        }
        std::int32_t* out = args.out + t0 * args.out_stride;
        // A store of a tile whose rows cross cache lines takes half as long again as the products.
        const bool whole = some == kTileRows && digits % kTileRows == 0 &&
                           args.out_stride % 16 == 0 &&
                           reinterpret_cast<std::uintptr_t>(out) % kTileBytes == 0;
        step(bits, last ? nullptr : &next, rows, args.block.quads, whole ? out : sums,
             whole ? args.out_stride : kBlock);
        if (!whole && digits == kBlock && args.out_stride == kBlock) {
            copy(sums, some * kBlock, out);
        } else if (!whole) {
            for (std::int64_t t = 0; t < some; ++t) {
                copy(sums + t * kBlock, digits, out + t * args.out_stride);
            }
        }
    }
    _tile_release();
}

}  // namespace quernstone::pim::amx
