#include "runtime_stress.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "gemm/gemm.h"
#include "moe/emulated.h"
#include "moe/runtime.h"

using namespace quernstone;
using namespace quernstone::moe;

namespace stress {
namespace {

constexpr std::int64_t kLayers = 3, kCount = 6, kHidden = 32, kWide = 32, kTop = 2;
constexpr std::int64_t kPlans = 500;  // of one device

using Random = std::mt19937_64;

std::int64_t below(Random& random, std::int64_t n) {
    return static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
}

// int8 experts of random codes and scales near one hundredth.
class Layer {
   public:
    explicit Layer(Random& random) {
        experts_ = {gemm::Format::kInt8, kCount, kHidden, kWide, 0, false, nullptr};
        memory_.resize(static_cast<std::size_t>(experts_.bytes() + gemm::kAlign));
        auto* at = reinterpret_cast<std::byte*>(
            round_up(reinterpret_cast<std::intptr_t>(memory_.data()), gemm::kAlign));
        experts_.data = at;
        for (std::int64_t e = 0; e < kCount; ++e) {
            const std::vector<std::byte> gate = matrix(random), up = matrix(random),
                                         down = matrix(random);
            place(experts_, align(gate), align(up), align(down), at + e * experts_.expert_bytes());
        }
    }
    [[nodiscard]] const Experts& experts() const { return experts_; }

   private:
    static std::byte* align(const std::vector<std::byte>& x) {
        return reinterpret_cast<std::byte*>(
            round_up(reinterpret_cast<std::intptr_t>(x.data()), gemm::kAlign));
    }

    static std::vector<std::byte> matrix(Random& random) {
        const gemm::Layout layout{gemm::Format::kInt8, kWide, kHidden, 0, false};
        std::vector<std::int8_t> codes(static_cast<std::size_t>(kWide * kHidden));
        for (std::int8_t& code : codes) {
            code = static_cast<std::int8_t>(below(random, 255) - 127);
        }
        std::vector<float> scales(kWide);
        for (float& scale : scales) {
            scale = 0.001F * static_cast<float>(1 + below(random, 10));
        }
        std::vector<std::byte> out(static_cast<std::size_t>(layout.bytes() + gemm::kAlign));
        const gemm::Codes from{{codes.data(), {kWide, kHidden}, {kHidden, 1}},
                               {scales.data(), {kWide, 1}, {1, 1}},
                               {}};
        static_cast<void>(gemm::pack(layout, from, align(out)));
        return out;
    }

    Experts experts_;
    std::vector<std::byte> memory_;
};

// Tokens and their choices, none twice for one.
struct Call {
    explicit Call(Random& random) : tokens(1 + below(random, 4)) {
        for (std::int64_t i = 0; i < tokens * kHidden; ++i) {
            x.push_back(0.01F * static_cast<float>(below(random, 401) - 200));
        }
        for (std::int64_t t = 0; t < tokens; ++t) {
            const std::int64_t first = below(random, kCount);
            ids.push_back(first);
            ids.push_back(random() % 5 == 0 ? -1
                                            : (first + 1 + below(random, kCount - 1)) % kCount);
            weights.push_back(0.25F);
            weights.push_back(0.5F);
        }
        for (std::int64_t i = 0; i < tokens * kCount; ++i) {
            scores.push_back(0.01F * static_cast<float>(below(random, 100)));
        }
    }
    [[nodiscard]] View<const float, 2> inputs() const {
        return {x.data(), {tokens, kHidden}, {kHidden, 1}};
    }
    [[nodiscard]] View<const std::int64_t, 2> chosen() const {
        return {ids.data(), {tokens, kTop}, {kTop, 1}};
    }
    [[nodiscard]] View<const float, 2> shares() const {
        return {weights.data(), {tokens, kTop}, {kTop, 1}};
    }
    [[nodiscard]] View<const float, 2> router() const {
        return {scores.data(), {tokens, kCount}, {kCount, 1}};
    }

    std::int64_t tokens;
    std::vector<float> x, weights, scores;
    std::vector<std::int64_t> ids;
};

constexpr Policy kPolicies[] = {Policy::kFixed,   Policy::kGpuOnly, Policy::kCpuOnly,
                                Policy::kFiddler, Policy::kList,    Policy::kEvent,
                                Policy::kHybrid};
constexpr cache::Policy kCaches[] = {
    cache::Policy::kLru, cache::Policy::kLfu, cache::Policy::kLfru, cache::Policy::kS3Fifo,
    cache::Policy::kArc, cache::Policy::kMrs, cache::Policy::kReuse};

Costs random_costs(Random& random) {
    const auto time = [&] { return 1e-5 * static_cast<double>(1 + below(random, 20)); };
    const double cpu = time(), gpu = time();
    return {{{1.0, 2.0}, {cpu, 2.0 * cpu}}, {{1.0}, {gpu}}, time(), time()};
}

class Run {
   public:
    Run(const std::vector<Layer>& layers, Random& random)
        : random_(random),
          planner_(setups(layers, random), 1 + below(random, 3), random_costs(random),
                   kPolicies[below(random, std::size(kPolicies))],
                   kCaches[below(random, std::size(kCaches))]) {
        std::vector<Experts> experts;
        std::vector<std::int64_t> slots;
        for (const Layer& layer : layers) {
            experts.push_back(layer.experts());
        }
        for (const LayerSetup& setup : setups_) {
            slots.push_back(setup.slots);
        }
        good_ = device_.open(experts, slots, 3, gemm::Compute::kInt8).ok();
        experts_ = experts;
    }

