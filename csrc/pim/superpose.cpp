#include "pim/superpose.h"

#include <algorithm>
#include <atomic>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/round.h"
#include "common/scratch.h"
#include "pim/superpose_kernel.h"

namespace quernstone::pim {
namespace {

constexpr std::int64_t kCyclesOfTask = 256;  // whose currents stay in the L2 cache

WorstKernel kernel() noexcept {
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kBaseline:
            break;
        case Isa::kAvx2:
            return superpose_avx2::worst;
        default:
            return superpose_avx512::worst;
    }
#endif
    return superpose_scalar::worst;
}

std::int64_t nodes_of(const WorstArgs& args, std::int64_t macro) noexcept {
    return *args.begin.at(macro + 1) - *args.begin.at(macro);
}

std::int64_t tiles_of(const WorstArgs& args, std::int64_t macro) noexcept {
    return divide_up(nodes_of(args, macro), kNodesOfTile);
}

Status check(const WorstArgs& args) noexcept {
    const std::int64_t macros = args.currents.extent[1];
    QS_TRY(same("response.shape[1]", args.response.extent[1], "macros,", macros));
    QS_TRY(same("begin.shape[0]", args.begin.extent[0], "macros and one,", macros + 1));
    QS_TRY(same("basis.shape[0]", args.basis.extent[0], "macros,", macros));
    QS_TRY(same("basis.shape[1]", args.basis.extent[1], "macros,", macros));
    const std::int64_t columns = args.basis.extent[2];
    if (columns < 1 || columns % kScoreColumns != 0) {
        return invalid("basis.shape[2]", columns, "a multiple of", kScoreColumns);
    }
    QS_TRY(same("places.shape[1]", args.places.extent[1], "scores,", columns - 1));
    QS_TRY(same("places.shape[2]", args.places.extent[2], "", kNodesOfTile));
    QS_TRY(same("out.shape[0]", args.out.extent[0], "cycles,", args.currents.extent[0]));
    QS_TRY(same("out.shape[1]", args.out.extent[1], "macros,", macros));
    std::int64_t tiles = 0;
    QS_TRY(same("begin[0]", *args.begin.at(0), "", 0));
    for (std::int64_t m = 0; m < macros; ++m) {
        if (nodes_of(args, m) < 1) {
            return invalid("begin: nodes of a macro", nodes_of(args, m), "1 or more");
        }
        tiles += tiles_of(args, m);
    }
    QS_TRY(same("response.shape[0]", args.response.extent[0], "nodes,", *args.begin.at(macros)));
    return same("places.shape[0]", args.places.extent[0], "tiles,", tiles);
}

// Currents of cycles side by side, in float; returns the cycles in which nothing is drawn.
std::uint32_t side_by_side(const WorstArgs& args, std::int64_t t0, std::int64_t cycles,
                           float* lanes) noexcept {
    const std::int64_t macros = args.currents.extent[1];
    std::fill_n(lanes, macros * kLanes, 0.0F);
    const double unit = args.unit;
    std::uint32_t idle = 0;
    for (std::int64_t l = 0; l < cycles; ++l) {
        const double* x = args.currents.at(t0 + l, 0);
        double peak = 0.0;
        for (std::int64_t k = 0; k < macros; ++k) {
            peak = std::max(peak, x[k]);
            lanes[k * kLanes + l] = static_cast<float>(x[k] * unit);
        }
        idle |= (peak > 0.0 ? 0U : 1U) << l;
    }
    return idle;
}

}  // namespace

Status worst_drops(const WorstArgs& args, int threads) noexcept {
    QS_TRY(check(args));
    const std::int64_t cycles = args.currents.extent[0], macros = args.currents.extent[1];
    const std::int64_t columns = args.basis.extent[2];
    std::int64_t most = 0;
    for (std::int64_t m = 0; m < macros; ++m) {
        most = std::max(most, tiles_of(args, m));
    }
    const std::int64_t block = macros * kLanes;
    const std::int64_t blocks = kCyclesOfTask / kLanes;
    const std::int64_t bytes =
        (blocks * block + room_of(columns, most)) * static_cast<std::int64_t>(sizeof(float));
    const WorstKernel run = kernel();
    std::atomic<bool> short_of_memory{false};
    parallel_for(divide_up(cycles, kCyclesOfTask), threads, [&](std::int64_t task) noexcept {
        Scratch& scratch = Scratch::of_this_thread();
        auto* lanes = reinterpret_cast<float*>(scratch.reserve(static_cast<std::size_t>(bytes)));
        if (lanes == nullptr) {
            short_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        const std::int64_t first = task * kCyclesOfTask;
        const std::int64_t end = std::min(cycles, first + kCyclesOfTask);
        std::uint32_t idle[kCyclesOfTask / kLanes] = {};
        for (std::int64_t t0 = first; t0 < end; t0 += kLanes) {
            const std::int64_t b = (t0 - first) / kLanes;
            idle[b] = side_by_side(args, t0, std::min(kLanes, end - t0), lanes + b * block);
        }
        std::int64_t tile = 0;
        for (std::int64_t m = 0; m < macros; ++m) {
            const Screen screen{macros,
                                nodes_of(args, m),
                                columns,
                                args.basis.at(m, 0, 0),
                                args.places.at(tile, 0, 0),
                                args.response.at(*args.begin.at(m), 0)};
            for (std::int64_t t0 = first; t0 < end; t0 += kLanes) {
                const std::int64_t b = (t0 - first) / kLanes;
                run(screen, {std::min(kLanes, end - t0), idle[b], lanes + b * block,
                             args.currents.at(t0, 0), args.currents.stride[0],
                             lanes + blocks * block, args.out.at(t0, m), args.out.stride[0]});
            }
            tile += tiles_of(args, m);
        }
        scratch.release_large();
    });
    return short_of_memory.load() ? no_memory("currents side by side", bytes) : Status{};
}

}  // namespace quernstone::pim
