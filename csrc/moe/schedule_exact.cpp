#include <algorithm>
#include <map>
#include <new>
#include <vector>

#include "moe/schedule_search.h"

namespace quernstone::moe {
namespace {

constexpr std::size_t kMaxLabels = std::size_t{1} << 20;

// A partition of the places before one: where it leaves the three timelines.
struct Label {
    double cpu, gpu, bus;
    std::uint32_t parent;  // in the step before
    bool on_gpu;           // the last place
};

struct Step {
    std::uint32_t parent;
    bool on_gpu;
};

constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }

// Nothing of the places still open can make a label better than this.
class Bound {
   public:
    explicit Bound(const List& list) : list_(list) {
        for (Index p = 0; p < list.n; ++p) {
            by_gpu_.push_back(p);
            if (p >= list.available) {
                by_bus_.push_back(p);
            }
        }
        sort(by_gpu_, list.gpu);
        sort(by_bus_, list.transfer);
    }

    [[nodiscard]] double operator()(const Label& label, Index next) const noexcept {
        return std::max(fractional(label.cpu, label.gpu, next, by_gpu_, list_.gpu),
                        fractional(label.cpu, label.bus, next, by_bus_, list_.transfer));
    }

   private:
    // Dearest for the CPU, measured in the other machine's time, first.
    void sort(std::vector<Index>& order, const Column<double>& other) const {
        const auto ratio = [&](Index p) {
            return other[at(p)] > 0.0 ? list_.cpu[at(p)] / other[at(p)]
                                      : std::numeric_limits<double>::infinity();
        };
        std::stable_sort(order.begin(), order.end(),
                         [&](Index a, Index b) { return ratio(a) > ratio(b); });
    }

    // Least T at which the other machine, from `other` on, takes fractions of
    // the open places so that the CPU is done by T too.
    [[nodiscard]] double fractional(double cpu, double other, Index next,
                                    const std::vector<Index>& order,
                                    const Column<double>& cost) const noexcept {
        for (const Index p : order) {
            cpu += p >= next ? list_.cpu[at(p)] : 0.0;
        }
        for (const Index p : order) {
            if (p < next) {
                continue;
            }
            const double less = list_.cpu[at(p)];
            const double more = cost[at(p)];
            if (other + more >= cpu - less) {
                // other + f more = cpu - f less
                const double f = cpu <= other ? 0.0 : (cpu - other) / (more + less);
                return std::max(cpu - f * less, other);
            }
            cpu -= less;
            other += more;
        }
        return std::max(cpu, other);
    }

    const List& list_;
    std::vector<Index> by_gpu_, by_bus_;
};

// Labels that no other one beats on all three timelines. `labels` are sorted by
// bus; of equals the first stays.
void keep_undominated(std::vector<Label>& labels) {
    std::map<double, double> front;  // GPU -> CPU, descending
    std::size_t kept = 0;
    for (const Label& label : labels) {
        auto after = front.upper_bound(label.gpu);
        if (after != front.begin() && std::prev(after)->second <= label.cpu) {
            continue;
        }
        while (after != front.end() && after->second >= label.cpu) {
            after = front.erase(after);
        }
        front[label.gpu] = label.cpu;
        labels[kept++] = label;
    }
    labels.resize(kept);
}

Status run(Search& s) {
    const List& list = s.list;
    const auto all = [&](std::uint8_t device) {
        std::fill_n(s.trial.begin(), list.n, device);
        s.offer();
    };
    // Where one device has nothing to do its timeline does not count, and
    // without the CPU neither does cpu_first: these two are seen to here.
    all(0);
    all(1);
    const Bound bound(list);
    std::vector<Label> labels{{list.cpu_free + list.cpu_first, list.gpu_free, list.bus_free, 0, false}};
    std::vector<std::vector<Step>> steps(at(list.n));
    std::vector<Label> next;
    std::size_t total = 0;
    for (Index p = 0; p < list.n; ++p) {
        next.clear();
        const auto add = [&](const Label& label) {
            if (bound(label, p + 1) < s.ends.makespan * (1.0 - 1e-12)) {
                next.push_back(label);
            }
        };
        for (std::size_t i = 0; i < labels.size(); ++i) {
            const Label& from = labels[i];
            const auto parent = static_cast<std::uint32_t>(i);
            add({from.cpu + list.cpu[at(p)], from.gpu, from.bus, parent, false});
            const bool moved = p >= list.available;
            const double bus = from.bus + (moved ? list.transfer[at(p)] : 0.0);
            const double arrival = moved ? bus : list.ready[at(p)];
            add({from.cpu, std::max(from.gpu, arrival) + list.gpu[at(p)], bus, parent, true});
        }
        std::stable_sort(next.begin(), next.end(), [](const Label& a, const Label& b) {
            return a.bus != b.bus   ? a.bus < b.bus
                   : a.gpu != b.gpu ? a.gpu < b.gpu
                                    : a.cpu < b.cpu;
        });
        keep_undominated(next);
        labels.swap(next);
        total += labels.size();
        if (total > kMaxLabels) {
            return invalid("policy 'exact': partial schedules", static_cast<std::int64_t>(total),
                           "at most", static_cast<std::int64_t>(kMaxLabels));
        }
        for (const Label& label : labels) {
            steps[at(p)].push_back({label.parent, label.on_gpu});
        }
    }
    const auto done = [](const Label& label) { return std::max(label.cpu, label.gpu); };
    const auto best = std::min_element(
        labels.begin(), labels.end(),
        [&](const Label& a, const Label& b) { return done(a) < done(b); });
    if (list.n > 0 && best != labels.end()) {
        auto i = static_cast<std::size_t>(best - labels.begin());
        for (Index p = list.n; p-- > 0;) {
            s.trial[at(p)] = steps[at(p)][i].on_gpu;
            i = steps[at(p)][i].parent;
        }
        s.offer();
    }
    return {};
}

}  // namespace

Status search_exact(Search& search) noexcept {
    try {
        return run(search);
    } catch (const std::bad_alloc&) {
        return no_memory("policy 'exact'", static_cast<std::int64_t>(kMaxLabels * sizeof(Label)));
    }
}

}  // namespace quernstone::moe
