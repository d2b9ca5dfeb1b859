#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "pim/mapper.h"

using namespace quernstone;
using namespace quernstone::pim;

namespace {

using Indices = std::vector<std::int64_t>;

struct Problem {
    Indices level, set, pinned;
    std::vector<double> weight;
    std::int64_t groups, places;
    std::vector<double> volts{0.5, 0.625, 0.75, 1.0};
    std::vector<double> hertz{4.0, 3.0, 2.0, 1.0};

    Mapping mapping(Objective objective) const {
        return {level, set, pinned, weight, volts, hertz, groups, places, objective};
    }
};

bool fits(const Problem& p, const Indices& group) {
    for (std::int64_t g = 0; g < p.groups; ++g) {
        if (std::count(group.begin(), group.end(), g) > p.places) {
            return false;
        }
    }
    for (std::size_t i = 0; i < group.size(); ++i) {
        if (p.pinned[i] >= 0 && p.pinned[i] != group[i]) {
            return false;
        }
    }
    return true;
}

double plain_cost(const Problem& p, const Indices& group, Objective objective) {
    const std::size_t n = group.size();
    Indices level = p.level;  // of each task's group; for latency, of the groups tied to it
    for (std::size_t round = 0; round < n; ++round) {
        for (std::size_t i = 0; i < n; ++i) {
            for (std::size_t j = 0; j < n; ++j) {
                const bool tied = objective == Objective::kLatency && p.set[i] == p.set[j];
                if (group[i] == group[j] || tied) {
                    level[i] = std::max(level[i], level[j]);
                }
            }
        }
    }
    double energy = 0.0;
    double last = 0.0;
    double sum = 0.0;
    for (std::size_t i = 0; i < n; ++i) {
        const auto l = static_cast<std::size_t>(level[i]);
        energy += p.weight[i] * p.volts[l] * p.volts[l];
        const double time = p.weight[i] / p.hertz[l];
        last = std::max(last, time);
        sum += time;
    }
    return objective == Objective::kEnergy ? energy : last + 1e-3 * sum / static_cast<double>(n);
}

// Fewer than twenty operations, each to half a unit in the last place.
bool close(double a, double b) { return std::abs(a - b) <= 1e-14 * b; }

void the_optimum_is_that_of_all_divisions(const Problem& p) {
    const std::size_t n = p.level.size();
    for (const Objective objective : {Objective::kEnergy, Objective::kLatency}) {
        const Mapping mapping = p.mapping(objective);
        double least = std::numeric_limits<double>::infinity();
        Indices group(n, 0);
        for (bool more = true; more;) {
            double told = -1.0;
            const bool valid = fits(p, group);
            CHECK_EQ(cost(mapping, group, told).ok(), valid);
            if (valid) {
                CHECK(close(told, plain_cost(p, group, objective)));
                least = std::min(least, plain_cost(p, group, objective));
            }
            std::size_t i = 0;
            for (; i < n && ++group[i] == p.groups; ++i) {
                group[i] = 0;
            }
            more = i < n;
        }
        Indices best(n, -7);
        double told = -1.0;
        CHECK(solve(mapping, best, told).ok());
        CHECK(fits(p, best));
        CHECK(close(told, least));
        CHECK(close(plain_cost(p, best, objective), least));
        for (const std::uint64_t seed : {1, 2, 3}) {
            Indices found(n, -7);
            Indices again(n, -7);
            CHECK(anneal(mapping, 500, seed, found, told).ok());
            CHECK(fits(p, found));
            CHECK(close(told, plain_cost(p, found, objective)));
            CHECK(told >= least * (1.0 - 1e-14));
            CHECK(anneal(mapping, 500, seed, again, told).ok());
            CHECK(found == again);
        }
    }
}

}  // namespace

TEST(pim_mapping_gives_the_optimum_of_all_divisions) {
    the_optimum_is_that_of_all_divisions({{2}, {0}, {-1}, {3.0}, 1, 1});
    the_optimum_is_that_of_all_divisions(
        {{3, 0, 1, 0, 2}, {0, 0, 1, 1, 2}, {-1, -1, -1, -1, -1}, {5, 1, 2, 7, 3}, 3, 2});
    the_optimum_is_that_of_all_divisions(
        {{0, 3, 0, 3, 1, 2}, {0, 1, 2, 2, 3, 3}, {-1, 1, -1, -1, 0, -1}, {4, 4, 1, 2, 8, 3}, 3, 3});
}

TEST(pim_mapping_refuses_what_has_no_place) {
    Problem p{{0, 1, 2}, {0, 0, 1}, {-1, -1, -1}, {1, 1, 1}, 1, 2};
    Indices group(3, 0);
    double told = 0.0;
    const auto refused = [&] {
        const Status status = solve(p.mapping(Objective::kEnergy), group, told);
        return status.ok() ? std::string() : std::string(status.what);
    };
    CHECK_EQ(refused(), "level.shape[0] (tasks)");
    p.groups = 2;
    p.pinned = {1, 1, 1};
    CHECK_EQ(refused(), "pinned: tasks of one group");
    p.pinned = {1, 1, 2};
    CHECK_EQ(refused(), "pinned");
    p.pinned = {1, 1, 0};
    p.level[2] = 4;
    CHECK_EQ(refused(), "level");
    p.level[2] = 2;
    CHECK_EQ(refused(), "");
}
