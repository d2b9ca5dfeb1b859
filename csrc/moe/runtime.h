#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moe/cache_online.h"
#include "moe/experts.h"
#include "moe/schedule.h"

// Layers of experts that run on the CPU and on a device: what goes where, the CPU's share, and the
// sum of both. See README.md.
//
// Axes: l layers, t tokens, c choices of a token, e experts, n activated experts, a assignments (an
// expert and one of its tokens), m hidden width. Times are in seconds.
namespace quernstone::moe {

// Seconds by tokens, as in cost.py.
struct CostCurve {
    std::vector<double> tokens, seconds;  // rising; one point at least
    [[nodiscard]] double at(double load) const noexcept;
};

struct Costs {
    CostCurve cpu, gpu;
    double cpu_first = 0.0, transfer = 0.0;
};

struct LayerSetup {
    std::int64_t experts = 0, slots = 0;
};

// An expert to be brought to a slot of its layer, or to one of all layers: -1, -2 ...
struct Load {
    std::int64_t layer, expert, slot;
};

// The next thing to ask of the device: that an active expert be loaded, or computed.
struct Command {
    bool load;
    std::int64_t active, slot;
};

// What becomes of a layer's tokens. Made once and filled by every `Planner::plan`.
struct LayerPlan {
    std::int64_t layer = 0, tokens = 0;
    std::vector<std::int64_t> expert, loads;        // [n] rising; tokens of each
    std::vector<std::int64_t> first;                // [n + 1] of each one's assignments
    std::vector<std::int64_t> token;                // [a] rising for each expert
    std::vector<float> weight;                      // [a]
    std::vector<double> ready, cpu, gpu, transfer;  // [n], as in Layer
    std::vector<std::uint8_t> device;               // [n]
    std::vector<std::int32_t> order;                // [n]
    std::vector<double> start, end, sent, arrived;  // [n] predicted, from the start of the layer
    std::vector<std::int64_t> on_cpu;               // [..] of n, in their order
    std::vector<Command> commands;                  // for the device, in their order
    std::vector<std::int64_t> row;  // [n] first of its rows among those of its device
    std::int64_t cpu_rows = 0, gpu_rows = 0, hits = 0;
    Ends ends;
};

// A layer to come, as its router would choose for the tokens of this one.
struct Guess {
    std::int64_t layer = 0, distance = 1;
    View<const std::int64_t, 2> ids;  // [t, c]
};

// Chooses; keeps the books of what is where. The device does what it is told in the same order.
class Planner {
   public:
    // Throws std::bad_alloc.
    Planner(std::span<const LayerSetup> layers, std::int64_t staging, Costs costs, Policy policy,
            cache::Policy cache);

    // Checks everything before it reads by it. ids [t, c]: -1 is none; weights [t, c] finite;
    // scores [t, e], finite and 0 or more, where the cache goes by them. `now`: of any
    // clock, but always the same.
    [[nodiscard]] Status plan(std::int64_t layer, View<const std::int64_t, 2> ids,
                              View<const float, 2> weights, View<const float, 2> scores, double now,
                              LayerPlan& out) noexcept;

    // Whether `look_ahead` could load anything: guesses that it would not use need not be made.
    [[nodiscard]] bool room_ahead(const LayerPlan& plan) const noexcept {
        return policy_ != Policy::kCpuOnly && idle(plan) >= costs_.transfer;
    }

    // After `plan`: what to load while the bus would be idle, for layers to come and then for the
    // next step of this one. The slots are taken.
    [[nodiscard]] Status look_ahead(const LayerPlan& plan, std::span<const Guess> guesses,
                                    std::vector<Load>& out) noexcept;

    // Before `plan`: loads ahead that are in flight at `now` and that `ids` do not need. Whichever
    // the device can still take back is `cancelled`.
    [[nodiscard]] Status needless(std::int64_t layer, View<const std::int64_t, 2> ids, double now,
                                  std::vector<Load>& out) noexcept;
    void cancelled(const Load& load) noexcept;

