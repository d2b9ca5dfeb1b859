#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/view.h"

// Columns of matrices rounded one after the other, each error passed on to the columns to come.
namespace quernstone::quant {

// Axes: g matrices, n rows (outputs), k columns (inputs), q codes from lowest to highest.
struct RoundColumnsArgs {
    View<double, 3> weight;         // [g, n, k] in: numbers; out: error / upper_ii
    View<const double, 3> upper;    // [g, k, k] U of H^-1 = U^T U; only i <= j is read
    View<const double, 2> scale;    // [g, n] above 0
    View<const double, 2> zero;     // [g, n] the code of the number 0
    View<const double, 1> penalty;  // [q] what a code costs
    View<std::int16_t, 3> codes;    // [g, n, k]
    std::int64_t lowest = 0;
    std::int64_t reach = 0;  // codes on either side of the nearest
    bool of_output = false;  // the penalty counts in squared error of the output,
                             // (step scale / upper_ii)^2 for each step; else in step^2
};

// Rows of weight, upper and codes are contiguous. Beyond them nothing is known of columns to come:
// weight[..., k:] -= errors upper[:k, k:] is the caller's.
[[nodiscard]] Status round_columns(const RoundColumnsArgs& args, int threads) noexcept;

}  // namespace quernstone::quant
