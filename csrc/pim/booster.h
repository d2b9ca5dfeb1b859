#pragma once

#include <cstdint>
#include <span>

#include "common/status.h"
#include "common/view.h"

// A chip of macros that sets the voltage and the clock of its groups by how much the supply drops
// (IR-Booster of AIM, arXiv 2511.04321), cycle by cycle. See README.md.
//
// Axes: t cycles of work, m macros, g groups of macros, l levels, from the most aggressive on.
namespace quernstone::pim {

// What a group runs at, by level. A cell works at a level's clock where the voltage that reaches it
// is `need` or more.
struct Levels {
    std::span<const double> volts;  // [l]
    std::span<const double> hertz;  // [l]
    std::span<const double> need;   // [l] V
};

struct Control {
    bool adapt = true;           // false: every group stays at its first level
    std::int64_t patience = 50;  // good cycles before a group goes on to a lower level
    std::int64_t relapse = 200;  // a failure so soon after taking a level up takes the aim back
    std::int64_t recompute = 8;  // cycles of work that a failure loses
    std::int64_t stall = 4;      // cycles that a group stands still after one
    std::int64_t backoff = 2;    // what a relapse multiplies the patience for the next aim by
};

struct BoosterArgs {
    View<const double, 2> dynamic;   // [t, m] A at nominal voltage and clock, what switching draws
    View<const double, 1> leak;      // [m] A at nominal voltage
    View<const double, 2> response;  // [m, m] V at the first macro for 1 A at the second
    std::span<const std::int64_t> group;   // [m]
    std::span<const std::int64_t> domain;  // [g] groups of one domain share the slowest's clock
    std::span<const std::int64_t> safe;    // [g] level that is taken after a failure
    std::span<const std::int64_t> first;   // [g] level at the beginning
    Levels levels;
    Control control;
    double nominal_volts = 0.0, nominal_hertz = 0.0;
};

enum class Event : std::uint8_t { kLevel, kFailure, kDone };

struct Change {
    double time = 0.0;  // s
    std::int32_t group = 0;
    std::int32_t level = 0;  // from then on
    Event event = Event::kLevel;
};

struct BoosterResult {
    std::span<double> seconds, joules;         // [g]
    std::span<std::int64_t> cycles;            // [g] clock cycles, lost and stalled ones included
    std::span<std::int64_t> failures, beyond;  // [g]; beyond: those at the safe level or above it
    View<std::int64_t, 2> at_level;            // [g, l] cycles
    std::span<double> worst;                   // [m] V, the greatest drop
    std::span<Change> changes;                 // the first so many
    std::int64_t changed = 0;                  // how many there were
};

// Depends on nothing but the arguments. Cost: t m^2 multiplications, and more for lost work.
[[nodiscard]] Status boost(const BoosterArgs& args, BoosterResult& out) noexcept;

}  // namespace quernstone::pim
