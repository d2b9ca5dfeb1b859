#include "moe/experts.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "common/parallel.h"
#include "common/scratch.h"
#include "gemm/tokens.h"

namespace quernstone::moe {
namespace {

using gemm::Compute;
using gemm::kRows;
using gemm::kScaleGroup;
using gemm::kTokenChunk;
using gemm::Layout;
using gemm::TokenRoom;

constexpr std::int64_t kUnit = kScaleGroup;  // feed-forward rows that one task makes together
// Of those as many as give a product by tiles its blocks: of a unit two are gate's and two up's.
constexpr std::int64_t kWideUnits = gemm::kWideBlocks * kRows / (2 * kUnit);
constexpr std::int64_t kTasksPerThread = 12;

struct Assignment {
    std::int64_t token;
    float weight;
};

// The tokens of one expert: assignments begin..begin + count.
struct Active {
    std::int64_t expert, begin, count;
};

struct Counts {
    std::int64_t tokens, choices, assignments;
};

Status check_choices(const Experts& experts, const ForwardArgs& a, Counts& counts) noexcept {
    counts.assignments = 0;
    for (std::int64_t t = 0; t < counts.tokens; ++t) {
        for (std::int64_t c = 0; c < counts.choices; ++c) {
            const std::int64_t id = *a.ids.at(t, c);
            if (id < -1 || id >= experts.count) {
                return invalid("ids", id, "-1 to", experts.count - 1);
            }
            if (id >= 0 && !std::isfinite(*a.weights.at(t, c))) {
                return invalid("weights", "a number that is not finite", "finite numbers");
            }
            for (std::int64_t before = 0; id >= 0 && before < c; ++before) {
                if (*a.ids.at(t, before) == id) {
                    return invalid("ids: an expert twice for one token", id, "different experts");
                }
            }
            counts.assignments += id >= 0 ? 1 : 0;
        }
    }
    return {};
}

// One call: its memory, cut out of the thread's scratch, and its two phases.
class Forward {
   public:
    Forward(const Experts& experts, const ForwardArgs& args, const Counts& counts,
            int threads) noexcept
        : e_(experts),
          a_(args),
          n_(counts),
          threads_(threads),
          gate_(experts.gate()),
          down_(experts.down()),
          kernels_(gemm::active_kernels()),
          few_(kernels_, experts.format, args.compute, 1),
          many_(kernels_, experts.format, args.compute, counts.tokens) {}

    Status run() noexcept {
        Scratch& scratch = Scratch::of_this_thread();
        const std::size_t bytes = lay_out(nullptr);
        std::byte* memory = scratch.reserve(bytes);
        if (memory == nullptr) {
            return no_memory("activations", static_cast<std::int64_t>(bytes));
        }
        lay_out(memory);
        group_by_expert();
        take_inputs();
        feed_forward();
        project();
        scratch.release_large();
        return {};
    }

   private:
    // Experts of few tokens and those of many may multiply them as something else.
    struct Arm {
        gemm::Operand operand;
        gemm::BlocksTimesTokens product;
        TokenRoom tokens{}, inputs{}, inner{};

        Arm(const gemm::Kernels& kernels, gemm::Format format, Compute compute,
            std::int64_t count) noexcept
            : operand(kernels.operand(format, compute, count)),
              product(kernels.pick(format, operand)) {}
        [[nodiscard]] bool wide() const noexcept { return operand == gemm::Operand::kBf16; }
    };

    [[nodiscard]] const Arm& arm(const Active& active) const noexcept {
        return many_.wide() && active.count >= gemm::kManyTokens ? many_ : few_;
    }

    // Cuts `memory` into the parts of a call, and returns how much that takes.
    std::size_t lay_out(std::byte* memory) noexcept {
        std::size_t used = 0;
        const auto cut = [&](std::size_t bytes) {
            std::byte* at = memory == nullptr ? nullptr : memory + used;
            used += (bytes + gemm::kAlign - 1) / gemm::kAlign * gemm::kAlign;
            return at;
        };
        const auto room = [&](std::int64_t count, std::int64_t padded, gemm::Operand operand) {
            return TokenRoom(cut(TokenRoom::bytes(count, padded, operand)), count, padded, operand);
        };
        const auto some = static_cast<std::size_t>(n_.assignments);
        assignments_ = reinterpret_cast<Assignment*>(cut(some * sizeof(Assignment)));
        active_ = reinterpret_cast<Active*>(cut(some * sizeof(Active)));
        starts_ = reinterpret_cast<std::int64_t*>(
            cut(static_cast<std::size_t>(e_.count + 1) * sizeof(std::int64_t)));
        const std::int64_t wide = gate_.padded_inputs();
        for (Arm* of : {&few_, &many_}) {
            if (of == &few_ || of->wide()) {
                of->tokens = room(n_.tokens, wide, of->operand);
                // One token is every expert's only input; more are gathered by expert.
                of->inputs = n_.tokens == 1 ? of->tokens : room(n_.assignments, wide, of->operand);
                of->inner = room(n_.assignments, down_.padded_inputs(), of->operand);
            }
        }
        return used;
    }

