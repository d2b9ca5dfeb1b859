#pragma once

#include <cstdint>

#include "pim/pim.h"

// What an instruction-set level gives: one tile of rows in some vectors against blocks of columns.
namespace quernstone::pim {

// The bits of a pattern: which changes of a line there are in one vector, or its levels. Bit k is
// that of input bit k; bit `bits` is the return to 0 before idle cycles. Bytes of eight bits
// each, [v, plane, padded rows].
struct Patterns {
    const std::uint8_t* data;
    std::int64_t vectors, padded_rows;
    int planes;
};

// The bit of the pattern that is cycle c of a vector, or -1: nothing changes.
struct CycleOrder {
    int bits, idle;
    bool msb_first;

    [[nodiscard]] constexpr int bit(int cycle) const noexcept {
        return cycle < bits ? (msb_first ? bits - 1 - cycle : cycle) : cycle == bits ? bits : -1;
    }
    [[nodiscard]] constexpr int cycles() const noexcept { return bits + idle; }
};

struct ExtractArgs {
    const std::byte* x;  // first vector, first row
    std::int64_t stride, vectors, rows, padded_rows;
    Lines lines;
    bool levels;          // the bits themselves, for a product
    std::uint8_t* level;  // [rows, rounded up to 64] before the first vector; overwritten
    std::uint8_t* out;    // Patterns
};

// kBlock digits of every row of a tile, in three orders. `rows`: [padded rows][64], digit
// (p & 1) * 32 + p / 2 at place p. `quads`: [padded rows / 4][64][4]. `columns`: [64][padded rows],
// of kRowOnes alone.
struct Block {
    const std::uint8_t* rows;
    const std::uint8_t* quads;
    const std::uint8_t* columns;
    std::int64_t padded_rows;
    std::int64_t digits;  // in use
    std::int64_t digits_of_column;
    int peak;
};

struct CountArgs {
    Patterns patterns;
    CycleOrder order;
    Block block;
    std::int32_t* out;        // [vectors * cycles, block.digits]
    std::int64_t out_stride;  // elements
    const std::uint64_t* masks;
    std::byte* scratch;  // scratch_bytes()
};

// Enough for any of the formulations.
[[nodiscard]] std::int64_t scratch_bytes(std::int64_t cycles, std::int64_t padded_rows) noexcept;

struct Kernels {
    void (*extract8)(const ExtractArgs& args);   // inputs of 8 bits
    void (*extract16)(const ExtractArgs& args);  // and of 16
    // Masks of 64 rows for every cycle: out[v * cycles + c][padded rows / 64].
    void (*masks)(const Patterns& patterns, const CycleOrder& order, std::uint64_t* out);
    void (*table)(const CountArgs& args);
    // Whole columns, out [vectors * cycles, columns], from `columns`: the way for few of them.
    void (*few)(const CountArgs& args);
    void (*ones)(const std::byte* data, std::int64_t bytes, bool wide, int bits, bool is_signed,
                 Ones& out);
    // Loads `bytes` from `at`, 64 at a time, over and over: what the L1 cache gives at best.
    void (*loads)(const std::byte* at, std::int64_t bytes, std::int64_t repeats);
    // y[n] += partial[n] << shift, or minus that; n of kBlock
    void (*shift_add)(const std::int32_t* partial, int shift, bool negative, std::int64_t* y);
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
void dot(const CountArgs& args);
void few_columns(const CountArgs& args);
}  // namespace avx512_bf16_vnni
namespace amx {
void tiles(const CountArgs& args);
}

}  // namespace quernstone::pim
