#include "pim/pim.h"

#include <algorithm>
#include <atomic>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/round.h"
#include "common/scratch.h"
#include "pim/kernel.h"
#include "pim/programmed.h"

namespace quernstone::pim {
namespace {

const Kernels& active_kernels() noexcept {
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kBaseline:
            return baseline::kKernels;
        case Isa::kAvx2:
            return avx2::kKernels;
        case Isa::kAvx512:
        case Isa::kAvx512Bf16Vnni:
        case Isa::kAvx512Amx:
            return avx512::kKernels;
    }
#endif
    return baseline::kKernels;
}

// Digits of which a row's own sum is quicker than the tables of 64.
constexpr std::int64_t kFew = 4;

using Count = void (*)(const CountArgs&);

Count few_of(const Kernels& kernels) noexcept {
#if defined(QS_HAVE_X86)
    if (active_isa() >= Isa::kAvx512Bf16Vnni) {
        return avx512_bf16_vnni::few_columns;
    }
#endif
    return kernels.few;
}

Count pick(Formulation formulation, const Programmed& layer, const Kernels& kernels) noexcept {
    if (formulation == Formulation::kTable) {
        return kernels.table;
    }
    const bool narrow =
        layer.content == Content::kRowOnes && layer.columns() * layer.digits() <= kFew;
#if defined(QS_HAVE_X86)
    if (formulation == Formulation::kDot) {
        return avx512_bf16_vnni::dot;
    }
    if (formulation == Formulation::kTiles || (!narrow && available(Formulation::kTiles))) {
        return amx::tiles;
    }
#endif
    return narrow ? few_of(kernels) : kernels.table;
}

Status check(const Integers& x, const Lines& lines, std::int64_t width) noexcept {
    QS_TRY(same("inputs.shape[1]", x.width, "", width));
    if (!x.wide && lines.bits > 8) {
        return invalid("inputs: bits of an integer", 8, "at least", lines.bits);
    }
    return {};
}

template <class T>
std::int64_t sum(const T* x, std::int64_t n) noexcept {
    constexpr std::int64_t kSafe = std::int64_t{1} << 15;  // so many fit 32 bits
    std::int64_t total = 0;
    for (std::int64_t begin = 0; begin < n; begin += kSafe) {
        const std::int64_t end = std::min(n, begin + kSafe);
        std::int32_t part = 0;
        for (std::int64_t i = begin; i < end; ++i) {
            part += x[i];
        }
        total += part;
    }
    return total;
}

// The sum of a vector's integers, as the lines carry them: unsigned ones of the type's width too.
std::int64_t sum_of(const Integers& x, std::int64_t n, std::int64_t count,
                    const Lines& lines) noexcept {
    const std::int64_t at = n * x.stride;
    if (x.wide) {
        const auto* from = reinterpret_cast<const std::int16_t*>(x.data) + at;
        return lines.input_signed ? sum(from, count)
                                  : sum(reinterpret_cast<const std::uint16_t*>(from), count);
    }
    const auto* from = reinterpret_cast<const std::int8_t*>(x.data) + at;
    return lines.input_signed ? sum(from, count)
                              : sum(reinterpret_cast<const std::uint8_t*>(from), count);
}

// The level of each line before vector v: the last bit of the latest vector that was not gated.
void levels_before(const Integers& x, const Lines& lines, std::int64_t v, std::int64_t i0,
                   std::int64_t rows, std::uint8_t* level) noexcept {
    std::fill_n(level, round_up(rows, kBlock), std::uint8_t{0});
    if (lines.idle > 0 || v == 0) {
        return;
    }
    const std::int64_t mask = (std::int64_t{1} << lines.bits) - 1;
    const int last = lines.msb_first ? 0 : lines.bits - 1;
    std::int64_t unknown = rows;
    constexpr std::uint8_t kUnknown = 2;
    std::fill_n(level, rows, kUnknown);
    for (std::int64_t before = v - 1; before >= 0 && unknown > 0; --before) {
        for (std::int64_t i = 0; i < rows; ++i) {
            const std::int64_t u = integer(x, before, i0 + i) & mask;
            if (level[i] == kUnknown && (u != 0 || !lines.zero_gating)) {
                level[i] = static_cast<std::uint8_t>((u >> last) & 1);
                --unknown;
            }
        }
    }
    for (std::int64_t i = 0; i < rows; ++i) {
        level[i] &= 1U;  // what is unknown was never driven
    }
}

int planes_of(const Lines& lines) noexcept {
    return (lines.bits + (lines.idle > 0 ? 1 : 0) + 7) / 8;
}

// Vectors v0 to v1 of the rows from i0: patterns, and their masks.
struct Piece {
    const Integers& x;
    const Lines& lines;
    bool levels;
    std::int64_t v0, v1, i0, rows, padded_rows;