    void group_by_expert() noexcept {
        std::fill_n(starts_, e_.count + 1, 0);
        each_choice([&](std::int64_t, std::int64_t, std::int64_t id) { ++starts_[id + 1]; });
        active_count_ = 0;
        for (std::int64_t id = 0; id < e_.count; ++id) {
            const std::int64_t begin = starts_[id];
            const std::int64_t count = starts_[id + 1];
            if (count > 0) {
                active_[active_count_++] = {id, begin, count};
            }
            starts_[id + 1] = begin + count;
        }
        each_choice([&](std::int64_t t, std::int64_t c, std::int64_t id) {
            assignments_[starts_[id]++] = {t, *a_.weights.at(t, c)};
        });
    }

    template <class Body>
    void each_choice(const Body& body) const noexcept {
        for (std::int64_t t = 0; t < n_.tokens; ++t) {
            for (std::int64_t c = 0; c < n_.choices; ++c) {
                if (const std::int64_t id = *a_.ids.at(t, c); id >= 0) {
                    body(t, c, id);
                }
            }
        }
    }

    void take_inputs() const noexcept {
        const int threads = n_.tokens * e_.hidden < 16384 ? 1 : threads_;
        for (const Arm* of : {&few_, &many_}) {
            bool used = false;
            for (std::int64_t i = 0; i < active_count_; ++i) {
                used = used || &arm(active_[i]) == of;
            }
            if (used) {
                parallel_for(n_.tokens, threads, [&](std::int64_t t) noexcept {
                    of->tokens.put_token(kernels_, t, a_.x.at(t, 0), e_.hidden);
                });
            }
        }
        if (n_.tokens > 1) {
            parallel_for(active_count_, threads, [&](std::int64_t i) noexcept {
                const Arm& of = arm(active_[i]);
                for (std::int64_t k = 0; k < active_[i].count; ++k) {
                    const std::int64_t at = active_[i].begin + k;
                    of.inputs.copy(at, of.tokens, assignments_[at].token);
                }
            });
        }
    }

    [[nodiscard]] const std::byte* expert(std::int64_t id) const noexcept {
        return e_.data + id * e_.expert_bytes();
    }

    // silu(gate x) * (up x), kept as the input of down.
    void feed_forward() const noexcept {
        const std::int64_t units = divide_up(e_.intermediate, kUnit);
        const std::int64_t all = units * active_count_;
        const std::int64_t run = std::max<std::int64_t>(1, all / (kTasksPerThread * threads_));
        parallel_for(divide_up(all, run), threads_, [&](std::int64_t task) noexcept {
            const std::int64_t end = std::min(all, (task + 1) * run);
            for (std::int64_t i = task * run; i < end;) {
                const Active& active = active_[i / units];
                const std::int64_t unit = i % units;
                if (arm(active).wide()) {
                    const std::int64_t some = std::min({kWideUnits, end - i, units - unit});
                    make_units<gemm::kWideTokens, kWideUnits>(active, unit, some);
                    i += some;
                } else {
                    make_units<kTokenChunk, 1>(active, unit, 1);
                    i += 1;
                }
            }
        });
    }

    // So many feed-forward rows for so many tokens at once.
    template <std::int64_t kTokens, std::int64_t kUnits>
    void make_units(const Active& active, std::int64_t unit, std::int64_t units) const noexcept {
        constexpr std::int64_t kWidth = kUnits * kUnit;
        alignas(gemm::kAlign) std::array<float, kTokens * 2 * kWidth> both;
        alignas(gemm::kAlign) std::array<float, kTokens * kWidth> inner;
        const Arm& of = arm(active);
        const std::int64_t first = unit * kUnit;
        const std::int64_t rows = std::min(units * kUnit, e_.intermediate - first);
        const bool last = first + rows == e_.intermediate;
        const std::int64_t block_bytes = gate_.block_bytes();
        for (std::int64_t t0 = 0; t0 < active.count; t0 += kTokens) {
            const std::int64_t count = std::min(kTokens, active.count - t0);
            const gemm::Tokens x = of.inputs.part(n_.tokens == 1 ? 0 : active.begin + t0, count);
            // Blocks of gate and up take turns.
            const std::int64_t pairs = divide_up(rows, kRows);
            const std::byte* at = expert(active.expert) + first / kRows * 2 * block_bytes;
            of.product(gemm::blocks_at(gate_, at, 2 * pairs), x, both.data());
            for (std::int64_t pair = 0; pair < pairs; ++pair) {
                float* gate = both.data() + pair * 2 * count * kRows;
                kernels_.silu_multiply(gate, gate + count * kRows, count * kRows);
                float* to = inner.data() + pair * kRows;
                for (std::int64_t t = 0; t < count; ++t) {
                    std::copy_n(gate + t * kRows, kRows, to + t * kWidth);
                }
            }
            for (std::int64_t t = 0; t < count; ++t) {
                const std::int64_t at = active.begin + t0 + t;
                of.inner.put(kernels_, at, first, inner.data() + t * kWidth, rows);
                if (last) {
                    of.inner.put_zeros(at, first + round_up(rows, kScaleGroup));
                }
            }
        }
    }

