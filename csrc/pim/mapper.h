#pragma once

#include <cstdint>
#include <span>

#include "common/status.h"

// Which group of macros holds each part of a network, when a group has one voltage and the parts of
// one operator have one clock (AIM, arXiv 2511.04321). See README.md.
//
// Axes: n tasks (macros' worth of weights), g groups, l levels, s sets (operators).
namespace quernstone::pim {

inline constexpr std::int64_t kMostTasks = 4096;

enum class Objective : std::uint8_t {
    kEnergy,   // sum of weight times the square of its group's voltage
    kLatency,  // the last task's end, and a thousandth of the mean of all
};

struct Mapping {
    std::span<const std::int64_t> level;   // [n] of the task by its own weights
    std::span<const std::int64_t> set;     // [n] 0 to s - 1
    std::span<const std::int64_t> pinned;  // [n] a group, or -1
    std::span<const double> weight;        // [n] cycles of work; for energy, charge
    std::span<const double> volts, hertz;  // [l]
    std::int64_t groups = 0, places = 0;   // places: macros of a group
    Objective objective = Objective::kEnergy;
};

// What `group` costs. Checks everything, the assignment too.
[[nodiscard]] Status cost(const Mapping& problem, std::span<const std::int64_t> group,
                          double& out) noexcept;

// Simulated annealing by exchanges between groups, from tasks sorted by level; `group` [n] is
// written. Equal seeds give equal results. Cost: moves x (n + g + s).
[[nodiscard]] Status anneal(const Mapping& problem, std::int64_t moves, std::uint64_t seed,
                            std::span<std::int64_t> group, double& cost) noexcept;

// The optimum, by branch and bound over divisions into groups that differ. Refuses a problem that
// takes more than 2^22 partial divisions.
[[nodiscard]] Status solve(const Mapping& problem, std::span<std::int64_t> group,
                           double& cost) noexcept;

}  // namespace quernstone::pim
