#include "moe/runtime.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <utility>

#include "common/executor.h"
#include "common/parallel.h"

namespace quernstone::moe {
namespace {

double now_in_seconds() noexcept {
    return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

std::size_t at(std::int64_t i) noexcept { return static_cast<std::size_t>(i); }

Layer layer_of(const LayerPlan& plan, double cpu_first, double pcie_free) noexcept {
    return {plan.loads, plan.ready, plan.cpu, plan.gpu, plan.transfer,
            cpu_first,  0.0,        0.0,      pcie_free};
}

}  // namespace

double CostCurve::at(double load) const noexcept {
    const std::size_t last = tokens.size() - 1;
    if (last == 0) {
        return seconds[0] * std::max(load / tokens[0], 1.0);
    }
    if (load >= tokens[last]) {
        const double slope =
            std::max(0.0, seconds[last] - seconds[last - 1]) / (tokens[last] - tokens[last - 1]);
        return seconds[last] + (load - tokens[last]) * slope;
    }
    if (load <= tokens[0]) {
        return seconds[0];
    }
    const auto above = static_cast<std::size_t>(
        std::upper_bound(tokens.begin(), tokens.end(), load) - tokens.begin());
    const double share = (load - tokens[above - 1]) / (tokens[above] - tokens[above - 1]);
    return seconds[above - 1] + share * (seconds[above] - seconds[above - 1]);
}

Planner::Planner(std::span<const LayerSetup> layers, std::int64_t staging, Costs costs,
                 Policy policy, cache::Policy cache)
    : staging_(std::max<std::int64_t>(1, staging)),
      costs_(std::move(costs)),
      policy_(policy),
      cache_policy_(cache),
      ahead_(kMaxDistance) {
    if (!workspace_.ready()) {
        throw std::bad_alloc();
    }
    std::int64_t most = 0;
    for (const LayerSetup& setup : layers) {
        State& state = layers_.emplace_back();
        state.setup = setup;
        state.cache = cache::make_online(cache, setup.slots, setup.experts);
        state.slot.assign(at(setup.experts), kNowhere);
        state.arrival.assign(at(setup.experts), 0.0);
        state.guessed.assign(at(setup.experts), 0);
        for (std::int64_t slot = setup.slots; slot-- > 0;) {
            state.free.push_back(slot);
        }
        most = std::max(most, setup.experts);
    }
    counts_.assign(at(most) + 1, 0);
    seen_.assign(at(most), -1);
}

Status Planner::check(std::int64_t layer, View<const std::int64_t, 2> ids) noexcept {
    if (layer < 0 || layer >= layers()) {
        return invalid("layer", layer, "0 or more and below", layers());
    }
    const std::int64_t experts = layers_[at(layer)].setup.experts;
    std::fill(seen_.begin(), seen_.end(), -1);
    for (std::int64_t t = 0; t < ids.extent[0]; ++t) {
        for (std::int64_t c = 0; c < ids.extent[1]; ++c) {
            const std::int64_t id = *ids.at(t, c);
            if (id < -1 || id >= experts) {
                return invalid("ids", id, "-1 to", experts - 1);
            }
            if (id >= 0 && std::exchange(seen_[at(id)], t) == t) {
                return invalid("ids: an expert twice for one token", id, "different experts");
            }
        }
    }
    return {};
}

Status Planner::check_scores(const State& state, View<const float, 2> scores,
                             std::int64_t tokens) const noexcept {
    if (!cache::needs_scores(cache_policy_)) {
        return {};
    }
    if (!scores.present()) {
        return invalid("scores", "None", "the router's softmax, which the cache goes by");
    }
    QS_TRY(same("scores.shape[0]", scores.extent[0], "", tokens));
    QS_TRY(same("scores.shape[1]", scores.extent[1], "", state.setup.experts));
    for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t e = 0; e < state.setup.experts; ++e) {
            if (!(*scores.at(t, e) >= 0.0F && std::isfinite(*scores.at(t, e)))) {
                return invalid("scores", "a number that is no score", "finite numbers, 0 or more");
            }
        }
    }
    return {};
}

