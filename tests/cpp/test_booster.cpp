#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "pim/booster.h"

using namespace quernstone;
using namespace quernstone::pim;

namespace {

using Numbers = std::vector<double>;
using Indices = std::vector<std::int64_t>;

struct Chip {
    std::int64_t cycles, macros, stride;
    Numbers dynamic;   // [t, stride]
    Numbers leak;      // [m]
    Numbers response;  // [m, m]
    Indices group, domain, safe, first;
    Numbers volts{0.5, 0.75};
    Numbers hertz{1.0, 0.5};
    Numbers need{0.375, 0.375};
    Control control{};

    BoosterArgs args() const {
        return {{dynamic.data(), {cycles, macros}, {stride, 1}},
                {leak.data(), {macros}, {1}},
                {response.data(), {macros, macros}, {macros, 1}},
                group,
                domain,
                safe,
                first,
                {volts, hertz, need},
                control,
                1.0,
                1.0};
    }
};

struct Run {
    Numbers seconds, joules, worst;
    Indices cycles, failures, beyond, at_level;
    std::vector<Change> changes;
    BoosterResult result;

    explicit Run(const Chip& chip) {
        const std::size_t groups = chip.domain.size();
        const std::size_t levels = chip.volts.size();
        for (Numbers* x : {&seconds, &joules}) {
            x->assign(groups, 0.0);
        }
        for (Indices* x : {&cycles, &failures, &beyond}) {
            x->assign(groups, 0);
        }
        worst.assign(static_cast<std::size_t>(chip.macros), 0.0);
        at_level.assign(groups * levels, 0);
        changes.resize(8);
        const auto wide = static_cast<std::int64_t>(levels);
        result = {seconds,  joules,  cycles,
                  failures, beyond,  {at_level.data(), {std::int64_t(groups), wide}, {wide, 1}},
                  worst,    changes, 0};
        CHECK(boost(chip.args(), result).ok());
    }
};

}  // namespace

TEST(pim_macros_without_failures_draw_what_plain_sums_tell) {
    constexpr std::int64_t kCycles = 37;
    constexpr std::int64_t kMacros = 5;
    Chip chip{kCycles, kMacros,         kMacros + 2, {},        {},
              {},      {0, 1, 0, 2, 1}, {0, 1, 2},   {1, 1, 1}, {0, 0, 0}};
    chip.control.adapt = false;
    for (std::int64_t i = 0; i < kCycles * chip.stride; ++i) {
        chip.dynamic.push_back(static_cast<double>(i * 7 % 13) / 1024);
    }
    for (std::int64_t m = 0; m < kMacros; ++m) {
        chip.leak.push_back(static_cast<double>(m) / 2048);
        for (std::int64_t k = 0; k < kMacros; ++k) {
            chip.response.push_back(1.0 / static_cast<double>(std::int64_t{1} << std::abs(m - k)));
        }
    }
    const Run run(chip);
    Numbers joules(3, 0.0);
    Numbers worst(kMacros, 0.0);
    // Powers of two and small integers: all sums are exact.
    for (std::int64_t t = 0; t < kCycles; ++t) {
        Numbers drop(kMacros, 0.0);
        for (std::size_t k = 0; k < kMacros; ++k) {
            const double amperes = 0.5 * (chip.leak[k] + *chip.args().dynamic.at(t, k));
            joules[static_cast<std::size_t>(chip.group[k])] += 0.5 * amperes;
            for (std::size_t m = 0; m < kMacros; ++m) {
                drop[m] += chip.response[m * kMacros + k] * amperes;
            }
        }
        for (std::size_t m = 0; m < kMacros; ++m) {
            worst[m] = std::max(worst[m], drop[m]);
        }
    }
    CHECK(run.joules == joules);
    CHECK(run.worst == worst);
    for (std::size_t g = 0; g < 3; ++g) {
        CHECK_EQ(run.cycles[g], kCycles);
        CHECK_EQ(run.seconds[g], static_cast<double>(kCycles));
        CHECK_EQ(run.failures[g], 0);
    }
}

TEST(pim_a_failure_costs_the_cycles_that_are_lost_and_those_that_it_stands) {
    Chip chip{20, 1, 1, Numbers(20, 0.125), {0.0}, {1.0}, {0}, {0}, {1}, {0}};
    // At 0.5 V it draws a quarter of an ampere and is left with a quarter of a volt; at 0.75 V and
    // half the clock it has 0.5625 V.
    chip.dynamic[5] = 0.5;
    chip.control.recompute = 2;
    chip.control.stall = 3;
    chip.control.patience = 1000;
    const Run run(chip);
    // Six cycles, the last of which fails; three that it stands; the work from the fourth cycle on.
    CHECK_EQ(run.failures[0], 1);
    CHECK_EQ(run.beyond[0], 0);
    CHECK_EQ(run.at_level[0], 6);
    CHECK_EQ(run.at_level[1], 3 + 17);
    CHECK_EQ(run.cycles[0], 26);
    CHECK_EQ(run.seconds[0], 6 / 1.0 + 20 / 0.5);
    CHECK_EQ(run.worst[0], 0.25);
    CHECK_EQ(run.result.changed, 2);
    CHECK(run.changes[0].event == Event::kFailure);
    CHECK_EQ(run.changes[0].time, 6.0);
    CHECK_EQ(run.changes[0].level, 1);
    CHECK(run.changes[1].event == Event::kDone);
}

TEST(pim_a_chip_whose_numbers_do_not_fit_is_refused) {
    Chip chip{1, 1, 1, {0.0}, {0.0}, {1.0}, {0}, {0}, {1}, {0}};
    BoosterResult none;
    chip.group[0] = 1;
    CHECK_EQ(boost(chip.args(), none).what, std::string("group"));
    chip.group[0] = 0;
    chip.leak[0] = -1.0;
    CHECK_EQ(boost(chip.args(), none).what, std::string("leak"));
    chip.leak[0] = 0.0;
    chip.hertz[1] = 2.0;
    CHECK_EQ(boost(chip.args(), none).what, std::string("hertz: level"));
}