    [[nodiscard]] std::int64_t pattern_bytes() const noexcept {
        return round_up(planes_of(lines) * padded_rows * (v1 - v0), kAlign);
    }
    [[nodiscard]] std::int64_t bytes() const noexcept {
        return round_up(rows, kAlign) + pattern_bytes();
    }

    // `memory` holds bytes().
    [[nodiscard]] Patterns extract(const Kernels& kernels, std::byte* memory) const noexcept {
        auto* level = reinterpret_cast<std::uint8_t*>(memory);
        auto* out = level + round_up(rows, kAlign);
        levels_before(x, lines, v0, i0, rows, level);
        const std::int64_t size = x.wide ? 2 : 1;
        const ExtractArgs args{x.data + (v0 * x.stride + i0) * size,
                               x.stride,
                               v1 - v0,
                               rows,
                               padded_rows,
                               lines,
                               levels,
                               level,
                               out};
        (x.wide ? kernels.extract16 : kernels.extract8)(args);
        return {out, v1 - v0, padded_rows, planes_of(lines)};
    }
};

// Cycles of a task: tables are built once in each, and its sums stay in the L2 cache.
constexpr std::int64_t kCyclesOfTask = 1024;

std::int64_t vectors_of_task(std::int64_t vectors, std::int64_t cycles, std::int64_t others,
                             int threads) noexcept {
    const std::int64_t most = std::max<std::int64_t>(1, kCyclesOfTask / cycles);
    // As many tasks as threads, where there are vectors enough.
    const std::int64_t wanted = divide_up(threads, std::max<std::int64_t>(1, others));
    return std::max<std::int64_t>(1, std::min(most, divide_up(vectors, wanted)));
}

// Counts of one tile of rows in some vectors, handed block by block to `take`.
struct Tile {
    const Programmed& layer;
    const Lines& lines;
    Count count;
    const Kernels& kernels;

    // The largest block of digits that is not written in place.
    [[nodiscard]] static std::int64_t sum_bytes(std::int64_t cycles) noexcept {
        return cycles * kBlock * static_cast<std::int64_t>(sizeof(std::int32_t));
    }
    [[nodiscard]] std::int64_t bytes(const Piece& piece) const noexcept {
        const std::int64_t cycles = (piece.v1 - piece.v0) * lines.cycles();
        return piece.bytes() + cycles * piece.padded_rows / kBlock * 8 + kAlign +
               sum_bytes(cycles) + scratch_bytes(cycles, piece.padded_rows);
    }