// Assignments by expert and then by token.
void Planner::group(View<const std::int64_t, 2> ids, View<const float, 2> weights, LayerPlan& out) {
    const auto each = [&](const auto& body) {
        for (std::int64_t t = 0; t < ids.extent[0]; ++t) {
            for (std::int64_t c = 0; c < ids.extent[1]; ++c) {
                if (const std::int64_t id = *ids.at(t, c); id >= 0) {
                    body(t, c, at(id));
                }
            }
        }
    };
    std::fill(counts_.begin(), counts_.end(), 0);
    each([&](std::int64_t, std::int64_t, std::size_t id) { ++counts_[id]; });
    out.tokens = ids.extent[0];
    out.expert.clear();
    out.loads.clear();
    out.first.assign(1, 0);
    for (std::size_t id = 0; id < counts_.size(); ++id) {
        if (const std::int64_t count = counts_[id]; count > 0) {
            counts_[id] = out.first.back();
            out.expert.push_back(static_cast<std::int64_t>(id));
            out.loads.push_back(count);
            out.first.push_back(out.first.back() + count);
        }
    }
    out.token.resize(at(out.first.back()));
    out.weight.resize(at(out.first.back()));
    each([&](std::int64_t t, std::int64_t c, std::size_t id) {
        const std::size_t to = at(counts_[id]++);
        out.token[to] = t;
        out.weight[to] = weights.present() ? *weights.at(t, c) : 0.0F;
    });
}

void Planner::describe(const State& state, double now, LayerPlan& out) {
    const std::size_t n = out.expert.size();
    out.hits = 0;
    out.transfer.assign(n, costs_.transfer);
    for (auto* column :
         {&out.ready, &out.cpu, &out.gpu, &out.start, &out.end, &out.sent, &out.arrived}) {
        column->resize(n);
    }
    out.device.resize(n);
    out.order.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
        const auto load = static_cast<double>(out.loads[i]);
        out.cpu[i] = costs_.cpu.at(load);
        out.gpu[i] = costs_.gpu.at(load);
        const std::size_t e = at(out.expert[i]);
        const bool here = state.slot[e] != kNowhere;
        out.hits += here ? 1 : 0;
        out.ready[i] = here ? std::max(0.0, state.arrival[e] - now) : kNotCached;
    }
}

bool Planner::take(State& state, std::int64_t expert, std::int64_t& slot) {
    std::int64_t victim = -1;
    if (!state.cache->take(expert, victim)) {
        return false;
    }
    if (victim >= 0) {
        slot = std::exchange(state.slot[at(victim)], kNowhere);
        state.arrival[at(victim)] = 0.0;
    } else {
        slot = state.free.back();
        state.free.pop_back();
    }
    state.slot[at(expert)] = slot;
    return true;
}

// Loads go out as early as their slots allow: one of the staging slots is loaded again only after the
// computation that needs what it holds.
void Planner::command(State& state, LayerPlan& out) {
    const auto n = static_cast<std::int64_t>(out.expert.size());
    const auto by_order = [&](std::int64_t a, std::int64_t b) {
        return out.order[at(a)] < out.order[at(b)];
    };
    out.commands.clear();
    out.on_cpu.clear();
    out.row.assign(at(n), 0);
    queue_.clear();
    for (std::int64_t i = 0; i < n; ++i) {
        (out.device[at(i)] == static_cast<std::uint8_t>(Device::kGpu) ? queue_ : out.on_cpu)
            .push_back(i);
    }
    std::sort(queue_.begin(), queue_.end(), by_order);
    std::sort(out.on_cpu.begin(), out.on_cpu.end(), by_order);
    out.cpu_rows = out.gpu_rows = 0;
    for (const std::int64_t i : out.on_cpu) {
        out.row[at(i)] = out.cpu_rows;
        out.cpu_rows += out.loads[at(i)];
    }
    // Moved experts stand in the GPU's queue in the order of their transfers.
    std::vector<std::int64_t> slot(at(n), kNowhere);
    std::vector<std::size_t> behind(at(staging_), 0);  // each one's last in the queue
    std::size_t next = 0;
    const auto compute_to = [&](std::size_t end) {
        for (; next < end; ++next) {
            const std::int64_t i = queue_[next];
            out.row[at(i)] = out.gpu_rows;
            out.gpu_rows += out.loads[at(i)];
            out.commands.push_back({false, i, slot[at(i)]});
        }
    };
    for (const std::int64_t i : queue_) {
        slot[at(i)] = state.slot[at(out.expert[at(i)])];
    }
    std::int64_t staged = 0;
    for (std::size_t place = 0; place < queue_.size(); ++place) {
        const std::int64_t i = queue_[place];
        if (out.ready[at(i)] != kNotCached) {
            continue;
        }
        if (!take(state, out.expert[at(i)], slot[at(i)])) {
            const std::int64_t stage = staged++ % staging_;
            compute_to(behind[at(stage)]);
            behind[at(stage)] = place + 1;
            slot[at(i)] = -1 - stage;
        }
        out.commands.push_back({true, i, slot[at(i)]});
    }
    compute_to(queue_.size());
}

