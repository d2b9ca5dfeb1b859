#include "quant/gptq.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel.h"
#include "common/round.h"

namespace quernstone::quant {
namespace {

// Rows that a task takes: enough to pay for its start.
constexpr std::int64_t kRows = 8;

Status check(const RoundColumnsArgs& a) noexcept {
    const auto [g, n, k] = a.weight.extent;
    QS_TRY(same("upper: matrices", a.upper.extent[0], "those of weight:", g));
    QS_TRY(same("upper: rows", a.upper.extent[1], "the columns of weight:", k));
    QS_TRY(same("upper: columns", a.upper.extent[2], "the columns of weight:", k));
    QS_TRY(same("scale: matrices", a.scale.extent[0], "those of weight:", g));
    QS_TRY(same("scale: rows", a.scale.extent[1], "those of weight:", n));
    QS_TRY(same("zero: matrices", a.zero.extent[0], "those of weight:", g));
    QS_TRY(same("zero: rows", a.zero.extent[1], "those of weight:", n));
    for (std::size_t axis = 0; axis < 3; ++axis) {
        QS_TRY(
            same("codes: extent", a.codes.extent[axis], "that of weight:", a.weight.extent[axis]));
    }
    if (k > 1 && (a.weight.stride[2] != 1 || a.upper.stride[2] != 1 || a.codes.stride[2] != 1)) {
        return invalid("weight, upper, codes", "strided rows", "contiguous ones");
    }
    const std::int64_t q = a.penalty.extent[0];
    if (q < 1 || a.lowest < std::numeric_limits<std::int16_t>::min() ||
        a.lowest + q - 1 > std::numeric_limits<std::int16_t>::max()) {
        return invalid("penalty: codes", q, "some, all within 16 bits");
    }
    return a.reach >= 0 ? Status{} : invalid("reach", a.reach, "0 or more");
}

struct Codes {
    const double* penalty;
    std::int64_t step;  // of penalty
    std::int64_t count;
    std::int64_t lowest;
    std::int64_t reach;
    double least_penalty;

    // Index of the code of least (code - x)^2 + price penalty; of equals the nearest, then the
    // lowest. NaN is the lowest code.
    [[nodiscard]] std::int64_t best(double x, double price) const noexcept {
        const double place = std::nearbyint(x) - static_cast<double>(lowest);
        const auto most = static_cast<double>(count - 1);
        const std::int64_t near =
            !(place > 0.0) ? 0 : static_cast<std::int64_t>(place < most ? place : most);
        if (reach == 0) {
            return near;
        }
        std::int64_t found = near;
        double least = cost(near, x, price);
        const auto consider = [&](std::int64_t at) {
            if (at >= 0 && at < count) {
                const double here = cost(at, x, price);
                if (here < least) {
                    least = here;
                    found = at;
                }
            }
        };
        const double floor = price * least_penalty;
        for (std::int64_t away = 1; away <= reach; ++away) {
            const double at_least = static_cast<double>(away) - 0.5;
            if (at_least * at_least + floor >= least) {
                break;
            }
            consider(near - away);
            consider(near + away);
        }
        return found;
    }

   private:
    [[nodiscard]] double cost(std::int64_t at, double x, double price) const noexcept {
        const double off = static_cast<double>(lowest + at) - x;
        return off * off + price * penalty[at * step];
    }
};

void round_row(const RoundColumnsArgs& a, const Codes& table, std::int64_t g,
               std::int64_t r) noexcept {
    const std::int64_t k = a.weight.extent[2];
    double* const row = a.weight.at(g, r, 0);
    std::int16_t* const codes = a.codes.at(g, r, 0);
    const double scale = *a.scale.at(g, r);
    const double zero = *a.zero.at(g, r);
    for (std::int64_t i = 0; i < k; ++i) {
        const double* const upper = a.upper.at(g, i, 0);
        const double size = upper[i] / scale;
        const double price = a.of_output ? size * size : 1.0;
        const std::int64_t code = table.lowest + table.best(row[i] / scale + zero, price);
        codes[i] = static_cast<std::int16_t>(code);
        const double error = (row[i] - (static_cast<double>(code) - zero) * scale) / upper[i];
        row[i] = error;
        for (std::int64_t j = i + 1; j < k; ++j) {
            row[j] -= error * upper[j];
        }
    }
}

}  // namespace

Status round_columns(const RoundColumnsArgs& args, int threads) noexcept {
    QS_TRY(check(args));
    double least = *args.penalty.at(0);
    for (std::int64_t q = 1; q < args.penalty.extent[0]; ++q) {
        least = std::min(least, *args.penalty.at(q));
    }
    const Codes table{args.penalty.data,
                      args.penalty.stride[0],
                      args.penalty.extent[0],
                      args.lowest,
                      args.reach,
                      least};
    const std::int64_t rows = args.weight.extent[1];
    const std::int64_t all = args.weight.extent[0] * rows;
    parallel_for(divide_up(all, kRows), threads, [&](std::int64_t task) noexcept {
        const std::int64_t end = std::min(all, (task + 1) * kRows);
        for (std::int64_t at = task * kRows; at < end; ++at) {
            round_row(args, table, at / rows, at % rows);
        }
    });
    return {};
}

}  // namespace quernstone::quant