    // take(block, first column, columns) -> where its digits shall be written, and their stride;
    // then done(block, digits written).
    template <class Place, class Done>
    void run(const Piece& piece, std::int64_t r, std::byte* memory, Place place,
             Done done) const noexcept {
        const std::int64_t cycles = (piece.v1 - piece.v0) * lines.cycles();
        const Patterns patterns = piece.extract(kernels, memory);
        std::byte* at = memory + piece.bytes();
        const CycleOrder order{lines.bits, lines.idle, lines.msb_first};
        auto* masks = reinterpret_cast<std::uint64_t*>(at);
        at += round_up(cycles * piece.padded_rows / kBlock * 8, kAlign);
        if (count == kernels.table) {
            kernels.masks(patterns, order, masks);
        }
        auto* sums = reinterpret_cast<std::int32_t*>(at);
        at += sum_bytes(cycles);
        for (std::int64_t b = 0; b < layer.blocks(); ++b) {
            const Block block = block_at(layer, r, b);
            std::int32_t* out = sums;
            std::int64_t stride = kBlock;
            place(b, out, stride);
            count({patterns, order, block, out, stride, masks, at});
            done(b, block, out);
        }
    }
};

Status check_formulation(Formulation formulation) noexcept {
    return available(formulation)
               ? Status{}
               : invalid("formulation", "one that this processor or level lacks", "another");
}

// Runs task(memory) for each of n tasks with so much of the thread's own scratch.
template <class Task>
Status run_tasks(std::int64_t n, int threads, std::int64_t bytes, Task task) noexcept {
    std::atomic<bool> short_of_memory{false};
    parallel_for(n, threads, [&](std::int64_t i) noexcept {
        Scratch& scratch = Scratch::of_this_thread();
        std::byte* memory = scratch.reserve(static_cast<std::size_t>(bytes));
        if (memory == nullptr) {
            short_of_memory.store(true, std::memory_order_relaxed);
            return;
        }
        task(i, memory);
        scratch.release_large();
    });
    return short_of_memory.load() ? no_memory("counts", bytes) : Status{};
}

}  // namespace

std::int64_t scratch_bytes(std::int64_t cycles, std::int64_t padded_rows) noexcept {
    const std::int64_t table = (std::int64_t{32} << 10) + cycles * 2 * kBlock;
    const std::int64_t products = 32 * padded_rows + 32 * kBlock * 4;
    return std::max(table, products);
}

bool available(Formulation formulation) noexcept {
    switch (formulation) {
        case Formulation::kAuto:
        case Formulation::kTable:
            return true;
        case Formulation::kDot:
            return active_isa() >= Isa::kAvx512Bf16Vnni;
        case Formulation::kTiles:
            return active_isa() == Isa::kAvx512Amx;
    }
    return false;
}

Status check(const Lines& lines) noexcept {
    if (lines.bits < 1 || lines.bits > kMaxBits) {
        return invalid("input_bits", lines.bits, "1 to", kMaxBits);
    }
    if (lines.idle < 0 || lines.idle > (1 << 16)) {
        return invalid("idle", lines.idle, "0 to", 1 << 16);
    }
    return {};
}

Status toggles(const Programmed& layer, const ToggleArgs& args, int threads) noexcept {
    QS_TRY(check(layer));
    QS_TRY(check(args.lines));
    QS_TRY(check(args.inputs, args.lines, layer.inputs));
    QS_TRY(check_formulation(args.formulation));
    if (layer.content == Content::kWeights) {
        return invalid("layer", "one of weights", "one of ones");
    }
    const std::int64_t vectors = args.inputs.count;
    const std::int64_t per_vector = args.lines.cycles();
    const std::int64_t tiles = layer.row_tiles();
    QS_TRY(same("out.shape[0]", args.out.extent[0], "", tiles));
    QS_TRY(same("out.shape[1]", args.out.extent[1], "", vectors * per_vector));
    QS_TRY(same("out.shape[2]", args.out.extent[2], "", layer.columns()));
    if (vectors == 0 || tiles == 0 || layer.columns() == 0) {
        return {};
    }
    const Kernels& kernels = active_kernels();
    const Tile tile{layer, args.lines, pick(args.formulation, layer, kernels), kernels};
    const std::int64_t run = vectors_of_task(vectors, per_vector, tiles, threads);
    const std::int64_t runs = divide_up(vectors, run);
    const auto piece_of = [&](std::int64_t task) {
        const std::int64_t r = task / runs;
        const std::int64_t v0 = task % runs * run;
        const std::int64_t i0 = r * layer.rows;
        return Piece{args.inputs,
                     args.lines,
                     false,
                     v0,
                     std::min(vectors, v0 + run),
                     i0,
                     std::min(layer.rows, layer.inputs - i0),
                     layer.padded_rows()};
    };
    return run_tasks(tiles * runs, threads, tile.bytes(piece_of(0)),
                     [&](std::int64_t task, std::byte* memory) noexcept {
                         const Piece piece = piece_of(task);
                         const std::int64_t r = task / runs;
                         const std::int64_t t0 = piece.v0 * per_vector;
                         const std::int64_t cycles = (piece.v1 - piece.v0) * per_vector;
                         // Whole columns and single digits are written in place.
                         const int digits = tile.count == few_of(kernels) ? 1 : layer.digits();
                         const std::int64_t each = layer.columns_per_block();
                         tile.run(
                             piece, r, memory,
                             [&](std::int64_t b, std::int32_t*& out, std::int64_t& stride) {
                                 if (digits == 1) {
                                     out = args.out.at(r, t0, b * each);
                                     stride = args.out.stride[1];
                                 }
                             },
                             [&](std::int64_t b, const Block& block, const std::int32_t* sums) {
                                 if (digits == 1) {
                                     return;
                                 }
                                 for (std::int64_t t = 0; t < cycles; ++t, sums += kBlock) {
                                     std::int32_t* out = args.out.at(r, t0 + t, b * each);
                                     for (std::int64_t n = 0; n < block.digits / digits; ++n) {
                                         std::int32_t value = 0;
                                         for (int d = 0; d < digits; ++d) {
                                             value += sums[n * digits + d]
                                                      << (d * layer.digit_bits());
                                         }
                                         out[n] = value;
                                     }
                                 }
                             });
                     });
}

