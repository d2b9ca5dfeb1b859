#pragma once

#include <cstdint>

#include "common/status.h"
#include "common/view.h"

// The worst drop within each macro of a chip, cycle by cycle, from what an ampere of each does to
// each node. README.md has the bound.
//
// Axes: t cycles, c macros, o nodes of all macros, one macro's after another's; q of the scores.
namespace quernstone::pim {

inline constexpr std::int64_t kNodesOfTile = 16;  // nodes that are scored together
inline constexpr std::int64_t kScoreColumns = 8;  // what the columns of `basis` are a multiple of

struct WorstArgs {
    View<const double, 2> currents;     // [t, c] from 0 on, last axis contiguous
    View<const double, 2> response;     // [o, c] volts an ampere, contiguous
    View<const std::int64_t, 1> begin;  // [c + 1] first node of each macro, and o
    // [macro, c, q + 1]: scores, and in the last column what a score is off by at most.
    View<const float, 3> basis;
    // [tiles of all macros, q, kNodesOfTile]: each macro's nodes, rounded up to tiles.
    View<const float, 3> places;
    double unit = 1.0;    // currents are multiplied by it before they are rounded to float
    View<double, 2> out;  // [t, c], last axis contiguous
};

// out[t, m] = max over nodes o of macro m of sum over c of currents[t, c] response[o, c]: scores of
// float choose the nodes that are summed in double. No result depends on the number of threads.
[[nodiscard]] Status worst_drops(const WorstArgs& args, int threads) noexcept;

}  // namespace quernstone::pim
