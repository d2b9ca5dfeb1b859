#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/cpu.h"
#include "levels.h"
#include "pim/superpose.h"

using namespace quernstone;
using namespace quernstone::pim;

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A chip whose numbers are small integers, so that sums in double are exact in any order.
struct Chip {
    std::int64_t cycles, macros, scores;
    std::vector<std::int64_t> begin{0};
    std::vector<double> response;  // [o, c]
    std::vector<double> currents;  // [t, stride]
    std::int64_t stride;
    std::vector<float> basis, places;

    Chip(std::int64_t t, const std::vector<std::int64_t>& nodes, std::int64_t q, std::uint64_t seed)
        : cycles(t),
          macros(static_cast<std::int64_t>(nodes.size())),
          scores(q),
          stride(macros + 3) {
        std::mt19937_64 random(seed);
        for (const std::int64_t n : nodes) {
            begin.push_back(begin.back() + n);
        }
        response.resize(static_cast<std::size_t>(begin.back() * macros));
        std::generate(response.begin(), response.end(),
                      [&] { return static_cast<double>(random() % 1024); });
        currents.assign(static_cast<std::size_t>(cycles * stride), kNaN);
        for (std::int64_t i = 0; i < cycles; ++i) {
            for (std::int64_t c = 0; c < macros; ++c) {
                // Nothing is drawn in every fifth cycle, and by many macros in others.
                const auto drawn = i % 5 == 4 ? 0 : random() % 512;
                current(i, c) = drawn % 3 == 0 ? 0.0 : static_cast<double>(drawn);
            }
        }
        screen();
    }

    double& current(std::int64_t t, std::int64_t c) {
        return currents[static_cast<std::size_t>(t * stride + c)];
    }
    double at(std::int64_t node, std::int64_t c) const {
        return response[static_cast<std::size_t>(node * macros + c)];
    }
    std::int64_t tiles(std::int64_t m) const {
        const auto i = static_cast<std::size_t>(m);
        return (begin[i + 1] - begin[i] + kNodesOfTile - 1) / kNodesOfTile;
    }
    std::int64_t all_tiles() const {
        std::int64_t total = 0;
        for (std::int64_t m = 0; m < macros; ++m) {
            total += tiles(m);
        }
        return total;
    }

    // Scores are the currents of the first macros: of the others, a score is off by all that they
    // do. Twice the roundings of README.md on top.
    void screen() {
        const std::int64_t columns = scores + 1;
        basis.assign(static_cast<std::size_t>(macros * macros * columns), 0.0F);
        places.assign(static_cast<std::size_t>(all_tiles() * scores * kNodesOfTile), 0.0F);
        const double rounding = std::ldexp(static_cast<double>(macros + scores + 8), -23);
        std::int64_t tile = 0;
        for (std::int64_t m = 0; m < macros; ++m) {
            const std::int64_t first = begin[static_cast<std::size_t>(m)];
            const std::int64_t end = begin[static_cast<std::size_t>(m) + 1];
            for (std::int64_t c = 0; c < macros; ++c) {
                double most = 0.0;
                for (std::int64_t node = first; node < end; ++node) {
                    most = std::max(most, at(node, c));
                    if (c < scores) {
                        const std::int64_t n = node - first;
                        const std::int64_t row = (tile + n / kNodesOfTile) * scores + c;
                        places[static_cast<std::size_t>(row * kNodesOfTile + n % kNodesOfTile)] =
                            static_cast<float>(at(node, c));
                    }
                }
                float* row = basis.data() + (m * macros + c) * columns;
                if (c < scores) {
                    row[c] = 1.0F;
                }
                row[scores] = static_cast<float>((c < scores ? rounding : 1.0 + rounding) * most);
            }
            tile += tiles(m);
        }
    }

