#include "pim/tree.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <new>
#include <vector>

#include "common/cpu.h"
#include "common/parallel.h"
#include "pim/pim.h"
#include "pim/tree_kernel.h"

namespace quernstone::pim {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

const TreeKernels& kernels() {
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kBaseline:
            break;
        case Isa::kAvx2:
            return kTreeAvx2;
        default:
            return kTreeAvx512;
    }
#endif
    return kTreeScalar;
}

Status check(const TreeArgs& args) {
    const std::int64_t tiles_r = (args.inputs.extent[1] + args.rows - 1) / args.rows;
    const std::int64_t tiles_b = (args.weights.extent[0] + args.banks - 1) / args.banks;
    QS_TRY(same("inputs.shape[1]", args.inputs.extent[1], "weights.shape[1],",
                args.weights.extent[1]));
    QS_TRY(same("out.shape[0]", args.out.extent[0], "vectors times bits,",
                args.inputs.extent[0] * args.input_bits));
    QS_TRY(same("out.shape[1]", args.out.extent[1], "tiles of rows,", tiles_r));
    QS_TRY(same("out.shape[2]", args.out.extent[2], "tiles of banks,", tiles_b));
    return same("out.shape[3]", args.out.extent[3], "stages,", tree_stages(args.rows));
}

// Banks of one macro that are computed together: the nodes of their trees, level by level.
class Trees {
   public:
    Trees(const TreeArgs& args, std::int64_t row_tile, std::int64_t bank)
        : args_(args), row_(row_tile * args.rows) {
        const std::int64_t banks =
            std::min({args.banks - bank % args.banks, kTreeBanks, args.weights.extent[0] - bank});
        const std::int64_t rows = std::min(args.rows, args.weights.extent[1] - row_);
        weights_.assign(at(rows * kTreeBanks), 0);
        ones_.assign(at(rows), 0);
        const std::uint32_t mask = (1U << args.weight_bits) - 1;
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t b = 0; b < banks; ++b) {
                const std::int32_t w = *args.weights.at(bank + b, row_ + i);
                weights_[at(i * kTreeBanks + b)] = w;
                ones_[at(i)] += std::popcount(static_cast<std::uint32_t>(w) & mask);
            }
        }
        levels_.push_back({std::vector<std::int32_t>(at(rows * kTreeBanks), 0),
                           std::vector<std::uint8_t>(at(rows), 0)});
        for (std::int64_t l = 1, nodes = rows; l + 1 < tree_stages(args.rows); ++l) {
            nodes = (nodes + 1) / 2;
            levels_.push_back({std::vector<std::int32_t>(at(nodes * kTreeBanks), 0),
                               std::vector<std::uint8_t>(at(nodes), 0)});
        }
    }

    // Adds what one cycle changes to counts[s].
    void cycle(std::int64_t vector, int step, const TreeKernels& level, std::int64_t* counts) {
        const int bit = args_.msb_first ? args_.input_bits - 1 - step : step;
        Level& cells = levels_[0];
        const auto rows = static_cast<std::int64_t>(cells.changed.size());
        for (std::int64_t i = 0; i < rows; ++i) {
            const bool line = ((*args_.inputs.at(vector, row_ + i) >> bit) & 1) != 0;
            const bool changed = line != (lines_.empty() ? false : lines_[at(i)] != 0);
            cells.changed[at(i)] = changed;
            if (changed) {
                counts[0] += ones_[at(i)];
                for (std::int64_t b = 0; b < kTreeBanks; ++b) {
                    cells.sums[at(i * kTreeBanks + b)] =
                        line ? weights_[at(i * kTreeBanks + b)] : 0;
                }
            }
        }
        lines_.resize(at(rows));
        for (std::int64_t i = 0; i < rows; ++i) {
            lines_[at(i)] ^= cells.changed[at(i)];
        }
        for (std::size_t l = 1; l < levels_.size(); ++l) {
            const Level& below = levels_[l - 1];
            Level& here = levels_[l];
            std::uint32_t found[kTreeBanks] = {};
            const std::uint32_t mask = low_bits(args_.weight_bits + static_cast<int>(l));
            for (std::size_t node = 0; node < here.changed.size(); ++node) {
                const std::size_t left = 2 * node, right = left + 1;
                const bool has_right = right < below.changed.size();
                here.changed[node] =
                    below.changed[left] | (has_right ? below.changed[right] : std::uint8_t{0});
                if (here.changed[node] != 0) {
                    level.add(below.sums.data() + left * kTreeBanks,
                              has_right ? below.sums.data() + right * kTreeBanks : nullptr,
                              here.sums.data() + node * kTreeBanks, mask, found);
                }
            }
            for (const std::uint32_t count : found) {
                counts[l] += count;
            }
        }
        std::uint32_t found[kTreeBanks] = {};
        const int width =
            args_.weight_bits + args_.input_bits + static_cast<int>(levels_.size()) - 1;
        level.accumulate(levels_.back().sums.data(), accumulators_, bit,
                         args_.input_signed && bit == args_.input_bits - 1, step == 0,
                         (std::uint64_t{1} << width) - 1, found);
        for (const std::uint32_t count : found) {
            counts[levels_.size()] += count;
        }
    }

   private:
    struct Level {
        std::vector<std::int32_t> sums;     // [nodes, kTreeBanks]
        std::vector<std::uint8_t> changed;  // [nodes]
    };

    static std::uint32_t low_bits(int width) { return width >= 32 ? ~0U : (1U << width) - 1; }

    const TreeArgs& args_;
    std::int64_t row_;
    std::vector<std::int32_t> weights_;  // [rows, kTreeBanks]
    std::vector<std::int64_t> ones_;     // [rows] of the weights of all banks
    std::vector<std::uint8_t> lines_;
    std::vector<Level> levels_;
    std::int64_t accumulators_[kTreeBanks] = {};
};

}  // namespace

