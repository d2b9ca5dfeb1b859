#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/view.h"

// The adder trees and accumulators of bit-serial macros, bit by bit: what switches in them, as a
// model of current that does not start from the toggles of cell products. README.md has the model.
//
// Axes: o outputs, i inputs, v vectors; t = v * input_bits cycles; r, b tiles; s stages.
namespace quernstone::pim {

struct TreeArgs {
    View<const std::int32_t, 2> weights;  // [o, i]
    View<const std::int32_t, 2> inputs;   // [v, i]
    std::int64_t rows = 0, banks = 0;     // of a macro
    int weight_bits = 8, input_bits = 8;  // 1 to 16
    bool input_signed = true, msb_first = false;
    // [t, r, b, s]: bits that change from the cycle before, of all banks of a macro. Stage 0 is the
    // cell products, stage l the sums of 2^l rows, and the last the accumulators. Everything is 0
    // before the first cycle.
    View<std::int64_t, 4> out;
};

// ceil(log2(rows)) + 2
[[nodiscard]] std::int64_t tree_stages(std::int64_t rows) noexcept;

[[nodiscard]] Status tree_toggles(const TreeArgs& args, int threads) noexcept;

}  // namespace quernstone::pim