void Planner::learn(State& state, const LayerPlan& out) noexcept {
    std::size_t next = 0;
    for (std::size_t e = 0; e < state.guessed.size(); ++e) {
        const bool used = next < out.expert.size() && at(out.expert[next]) == e;
        next += used ? 1 : 0;
        for (std::size_t d = 0; d < guessed_.size(); ++d) {
            if ((state.guessed[e] >> d & 1) != 0) {
                guessed_[d] += 1.0;
                right_[d] += used ? 1.0 : 0.0;
            }
        }
        state.guessed[e] = 0;
        if (used) {
            state.arrival[e] = 0.0;  // the device waits for it, nobody else needs to
        }
    }
}

Status Planner::plan(std::int64_t layer, View<const std::int64_t, 2> ids,
                     View<const float, 2> weights, View<const float, 2> scores, double now,
                     LayerPlan& out) noexcept {
    QS_TRY(check(layer, ids));
    QS_TRY(same("weights.shape[0]", weights.extent[0], "", ids.extent[0]));
    QS_TRY(same("weights.shape[1]", weights.extent[1], "", ids.extent[1]));
    for (std::int64_t t = 0; t < ids.extent[0]; ++t) {
        for (std::int64_t c = 0; c < ids.extent[1]; ++c) {
            if (*ids.at(t, c) >= 0 && !std::isfinite(*weights.at(t, c))) {
                return invalid("weights", "a number that is not finite", "finite numbers");
            }
        }
    }
    State& state = layers_[at(layer)];
    QS_TRY(check_scores(state, scores, ids.extent[0]));
    try {
        out.layer = layer;
        group(ids, weights, out);
        describe(state, now, out);
        QS_TRY(schedule(
            layer_of(out, costs_.cpu_first, std::max(0.0, bus_free_ - now)), policy_, workspace_,
            {out.device, out.order, out.start, out.end, out.sent, out.arrived}, out.ends));
        state.cache->begin(out.expert, scores, ids.extent[1]);
        learn(state, out);
        command(state, out);
        bus_free_ = now + out.ends.pcie;
    } catch (const std::bad_alloc&) {
        return no_memory("plan", static_cast<std::int64_t>(out.token.size()));
    }
    return {};
}

Status Planner::look_ahead(const LayerPlan& plan, std::span<const Guess> guesses,
                           std::vector<Load>& out) noexcept {
    out.clear();
    if (policy_ == Policy::kCpuOnly) {
        return {};
    }
    if (guesses.size() > static_cast<std::size_t>(kMaxDistance)) {
        return invalid("guesses", static_cast<std::int64_t>(guesses.size()), "at most",
                       kMaxDistance);
    }
    try {
        const auto load = [&](std::int64_t layer, std::int64_t expert) {
            State& state = layers_[at(layer)];
            std::int64_t slot = kNowhere;
            if (!take(state, expert, slot)) {
                return false;
            }
            bus_free_ += costs_.transfer;
            state.arrival[at(expert)] = bus_free_;
            out.push_back({layer, expert, slot});
            return true;
        };
        double budget = idle(plan);
        std::vector<Predicted> predicted;
        std::array<std::vector<double>, kMaxDistance> chance;
        for (std::size_t g = 0; g < guesses.size(); ++g) {
            const Guess& guess = guesses[g];
            QS_TRY(check(guess.layer, guess.ids));
            if (guess.distance < 1 || guess.distance > kMaxDistance || guess.layer == plan.layer) {
                return invalid("distance", guess.distance, "1 to", kMaxDistance);
            }
            State& state = layers_[at(guess.layer)];
            LayerPlan& to = ahead_[g];
            group(guess.ids, {}, to);
            // What is in flight will have arrived by then.
            describe(state, kMaxTime, to);
            for (const std::int64_t expert : to.expert) {
                state.guessed[at(expert)] |= static_cast<std::uint8_t>(1U << (guess.distance - 1));
            }
            chance[g].assign(to.expert.size(), right_share(guess.distance));
            predicted.push_back({layer_of(to, costs_.cpu_first, 0.0), chance[g]});
        }
        if (!predicted.empty()) {
            std::vector<Prefetch> found(64);
            std::int64_t count = 0;
            QS_TRY(prefetch(predicted, budget, policy_, workspace_, found, count));
            for (std::int64_t i = 0; i < count; ++i) {
                const Prefetch& one = found[at(i)];
                const auto g = static_cast<std::size_t>(one.layer);
                const std::int64_t expert = ahead_[g].expert[static_cast<std::size_t>(one.expert)];
                budget -= load(guesses[g].layer, expert) ? costs_.transfer : 0.0;
            }
        }
        // What the CPU has to compute this time can be there the next time.
        const bool fixed = policy_ == Policy::kFixed;
        for (std::size_t i = 0; !fixed && i < plan.on_cpu.size() && budget >= costs_.transfer;
             ++i) {
            const std::size_t active = at(plan.on_cpu[i]);
            if (plan.ready[active] == kNotCached && load(plan.layer, plan.expert[active])) {
                budget -= costs_.transfer;
            }
        }
    } catch (const std::bad_alloc&) {
        return no_memory("guesses", static_cast<std::int64_t>(guesses.size()));
    }
    return {};
}