    // Whether the output has the bits of the CPU alone.
    bool step() {
        const Call call(random_);
        const std::int64_t layer = below(random_, kLayers);
        const Experts& experts = experts_[static_cast<std::size_t>(layer)];
        const double now = static_cast<double>(++steps_) * 1e-4;
        device_.begin_step();
        bool good = good_ && planner_.needless(layer, call.chosen(), now, loads_).ok();
        for (const Load& load : loads_) {
            if (device_.cancel(layer, load.slot)) {
                planner_.cancelled(load);
            }
        }
        good = good &&
               planner_.plan(layer, call.chosen(), call.shares(), call.router(), now, plan_).ok();
        for (const Command& command : plan_.commands) {
            const auto i = static_cast<std::size_t>(command.active);
            const std::span<const std::int64_t> tokens(plan_.token.data() + plan_.first[i],
                                                       static_cast<std::size_t>(plan_.loads[i]));
            good = good && (command.load ? device_.load(layer, plan_.expert[i], command.slot, 0.0)
                                         : device_.compute(layer, plan_.expert[i], command.slot,
                                                           call.inputs(), tokens, 0.0))
                               .ok();
        }
        const Call later(random_);
        const Guess guess{(layer + 1) % kLayers, 1 + below(random_, kMaxDistance), later.chosen()};
        const std::size_t guesses = random_() % 2;
        good = good && planner_.look_ahead(plan_, {&guess, guesses}, loads_).ok();
        for (const Load& load : loads_) {
            good = good && device_.load(load.layer, load.expert, load.slot, 0.0).ok();
        }
        const CpuArgs args{&experts, call.inputs(), gemm::Compute::kInt8, false, nullptr, nullptr};
        good = good && compute_on_cpu(plan_, args, 1, bench_).ok();
        if (random_() % 64 == 0) {  // a step that is given up: nobody knows what a slot holds
            device_.abort();
            device_.end_step();
            for (std::int64_t each = 0; each < kLayers; ++each) {
                planner_.clear(each);
            }
            return good;
        }
        View<const float, 2> rows;
        good = good && device_.collect(rows).ok();
        device_.end_step();
        const auto size = static_cast<std::size_t>(call.tokens * kHidden);
        std::vector<float> got(size, -1.0F), want(size, -2.0F);
        const auto out = [&](std::vector<float>& to) {
            return View<float, 2>{to.data(), {call.tokens, kHidden}, {kHidden, 1}};
        };
        good = good && combine(plan_, bench_, rows, out(got), 1).ok();
        planner_.finish(plan_);
        good = good && forward(experts,
                               {call.inputs(), call.chosen(), call.shares(), out(want),
                                gemm::Compute::kInt8},
                               1)
                           .ok();
        return good && std::memcmp(got.data(), want.data(), size * sizeof(float)) == 0;
    }

   private:
    std::vector<LayerSetup> setups(const std::vector<Layer>& layers, Random& random) {
        for (std::size_t i = 0; i < layers.size(); ++i) {
            setups_.push_back({kCount, below(random, kCount + 1)});
        }
        return setups_;
    }

    Random& random_;
    std::vector<LayerSetup> setups_;
    Planner planner_;
    EmulatedDevice device_;
    std::vector<Experts> experts_;
    LayerPlan plan_;
    Workbench bench_;
    std::vector<Load> loads_;
    std::int64_t steps_ = 0;
    bool good_ = false;
};

}  // namespace

std::int64_t run(std::int64_t executions, std::uint64_t seed) {
    Random random(seed);
    std::vector<Layer> layers;
    for (std::int64_t i = 0; i < kLayers; ++i) {
        layers.emplace_back(random);
    }
    std::int64_t wrong = 0;
    for (std::int64_t done = 0; done < executions; done += kPlans) {
        Run one(layers, random);
        for (std::int64_t i = 0; i < std::min(kPlans, executions - done); ++i) {
            wrong += one.step() ? 0 : 1;
        }
    }
    return wrong;
}

}  // namespace stress