Status mvm(const Programmed& layer, const MvmArgs& args, int threads) noexcept {
    QS_TRY(check(layer));
    QS_TRY(check(args.lines));
    QS_TRY(check(args.inputs, args.lines, layer.inputs));
    QS_TRY(check_formulation(args.formulation));
    if (layer.content != Content::kWeights) {
        return invalid("layer", "one of ones", "one of weights");
    }
    const std::int64_t vectors = args.inputs.count;
    QS_TRY(same("out.shape[0]", args.out.extent[0], "", vectors));
    QS_TRY(same("out.shape[1]", args.out.extent[1], "", layer.outputs));
    // The order in time and the cycles between vectors are no matter of the product.
    Lines lines = args.lines;
    lines.idle = 0;
    lines.msb_first = false;
    const Kernels& kernels = active_kernels();
    const Tile tile{layer, lines, pick(args.formulation, layer, kernels), kernels};
    const std::int64_t run = vectors_of_task(vectors, lines.bits, 1, threads);
    const std::int64_t runs = divide_up(vectors, run);
    const auto piece_of = [&](std::int64_t v0, std::int64_t r) {
        const std::int64_t i0 = r * layer.rows;
        return Piece{args.inputs,
                     lines,
                     true,
                     v0,
                     std::min(vectors, v0 + run),
                     i0,
                     std::min(layer.rows, layer.inputs - i0),
                     layer.padded_rows()};
    };
    return run_tasks(
        runs, threads, tile.bytes(piece_of(0, 0)),
        [&](std::int64_t task, std::byte* memory) noexcept {
            const std::int64_t v0 = task * run;
            const std::int64_t v1 = std::min(vectors, v0 + run);
            for (std::int64_t v = v0; v < v1; ++v) {
                const std::int64_t sum =
                    layer.weight_signed ? sum_of(args.inputs, v, layer.inputs, lines) : 0;
                std::fill_n(args.out.at(v, 0), layer.outputs,
                            -(sum * (std::int64_t{1} << (layer.weight_bits - 1))));
            }
            const int digits = layer.digits();
            const std::int64_t each = layer.columns_per_block();
            for (std::int64_t r = 0; r < layer.row_tiles(); ++r) {
                tile.run(
                    piece_of(v0, r), r, memory, [](std::int64_t, std::int32_t*&, std::int64_t&) {},
                    [&](std::int64_t b, const Block& block, const std::int32_t* sums) {
                        for (std::int64_t v = v0; v < v1; ++v) {
                            alignas(kAlign) std::int64_t y[kBlock] = {};
                            for (int k = 0; k < lines.bits; ++k, sums += kBlock) {
                                const bool negative = lines.input_signed && k == lines.bits - 1;
                                kernels.shift_add(sums, k, negative, y);
                            }
                            std::int64_t* out = args.out.at(v, b * each);
                            for (std::int64_t n = 0; n < block.digits / digits; ++n) {
                                std::int64_t total = 0;
                                for (int d = 0; d < digits; ++d) {
                                    total += y[n * digits + d] *
                                             (std::int64_t{1} << (d * layer.digit_bits()));
                                }
                                out[n] += total;
                            }
                        }
                    });
            }
        });
}