Status Planner::needless(std::int64_t layer, View<const std::int64_t, 2> ids, double now,
                         std::vector<Load>& out) noexcept {
    out.clear();
    QS_TRY(check(layer, ids));  // and notes in seen_ what is needed
    const State& state = layers_[at(layer)];
    try {
        for (std::size_t e = 0; e < state.arrival.size(); ++e) {
            if (state.arrival[e] > now && seen_[e] < 0) {
                out.push_back({layer, static_cast<std::int64_t>(e), state.slot[e]});
            }
        }
    } catch (const std::bad_alloc&) {
        return no_memory("loads", static_cast<std::int64_t>(out.size()));
    }
    return {};
}

void Planner::cancelled(const Load& load) noexcept {
    State& state = layers_[at(load.layer)];
    state.cache->forget(load.expert);
    state.free.push_back(std::exchange(state.slot[at(load.expert)], kNowhere));
    state.arrival[at(load.expert)] = 0.0;
    bus_free_ -= costs_.transfer;
}

void Planner::finish(const LayerPlan& plan) noexcept { layers_[at(plan.layer)].cache->release(); }

std::int64_t Planner::place(std::int64_t layer, std::int64_t expert) {
    State& state = layers_[at(layer)];
    std::int64_t slot = state.slot[at(expert)];
    if (slot == kNowhere && !take(state, expert, slot)) {
        return kNowhere;
    }
    state.cache->release();
    return slot;
}

void Planner::clear(std::int64_t layer) noexcept {
    State& state = layers_[at(layer)];
    for (std::size_t e = 0; e < state.slot.size(); ++e) {
        if (state.slot[e] != kNowhere) {
            state.cache->forget(static_cast<std::int64_t>(e));
            state.free.push_back(std::exchange(state.slot[e], kNowhere));
            state.arrival[e] = 0.0;
        }
    }
}

std::vector<std::int64_t> Planner::resident(std::int64_t layer) const {
    const State& state = layers_[at(layer)];
    std::vector<std::int64_t> found;
    for (std::size_t e = 0; e < state.slot.size(); ++e) {
        if (state.slot[e] != kNowhere) {
            found.push_back(static_cast<std::int64_t>(e));
        }
    }
    return found;
}

double Planner::right_share(std::int64_t distance) const noexcept {
    const std::size_t d = at(distance - 1);
    return (right_[d] + 1.0) / (guessed_[d] + 2.0);
}