    // The layer is done: its experts may give way.
    void finish(const LayerPlan& plan) noexcept;

    // The slot of an expert that becomes resident now, or was; kNowhere where none is to be had.
    [[nodiscard]] std::int64_t place(std::int64_t layer, std::int64_t expert);
    // Takes all of a layer's experts from its slots.
    void clear(std::int64_t layer) noexcept;
    [[nodiscard]] std::vector<std::int64_t> resident(std::int64_t layer) const;

    [[nodiscard]] std::int64_t layers() const noexcept {
        return static_cast<std::int64_t>(layers_.size());
    }
    [[nodiscard]] std::int64_t experts(std::int64_t layer) const noexcept {
        return layers_[static_cast<std::size_t>(layer)].setup.experts;
    }
    // Share of the guesses at a distance that came true, of 1 to kMaxDistance.
    [[nodiscard]] double right_share(std::int64_t distance) const noexcept;

    static constexpr std::int64_t kNowhere = std::int64_t{1} << 40;

   private:
    // Seconds for which the bus has nothing to do in a step.
    [[nodiscard]] static double idle(const LayerPlan& plan) noexcept {
        return plan.ends.makespan > plan.ends.pcie ? plan.ends.makespan - plan.ends.pcie : 0.0;
    }

    struct State {
        LayerSetup setup;
        std::unique_ptr<cache::OnlineCache> cache;
        std::vector<std::int64_t> slot;  // [e] or kNowhere
        std::vector<std::int64_t> free;
        std::vector<double> arrival;        // [e] of what was loaded ahead; 0 where nothing was
        std::vector<std::uint8_t> guessed;  // [e] a bit for each distance
    };

    [[nodiscard]] Status check(std::int64_t layer, View<const std::int64_t, 2> ids) noexcept;
    [[nodiscard]] Status check_scores(const State& state, View<const float, 2> scores,
                                      std::int64_t tokens) const noexcept;
    void group(View<const std::int64_t, 2> ids, View<const float, 2> weights, LayerPlan& out);
    void describe(const State& state, double now, LayerPlan& out);
    void command(State& state, LayerPlan& out);
    void learn(State& state, const LayerPlan& out) noexcept;
    [[nodiscard]] bool take(State& state, std::int64_t expert, std::int64_t& slot);

    std::vector<State> layers_;
    std::int64_t staging_;
    Costs costs_;
    Policy policy_;
    cache::Policy cache_policy_;
    Workspace workspace_;
    double bus_free_ = 0.0;
    std::array<double, kMaxDistance> guessed_{}, right_{};
    std::vector<std::int64_t> counts_, seen_, queue_;
    std::vector<LayerPlan> ahead_;
};

struct CpuArgs {
    const Experts* experts = nullptr;
    View<const float, 2> x;  // [t, m]
    gemm::Compute compute = gemm::Compute::kFloat;
    // One expert after the other, each waiting until the time of the plan is up.
    bool paced = false;
    bool (*interrupted)(void*) = nullptr;  // asked while it waits; may be null
    void* context = nullptr;
};

// When the CPU began and ended with some of a plan's experts: those at on_cpu[first..last).
struct CpuSpan {
    std::size_t first, last;
    double start, end;
};

// Memory of a step that later ones use again.
struct Workbench {
    std::vector<float> inputs, rows;  // rows [cpu_rows, m]
    std::vector<std::int64_t> ids;
    std::vector<CpuSpan> spans;  // of the last compute_on_cpu
};

// down(silu(gate(x)) * up(x)) of every assignment that the plan has on the CPU, into the rows.
[[nodiscard]] Status compute_on_cpu(const LayerPlan& plan, const CpuArgs& args, int threads,
                                    Workbench& bench) noexcept;

// out[t] = the sum over the token's experts, in the order of their numbers, of weight times row:
// the same bits wherever the rows were made.
[[nodiscard]] Status combine(const LayerPlan& plan, const Workbench& bench,
                             View<const float, 2> device_rows, View<float, 2> out,
                             int threads) noexcept;

}  // namespace quernstone::moe