    // out += weight * down(inner), a run of output blocks at a time, expert after expert.
    void project() const noexcept {
        const std::int64_t blocks = down_.blocks();
        const std::int64_t share = std::max<std::int64_t>(1, blocks / (kTasksPerThread * threads_));
        const std::int64_t run =
            many_.wide() ? std::min(round_up(share, gemm::kWideBlocks), divide_up(blocks, threads_))
                         : share;
        parallel_for(divide_up(blocks, run), threads_, [&](std::int64_t task) noexcept {
            const std::int64_t begin = task * run;
            const std::int64_t end = std::min(blocks, begin + run);
            const std::int64_t row = begin * kRows;
            const std::int64_t rows = std::min(e_.hidden, end * kRows) - row;
            for (std::int64_t t = 0; t < n_.tokens; ++t) {
                std::fill_n(a_.out.at(t, row), rows, 0.0F);
            }
            for (std::int64_t i = 0; i < active_count_; ++i) {
                const bool wide = arm(active_[i]).wide();
                const std::int64_t most =
                    wide ? gemm::kWideBlocks : gemm::blocks_at_once(active_[i].count);
                for (std::int64_t b = begin; b < end; b += most) {
                    const std::int64_t some = std::min(most, end - b);
                    if (wide) {
                        add_blocks<gemm::kWideTokens, gemm::kWideFloats>(active_[i], b, some);
                    } else {
                        add_blocks<kTokenChunk, gemm::kTileFloats>(active_[i], b, some);
                    }
                }
            }
        });
    }

    template <std::int64_t kTokens, std::int64_t kFloats>
    void add_blocks(const Active& active, std::int64_t b, std::int64_t some) const noexcept {
        alignas(gemm::kAlign) std::array<float, kFloats> tile;
        const Arm& of = arm(active);
        const gemm::Block block = gemm::blocks_at(
            down_, expert(active.expert) + 2 * gate_.bytes() + b * down_.block_bytes(), some);
        for (std::int64_t t0 = 0; t0 < active.count; t0 += kTokens) {
            const std::int64_t count = std::min(kTokens, active.count - t0);
            of.product(block, of.inner.part(active.begin + t0, count), tile.data());
            for (std::int64_t i = 0; i < some; ++i) {
                const std::int64_t row = (b + i) * kRows;
                const std::int64_t rows = std::min(kRows, e_.hidden - row);
                for (std::int64_t t = 0; t < count; ++t) {
                    const Assignment& to = assignments_[active.begin + t0 + t];
                    const float* sums = tile.data() + (i * count + t) * kRows;
                    float* out = a_.out.at(to.token, row);
                    for (std::int64_t r = 0; r < rows; ++r) {
                        out[r] += to.weight * sums[r];
                    }
                }
            }
        }
    }

    const Experts& e_;
    const ForwardArgs& a_;
    Counts n_;
    int threads_;
    Layout gate_, down_;
    const gemm::Kernels& kernels_;
    Arm few_, many_;

    Assignment* assignments_ = nullptr;  // by expert, then by token
    Active* active_ = nullptr;
    std::int64_t active_count_ = 0;
    std::int64_t* starts_ = nullptr;  // [e + 1]
};

}  // namespace

Status check(const Experts& experts) noexcept {
    if (experts.count < 1 || experts.count > kMostExperts) {
        return invalid("experts", experts.count, "1 to", kMostExperts);
    }
    QS_TRY(gemm::check(experts.gate()));
    return gemm::check(experts.down());
}

void place(const Experts& experts, const std::byte* gate, const std::byte* up,
           const std::byte* down, std::byte* to) noexcept {
    const Layout layout = experts.gate();
    const auto block = static_cast<std::size_t>(layout.block_bytes());
    for (std::int64_t b = 0; b < layout.blocks(); ++b) {
        std::memcpy(to, gate, block);
        std::memcpy(to + block, up, block);
        gate += block;
        up += block;
        to += 2 * block;
    }
    std::memcpy(to, down, static_cast<std::size_t>(experts.down().bytes()));
}

Status forward(const Experts& experts, const ForwardArgs& a, int threads) noexcept {
    QS_TRY(check(experts));
    Counts counts{a.x.extent[0], a.ids.extent[1], 0};
    QS_TRY(same("x.shape[1]", a.x.extent[1], "", experts.hidden));
    QS_TRY(same("ids.shape[0]", a.ids.extent[0], "", counts.tokens));
    QS_TRY(same("weights.shape[0]", a.weights.extent[0], "", counts.tokens));
    QS_TRY(same("weights.shape[1]", a.weights.extent[1], "", counts.choices));
    QS_TRY(same("out.shape[0]", a.out.extent[0], "", counts.tokens));
    QS_TRY(same("out.shape[1]", a.out.extent[1], "", experts.hidden));
    if (a.compute == Compute::kInt8 && experts.format == gemm::Format::kBf16) {
        return invalid("compute", "int8", "float or mixed with bf16 weights");
    }
    QS_TRY(check_choices(experts, a, counts));
    return Forward(experts, a, counts, threads).run();
}

}  // namespace quernstone::moe