Status compute_on_cpu(const LayerPlan& plan, const CpuArgs& args, int threads,
                      Workbench& bench) noexcept {
    const std::int64_t width = args.x.extent[1];
    QS_TRY(same("x.shape[0]", args.x.extent[0], "", plan.tokens));
    bench.spans.clear();
    const bool one = plan.tokens == 1;
    try {
        bench.rows.resize(at(plan.cpu_rows * width));
        bench.ids.resize(at(plan.cpu_rows));
        bench.inputs.resize(one ? 0 : at(plan.cpu_rows * width));
        bench.spans.reserve(plan.on_cpu.size());
    } catch (const std::bad_alloc&) {
        return no_memory("rows", plan.cpu_rows * width);
    }
    for (const std::int64_t active : plan.on_cpu) {
        const std::int64_t begin = plan.first[at(active)];
        for (std::int64_t i = 0; i < plan.loads[at(active)]; ++i) {
            const std::int64_t row = plan.row[at(active)] + i;
            bench.ids[at(row)] = plan.expert[at(active)];
            if (!one) {
                std::copy_n(args.x.at(plan.token[at(begin + i)], 0), width,
                            bench.inputs.data() + row * width);
            }
        }
    }
    const float weight = 1.0F;
    const auto compute = [&](std::int64_t first, std::int64_t count) noexcept {
        const View<const float, 2> x =
            one ? View<const float, 2>{args.x.data, {count, width}, {0, 1}}
                : View<const float, 2>{
                      bench.inputs.data() + first * width, {count, width}, {width, 1}};
        return forward(*args.experts,
                       {x,
                        {bench.ids.data() + first, {count, 1}, {1, 1}},
                        {&weight, {count, 1}, {0, 0}},
                        {bench.rows.data() + first * width, {count, width}, {width, 1}},
                        args.compute},
                       threads);
    };
    const double begun = now_in_seconds();
    if (!args.paced) {
        QS_TRY(compute(0, plan.cpu_rows));
        bench.spans.push_back({0, plan.on_cpu.size(), begun, now_in_seconds()});
        return {};
    }
    double start = begun;
    for (std::size_t i = 0; i < plan.on_cpu.size(); ++i) {
        const std::size_t active = at(plan.on_cpu[i]);
        QS_TRY(compute(plan.row[active], plan.loads[active]));
        const auto end = Clock::time_point(std::chrono::duration_cast<Clock::duration>(
            std::chrono::duration<double>(begun + plan.end[active])));
        bool stopped = false;
        wait_until(end, [&] {
            stopped = stopped || (args.interrupted != nullptr && args.interrupted(args.context));
            return stopped;
        });
        if (stopped) {
            return invalid("layer", "an interrupt", "none");
        }
        const double ended = now_in_seconds();
        bench.spans.push_back({i, i + 1, start, ended});
        start = ended;
    }
    return {};
}

Status combine(const LayerPlan& plan, const Workbench& bench, View<const float, 2> device_rows,
               View<float, 2> out, int threads) noexcept {
    const std::int64_t width = out.extent[1];
    QS_TRY(same("out.shape[0]", out.extent[0], "", plan.tokens));
    if (plan.gpu_rows > 0) {
        QS_TRY(same("rows.shape[0]", device_rows.extent[0], "those of the device,", plan.gpu_rows));
        QS_TRY(same("rows.shape[1]", device_rows.extent[1], "", width));
    }
    const auto sum = [&](std::int64_t begin, std::int64_t end) noexcept {
        for (std::int64_t t = 0; t < plan.tokens; ++t) {
            std::fill_n(out.at(t, begin), end - begin, 0.0F);
        }
        for (std::size_t i = 0; i < plan.expert.size(); ++i) {
            const bool there = plan.device[i] == static_cast<std::uint8_t>(Device::kGpu);
            for (std::int64_t k = 0; k < plan.loads[i]; ++k) {
                const std::size_t a = at(plan.first[i] + k);
                const float* row = there ? device_rows.at(plan.row[i] + k, begin)
                                         : bench.rows.data() + (plan.row[i] + k) * width + begin;
                float* to = out.at(plan.token[a], begin);
                for (std::int64_t r = 0; r < end - begin; ++r) {
                    to[r] += plan.weight[a] * row[r];
                }
            }
        }
    };
    constexpr std::int64_t kColumns = 256;
    const bool small = static_cast<std::int64_t>(plan.token.size()) * width < 65536;
    if (small) {
        sum(0, width);
        return {};
    }
    parallel_for(divide_up(width, kColumns), threads, [&](std::int64_t i) noexcept {
        sum(i * kColumns, std::min(width, (i + 1) * kColumns));
    });
    return {};
}

}  // namespace quernstone::moe