std::int64_t tree_stages(std::int64_t rows) noexcept {
    return std::bit_width(static_cast<std::uint64_t>(rows - 1)) + 2;
}

Status tree_toggles(const TreeArgs& args, int threads) noexcept {
    if (args.rows < 1 || args.rows > kMaxRows) {
        return invalid("rows", args.rows, "1 to 65536");
    }
    if (args.banks < 1 || args.banks > kMaxBanks) {
        return invalid("banks", args.banks, "1 to 65536");
    }
    for (const int bits : {args.weight_bits, args.input_bits}) {
        if (bits < 1 || bits > kMaxBits) {
            return invalid("bits", bits, "1 to 16");
        }
    }
    QS_TRY(check(args));
    const TreeKernels& level = kernels();
    const std::int64_t row_tiles = args.out.extent[1], bank_tiles = args.out.extent[2];
    std::atomic<bool> short_of_memory{false};
    parallel_for(row_tiles * bank_tiles, threads, [&](std::int64_t tile) noexcept {
        const std::int64_t r = tile / bank_tiles, b = tile % bank_tiles;
        const std::int64_t stages = args.out.extent[3];
        for (std::int64_t t = 0; t < args.out.extent[0]; ++t) {
            for (std::int64_t s = 0; s < stages; ++s) {
                *args.out.at(t, r, b, s) = 0;
            }
        }
        try {
            std::vector<std::int64_t> counts(at(stages));
            const std::int64_t end = std::min((b + 1) * args.banks, args.weights.extent[0]);
            for (std::int64_t bank = b * args.banks; bank < end; bank += kTreeBanks) {
                Trees trees(args, r, bank);
                for (std::int64_t v = 0; v < args.inputs.extent[0]; ++v) {
                    for (int step = 0; step < args.input_bits; ++step) {
                        std::fill(counts.begin(), counts.end(), 0);
                        trees.cycle(v, step, level, counts.data());
                        for (std::int64_t s = 0; s < stages; ++s) {
                            *args.out.at(v * args.input_bits + step, r, b, s) += counts[at(s)];
                        }
                    }
                }
            }
        } catch (const std::bad_alloc&) {
            short_of_memory = true;
        }
    });
    return short_of_memory ? no_memory("trees of rows", args.rows) : Status{};
}

}  // namespace quernstone::pim
