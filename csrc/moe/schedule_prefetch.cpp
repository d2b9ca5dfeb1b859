#include <algorithm>
#include <cmath>

#include "moe/schedule_search.h"

namespace quernstone::moe {
namespace {

Status check_predicted(const Predicted& predicted) noexcept {
    QS_TRY(check(predicted.layer));
    if (predicted.probability.size() != predicted.layer.loads.size()) {
        return invalid("probability.shape[0] (experts)",
                       static_cast<std::int64_t>(predicted.probability.size()), "as many as loads,",
                       static_cast<std::int64_t>(predicted.layer.loads.size()));
    }
    for (const double p : predicted.probability) {
        if (!(p >= 0.0 && p <= 1.0)) {
            return invalid("probability", "a number that is no probability", "0 to 1");
        }
    }
    return {};
}

Status check_duration(double x, const char* what) noexcept {
    return x >= 0.0 && x <= kMaxTime ? Status{}
                                     : invalid(what, "a number that is no time", "0 to 1e100");
}

// The greedy choice over all layers.
class Chooser {
   public:
    Chooser(std::span<const Predicted> layers, Policy policy, Search& search) noexcept
        : layers_(layers), policy_(policy), s_(search) {}

    Status start() noexcept {
        for (std::size_t l = 0; l < layers_.size(); ++l) {
            std::copy(layers_[l].layer.ready.begin(), layers_[l].layer.ready.end(),
                      s_.arrivals[l].begin());
            QS_TRY(renew(l));
        }
        return {};
    }

    // The best transfer from `bus` on that ends by `budget`; gain 0 where none helps.
    [[nodiscard]] Prefetch best(double bus, double budget) const noexcept {
        Prefetch best;
        double best_time = 1.0;
        for (std::size_t l = 0; l < layers_.size(); ++l) {
            const Layer& layer = layers_[l].layer;
            for (std::size_t i = 0; i < layer.loads.size(); ++i) {
                const double gain = s_.drops[l][i] * layers_[l].probability[i];
                const double time = layer.transfer[i];
                if (bus + time <= budget && gain * best_time > best.gain * time) {
                    best = {static_cast<std::int32_t>(l),
                            static_cast<std::int32_t>(i),
                            bus,
                            bus + time,
                            s_.drops[l][i],
                            gain};
                    best_time = time;
                }
            }
        }
        return best;
    }

    Status take(const Prefetch& chosen) noexcept {
        const auto l = static_cast<std::size_t>(chosen.layer);
        s_.arrivals[l][static_cast<std::size_t>(chosen.expert)] = 0.0;
        return renew(l);
    }

   private:
    Status makespan(std::size_t l, double& to) noexcept {
        Layer layer = layers_[l].layer;
        layer.ready = {s_.arrivals[l].data(), layer.loads.size()};
        QS_TRY(choose(layer, policy_, s_));
        to = s_.ends.makespan;
        return {};
    }

    // What each expert of the layer would save, were it cached too.
    Status renew(std::size_t l) noexcept {
        double now = 0.0;
        QS_TRY(makespan(l, now));
        for (std::size_t i = 0; i < layers_[l].layer.loads.size(); ++i) {
            s_.drops[l][i] = 0.0;
            double& arrival = s_.arrivals[l][i];
            if (arrival != kNotCached || layers_[l].probability[i] == 0.0) {
                continue;
            }
            arrival = 0.0;
            double then = 0.0;
            const Status status = makespan(l, then);
            arrival = kNotCached;
            QS_TRY(status);
            // Rounding is no reason to use the bus.
            s_.drops[l][i] = now - then > kRounding * now ? now - then : 0.0;
        }
        return {};
    }

    std::span<const Predicted> layers_;
    Policy policy_;
    Search& s_;
};

}  // namespace

Status prefetch(std::span<const Predicted> layers, double budget, Policy policy,
                Workspace& workspace, std::span<Prefetch> out, std::int64_t& count) noexcept {
    count = 0;
    if (layers.size() > static_cast<std::size_t>(kMaxDistance)) {
        return invalid("layers", static_cast<std::int64_t>(layers.size()), "at most", kMaxDistance);
    }
    for (const Predicted& predicted : layers) {
        QS_TRY(check_predicted(predicted));
    }
    QS_TRY(check_duration(budget, "budget"));
    if (!workspace.ready()) {
        return no_memory("workspace", static_cast<std::int64_t>(sizeof(Search)));
    }
    Chooser chooser(layers, policy, workspace.search());
    QS_TRY(chooser.start());
    double bus = 0.0;
    while (static_cast<std::size_t>(count) < out.size()) {
        const Prefetch chosen = chooser.best(bus, budget);
        if (chosen.gain <= 0.0) {
            break;
        }
        QS_TRY(chooser.take(chosen));
        bus = chosen.end;
        out[static_cast<std::size_t>(count++)] = chosen;
    }
    return {};
}

Status cancel(const Queue& queue, const Kept& out, double& pcie_free) noexcept {
    const std::size_t q = queue.transfer.size();
    for (const double time : queue.transfer) {
        QS_TRY(check_duration(time, "transfer"));
    }
    const auto same = [&](std::size_t size, const char* what) {
        return size == q ? Status{}
                         : invalid(what, static_cast<std::int64_t>(size), "as many as transfer,",
                                   static_cast<std::int64_t>(q));
    };
    QS_TRY(same(queue.needed.size(), "needed.shape[0] (transfers)"));
    QS_TRY(same(out.keep.size(), "keep.shape[0] (transfers)"));
    QS_TRY(same(out.arrival.size(), "arrival.shape[0] (transfers)"));
    QS_TRY(check_duration(queue.now, "now"));
    if (!(queue.elapsed >= 0.0 && queue.elapsed <= (q > 0 ? queue.transfer[0] : 0.0))) {
        return invalid("elapsed", "another time", "0 to the first transfer's own");
    }
    if (queue.tiles < 1) {
        return invalid("tiles", queue.tiles, "at least", 1);
    }
    double bus = queue.now;
    for (std::size_t i = 0; i < q; ++i) {
        const double begun = i == 0 ? queue.elapsed : 0.0;
        double stop = queue.transfer[i];
        if (queue.needed[i] == 0 && begun < queue.transfer[i]) {
            const auto tiles = static_cast<double>(queue.tiles);
            const double tile = queue.transfer[i] / tiles;
            const double done = std::ceil(begun / tile);
            // The last tile ends with the transfer, which `tiles * tile` may miss by rounding.
            if (!(done >= tiles)) {
                stop = begun > 0.0 ? std::min(stop, done * tile) : 0.0;
            }
        }
        // A transfer whose end cannot be prevented is worth its place.
        const bool arrives = queue.needed[i] != 0 || (begun > 0.0 && stop >= queue.transfer[i]);
        out.keep[i] = arrives ? 1 : 0;
        bus += std::max(0.0, stop - begun);
        out.arrival[i] = arrives ? bus : kNotCached;
    }
    pcie_free = bus;
    return {};
}

}  // namespace quernstone::moe