    WorstArgs args(std::vector<double>& out, std::int64_t out_stride) const {
        const std::int64_t columns = scores + 1;
        return {{currents.data(), {cycles, macros}, {stride, 1}},
                {response.data(), {begin.back(), macros}, {macros, 1}},
                {begin.data(), {macros + 1}, {1}},
                {basis.data(), {macros, macros, columns}, {macros * columns, columns, 1}},
                {places.data(),
                 {all_tiles(), scores, kNodesOfTile},
                 {scores * kNodesOfTile, kNodesOfTile, 1}},
                1.0 / 512,
                {out.data(), {cycles, macros}, {out_stride, 1}}};
    }

    double worst(std::int64_t t, std::int64_t m) {
        double most = 0.0;
        for (std::int64_t node = begin[static_cast<std::size_t>(m)];
             node < begin[static_cast<std::size_t>(m) + 1]; ++node) {
            double drop = 0.0;
            for (std::int64_t c = 0; c < macros; ++c) {
                drop += current(t, c) * at(node, c);
            }
            most = std::max(most, drop);
        }
        return most;
    }
};

void worst_drops_are_those_of_all_nodes(Chip chip, std::int64_t spare, int threads) {
    const std::int64_t stride = chip.macros + spare;
    std::vector<double> out(static_cast<std::size_t>(chip.cycles * stride), kNaN);
    CHECK(worst_drops(chip.args(out, stride), threads).ok());
    for (std::int64_t t = 0; t < chip.cycles; ++t) {
        for (std::int64_t m = 0; m < stride; ++m) {
            const double got = out[static_cast<std::size_t>(t * stride + m)];
            if (m < chip.macros) {
                CHECK_EQ(got, chip.worst(t, m));
            } else {
                CHECK(std::isnan(got));
            }
        }
    }
}

}  // namespace

TEST(pim_worst_drops_are_those_of_all_nodes) {
    at_every_level([] {
        std::uint64_t seed = 0;
        // Cycles around the lanes and the task, nodes around the tile, macros beside the scores.
        for (const std::int64_t cycles : {0, 1, 15, 17, 257}) {
            worst_drops_are_those_of_all_nodes({cycles, {1}, 7, ++seed}, 0, 1);
            worst_drops_are_those_of_all_nodes({cycles, {17, 1, 16, 33, 5}, 7, ++seed}, 2, 2);
            worst_drops_are_those_of_all_nodes(
                {cycles, {15, 31, 2, 47, 16, 1, 3, 64, 9, 18, 20}, 7, ++seed}, 0, 3);
            worst_drops_are_those_of_all_nodes(
                {cycles, {40, 16, 7, 1, 8, 21, 3, 5, 13}, 15, ++seed}, 1, 2);
        }
    });
}

TEST(pim_worst_drops_of_no_macros_are_none) {
    at_every_level([] { worst_drops_are_those_of_all_nodes({19, {}, 7, 1}, 2, 2); });
}

TEST(pim_worst_drops_refuse_what_does_not_fit_before_they_read) {
    const Chip chip(3, {4, 5}, 7, 1);
    std::vector<double> out(6);
    const auto refused = [&](auto change) {
        WorstArgs args = chip.args(out, 2);
        change(args);
        return std::string(worst_drops(args, 1).what);
    };
    CHECK_EQ(refused([](WorstArgs& args) { args.response.extent[1] = 3; }), "response.shape[1]");
    CHECK_EQ(refused([](WorstArgs& args) { args.response.extent[0] = 8; }), "response.shape[0]");
    CHECK_EQ(refused([](WorstArgs& args) { args.begin.extent[0] = 2; }), "begin.shape[0]");
    CHECK_EQ(refused([](WorstArgs& args) { args.basis.extent[2] = 7; }), "basis.shape[2]");
    CHECK_EQ(refused([](WorstArgs& args) { args.places.extent[0] = 1; }), "places.shape[0]");
    CHECK_EQ(refused([](WorstArgs& args) { args.out.extent[0] = 2; }), "out.shape[0]");
    constexpr std::array<std::int64_t, 3> kEmpty{0, 0, 9};
    CHECK_EQ(refused([&](WorstArgs& args) { args.begin.data = kEmpty.data(); }),
             "begin: nodes of a macro");
}
