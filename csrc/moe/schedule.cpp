#include "moe/schedule.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "moe/schedule_search.h"

namespace quernstone::moe {
namespace {

constexpr bool is_time(double x) noexcept { return x >= 0.0 && x <= kMaxTime; }

Status check_times(std::span<const double> x, std::size_t n, const char* what) noexcept {
    if (x.size() != n) {
        return invalid(what, static_cast<std::int64_t>(x.size()), "as many as loads,",
                       static_cast<std::int64_t>(n));
    }
    for (const double time : x) {
        if (!is_time(time)) {
            return invalid(what, "a number that is no time", "0 to 1e100");
        }
    }
    return {};
}

Status check_time(double x, const char* what) noexcept {
    return is_time(x) ? Status{} : invalid(what, "a number that is no time", "0 to 1e100");
}

template <class T>
Status check_size(std::span<T> x, std::size_t n, const char* what) noexcept {
    return x.size() == n ? Status{}
                         : invalid(what, static_cast<std::int64_t>(x.size()), "as many as loads,",
                                   static_cast<std::int64_t>(n));
}

// Johnson's rule: who crosses faster than it computes goes first, by ascending
// transfer; then the others, by descending computation. Larger loads break ties.
struct Johnson {
    const Layer& layer;

    [[nodiscard]] bool operator()(Index a, Index b) const noexcept {
        const auto i = static_cast<std::size_t>(a);
        const auto j = static_cast<std::size_t>(b);
        const bool fast_i = layer.transfer[i] < layer.gpu[i];
        const bool fast_j = layer.transfer[j] < layer.gpu[j];
        if (fast_i != fast_j) {
            return fast_i;
        }
        if (fast_i && layer.transfer[i] != layer.transfer[j]) {
            return layer.transfer[i] < layer.transfer[j];
        }
        if (!fast_i && layer.gpu[i] != layer.gpu[j]) {
            return layer.gpu[i] > layer.gpu[j];
        }
        return layer.loads[i] != layer.loads[j] ? layer.loads[i] > layer.loads[j] : a < b;
    }
};

}  // namespace

Workspace::Workspace() noexcept : search_(new (std::nothrow) Search) {}
Workspace::~Workspace() = default;

Status check(const Layer& layer) noexcept {
    const std::size_t n = layer.loads.size();
    if (n > static_cast<std::size_t>(kMaxExperts)) {
        return invalid("loads.shape[0] (experts)", static_cast<std::int64_t>(n), "at most",
                       kMaxExperts);
    }
    for (const std::int64_t load : layer.loads) {
        if (load < 1) {
            return invalid("loads", load, "at least", 1);
        }
    }
    QS_TRY(check_size(layer.ready, n, "ready.shape[0] (experts)"));
    for (const double time : layer.ready) {
        if (!is_time(time) && time != kNotCached) {
            return invalid("ready", "a number that is no time", "0 to 1e100, or infinity");
        }
    }
    QS_TRY(check_times(layer.cpu, n, "cpu"));
    QS_TRY(check_times(layer.gpu, n, "gpu"));
    QS_TRY(check_times(layer.transfer, n, "transfer"));
    QS_TRY(check_time(layer.cpu_first, "cpu_first"));
    QS_TRY(check_time(layer.cpu_free, "cpu_free"));
    QS_TRY(check_time(layer.gpu_free, "gpu_free"));
    return check_time(layer.pcie_free, "pcie_free");
}

void List::make(const Layer& layer) noexcept {
    n = static_cast<Index>(layer.loads.size());
    cpu_first = layer.cpu_first;
    cpu_free = layer.cpu_free;
    gpu_free = layer.gpu_free;
    bus_free = layer.pcie_free;
    available = 0;
    Index back = n;
    for (Index i = 0; i < n; ++i) {
        const double arrival = layer.ready[static_cast<std::size_t>(i)];
        if (arrival == kNotCached) {
            expert[static_cast<std::size_t>(--back)] = i;
        } else {
            expert[static_cast<std::size_t>(available++)] = i;
            bus_free = std::max(bus_free, arrival);
        }
    }
    // An arrival while the GPU is busy is as good as none.
    const auto wait = [&](Index i) {
        return std::max(layer.ready[static_cast<std::size_t>(i)], gpu_free);
    };
    std::sort(expert.begin(), expert.begin() + available, [&](Index a, Index b) {
        if (wait(a) != wait(b)) {
            return wait(a) < wait(b);
        }
        const std::int64_t load_a = layer.loads[static_cast<std::size_t>(a)];
        const std::int64_t load_b = layer.loads[static_cast<std::size_t>(b)];
        return load_a != load_b ? load_a > load_b : a < b;
    });
    std::sort(expert.begin() + available, expert.begin() + n, Johnson{layer});
    for (std::size_t place = 0; place < static_cast<std::size_t>(n); ++place) {
        const auto i = static_cast<std::size_t>(expert[place]);
        load[place] = layer.loads[i];
        ready[place] = layer.ready[i];
        cpu[place] = layer.cpu[i];
        gpu[place] = layer.gpu[i];
        transfer[place] = layer.transfer[i];
    }
}

Ends List::evaluate(const Partition& on_gpu) const noexcept {
    const auto count = static_cast<std::size_t>(n);
    const auto first_moved = static_cast<std::size_t>(available);
    Ends ends{cpu_free, gpu_free, bus_free, 0.0};
    std::size_t here = 0;
    for (std::size_t place = 0; place < first_moved; ++place) {
        if (on_gpu[place] != 0) {
            ends.gpu = std::max(ends.gpu, ready[place]) + gpu[place];
            ++here;
        }
    }
    for (std::size_t place = first_moved; place < count; ++place) {
        if (on_gpu[place] != 0) {
            ends.pcie += transfer[place];
            ends.gpu = std::max(ends.gpu, ends.pcie) + gpu[place];
            ++here;
        }
    }
    if (here > 0) {
        ends.makespan = ends.gpu;
    }
    if (here < count) {
        double first = cpu_first;
        for (std::size_t place = count; place-- > 0;) {
            if (on_gpu[place] == 0) {
                ends.cpu += first + cpu[place];
                first = 0.0;
            }
        }
        ends.makespan = std::max(ends.makespan, ends.cpu);
    }
    return ends;
}

void Search::sort_by_load() noexcept {
    for (Index place = 0; place < list.n; ++place) {
        by_load[static_cast<std::size_t>(place)] = place;
    }
    const auto larger = [&](Index a, Index b) {
        const std::int64_t load_a = list.load[static_cast<std::size_t>(a)];
        const std::int64_t load_b = list.load[static_cast<std::size_t>(b)];
        return load_a != load_b ? load_a > load_b
                                : list.expert[static_cast<std::size_t>(a)] <
                                      list.expert[static_cast<std::size_t>(b)];
    };
    std::sort(by_load.begin(), by_load.begin() + list.available, larger);
    std::sort(by_load.begin() + list.available, by_load.begin() + list.n, larger);
}

void Search::offer() noexcept {
    const Ends found = list.evaluate(trial);
    if (found.makespan < ends.makespan) {
        ends = found;
        std::copy_n(trial.begin(), list.n, best.begin());
    }
}

Status choose(const Layer& layer, Policy policy, Search& search) noexcept {
    search.list.make(layer);
    const auto n = static_cast<std::size_t>(search.list.n);
    const List& list = search.list;
    if (policy == Policy::kHybrid || policy == Policy::kExact) {
        search_hybrid(search);
        return policy == Policy::kExact ? search_exact(search) : Status{};
    }
    for (std::size_t place = 0; place < n; ++place) {
        const bool cached = place < static_cast<std::size_t>(list.available);
        const bool cheaper = list.transfer[place] + list.gpu[place] < list.cpu[place];
        search.trial[place] = policy == Policy::kGpuOnly ||
                              (cached && policy != Policy::kCpuOnly) ||
                              (cheaper && policy == Policy::kFiddler);
    }
    if (policy == Policy::kList) {
        assign_list(search);
    } else if (policy == Policy::kEvent) {
        assign_event(search);
    }
    search.best = search.trial;
    search.ends = list.evaluate(search.best);
    return {};
}

Status schedule(const Layer& layer, Policy policy, Workspace& workspace, const Schedule& out,
                Ends& ends) noexcept {
    QS_TRY(check(layer));
    const std::size_t n = layer.loads.size();
    QS_TRY(check_size(out.device, n, "device.shape[0] (experts)"));
    QS_TRY(check_size(out.order, n, "order.shape[0] (experts)"));
    QS_TRY(check_size(out.start, n, "start.shape[0] (experts)"));
    QS_TRY(check_size(out.end, n, "end.shape[0] (experts)"));
    QS_TRY(check_size(out.transfer_start, n, "transfer_start.shape[0] (experts)"));
    QS_TRY(check_size(out.transfer_end, n, "transfer_end.shape[0] (experts)"));
    if (!workspace.ready()) {
        return no_memory("workspace", static_cast<std::int64_t>(sizeof(Search)));
    }
    Search& search = workspace.search();
    QS_TRY(choose(layer, policy, search));
    ends = search.ends;

    // As evaluate() sums, so that the makespan is the last end to the bit.
    const List& list = search.list;
    double gpu = list.gpu_free;
    double bus = list.bus_free;
    double cpu = list.cpu_free;
    double first = list.cpu_first;
    std::int32_t on_gpu = 0;
    std::int32_t on_cpu = 0;
    for (std::size_t place = 0; place < n; ++place) {
        const auto i = static_cast<std::size_t>(list.expert[place]);
        out.transfer_start[i] = out.transfer_end[i] = std::numeric_limits<double>::quiet_NaN();
        if (search.best[place] == 0) {
            continue;
        }
        double arrival = list.ready[place];
        if (place >= static_cast<std::size_t>(list.available)) {
            out.transfer_start[i] = bus;
            arrival = out.transfer_end[i] = bus += list.transfer[place];
        }
        out.device[i] = static_cast<std::uint8_t>(Device::kGpu);
        out.order[i] = on_gpu++;
        out.start[i] = std::max(gpu, arrival);
        gpu = out.end[i] = out.start[i] + list.gpu[place];
    }
    for (std::size_t place = n; place-- > 0;) {
        if (search.best[place] == 0) {
            const auto i = static_cast<std::size_t>(list.expert[place]);
            out.device[i] = static_cast<std::uint8_t>(Device::kCpu);
            out.order[i] = on_cpu++;
            out.start[i] = cpu;
            cpu = out.end[i] = cpu + (first + list.cpu[place]);
            first = 0.0;
        }
    }
    return {};
}

}  // namespace quernstone::moe