Status line_toggles(const LineArgs& args, int threads) noexcept {
    QS_TRY(check(args.lines));
    QS_TRY(check(args.inputs, args.lines, args.out.extent[2]));
    const std::int64_t vectors = args.inputs.count;
    const std::int64_t rows = args.inputs.width;
    QS_TRY(same("out.shape[0]", args.out.extent[0], "", vectors));
    QS_TRY(same("out.shape[1]", args.out.extent[1], "", args.lines.cycles()));
    if (vectors == 0 || rows == 0) {
        return {};
    }
    const Kernels& kernels = active_kernels();
    const CycleOrder order{args.lines.bits, args.lines.idle, args.lines.msb_first};
    const std::int64_t run = vectors_of_task(vectors, args.lines.cycles(), 1, threads);
    const auto piece_of = [&](std::int64_t task) {
        return Piece{args.inputs,
                     args.lines,
                     false,
                     task * run,
                     std::min(vectors, (task + 1) * run),
                     0,
                     rows,
                     round_up(rows, kBlock)};
    };
    return run_tasks(
        divide_up(vectors, run), threads, piece_of(0).bytes(),
        [&](std::int64_t task, std::byte* memory) noexcept {
            const Piece piece = piece_of(task);
            const Patterns patterns = piece.extract(kernels, memory);
            for (std::int64_t v = piece.v0; v < piece.v1; ++v) {
                const std::uint8_t* from =
                    patterns.data + (v - piece.v0) * patterns.planes * patterns.padded_rows;
                for (int c = 0; c < order.cycles(); ++c) {
                    const int bit = order.bit(c);
                    std::uint8_t* out = args.out.at(v, c, 0);
                    if (bit < 0) {
                        std::fill_n(out, rows, std::uint8_t{0});
                        continue;
                    }
                    const std::uint8_t* plane = from + bit / 8 * patterns.padded_rows;
                    for (std::int64_t i = 0; i < rows; ++i) {
                        out[i] = static_cast<std::uint8_t>((plane[i] >> (bit % 8)) & 1);
                    }
                }
            }
        });
}

Status count_ones(const Integers& run, int bits, bool is_signed, int threads, Ones& out) noexcept {
    const int width = run.wide ? 16 : 8;
    if (bits < 1 || bits > width) {
        return invalid("bits", bits, "1 to", width);
    }
    constexpr std::int64_t kPiece = std::int64_t{1} << 20;
    const std::int64_t bytes = run.count * width / 8;
    const Kernels& kernels = active_kernels();
    std::atomic<std::uint64_t> ones{0};
    std::atomic<bool> in_range{true};
    parallel_for(divide_up(bytes, kPiece), threads, [&](std::int64_t task) noexcept {
        Ones part;
        const std::int64_t begin = task * kPiece;
        kernels.ones(run.data + begin, std::min(kPiece, bytes - begin), run.wide, bits, is_signed,
                     part);
        ones.fetch_add(part.ones, std::memory_order_relaxed);
        if (!part.in_range) {
            in_range.store(false, std::memory_order_relaxed);
        }
    });
    out = {ones.load(), in_range.load()};
    return {};
}

void load_repeatedly(const std::byte* at, std::int64_t bytes, std::int64_t repeats,
                     int threads) noexcept {
    const Kernels& kernels = active_kernels();
    parallel_for(threads, threads,
                 [&](std::int64_t /*thread*/) noexcept { kernels.loads(at, bytes, repeats); });
}

}  // namespace quernstone::pim
