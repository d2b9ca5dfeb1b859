#include <algorithm>
#include <limits>

#include "moe/schedule_search.h"

namespace quernstone::moe {
namespace {

constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// What is left of the GPU's time, and what the CPU has, when the first a of
// the available experts in `order` or the first b of the others go to the CPU.
void sum_up(Search& s, const Index* order) noexcept {
    const List& list = s.list;
    const Index others = list.n - list.available;
    std::fill_n(s.trial.begin(), list.n, std::uint8_t{1});
    double cpu = 0.0;
    for (Index a = 0; a <= list.available; ++a) {
        double gpu = list.gpu_free;
        for (Index place = 0; place < list.available; ++place) {
            if (s.trial[at(place)] != 0) {
                gpu = std::max(gpu, list.ready[at(place)]) + list.gpu[at(place)];
            }
        }
        s.gpu_available[at(a)] = gpu;
        s.cpu_available[at(a)] = cpu;
        if (a < list.available) {
            s.trial[at(order[a])] = 0;
            cpu += list.cpu[at(order[a])];
        }
    }
    cpu = 0.0;
    for (Index b = 0; b <= others; ++b) {
        double bus = list.bus_free;
        double flow = -kInfinity;
        double work = 0.0;
        for (Index place = list.available; place < list.n; ++place) {
            if (s.trial[at(place)] != 0) {
                bus += list.transfer[at(place)];
                flow = std::max(flow, bus) + list.gpu[at(place)];
                work += list.gpu[at(place)];
            }
        }
        s.flow[at(b)] = flow;
        s.gpu_moved[at(b)] = work;
        s.cpu_moved[at(b)] = cpu;
        if (b < others) {
            s.trial[at(order[list.available + b])] = 0;
            cpu += list.cpu[at(order[list.available + b])];
        }
    }
}

// To trial the best partition whose CPU side is the cheapest a of the
// available experts and the cheapest b of the others. Of equals the one that
// moves least, so that the bus is left to others.
void assign_sorted(Search& s) noexcept {
    const List& list = s.list;
    for (Index place = 0; place < list.n; ++place) {
        s.cheapest[at(place)] = place;
    }
    // Equal ones from the back, where the CPU begins.
    const auto cheaper = [&](Index i, Index j) {
        return list.cpu[at(i)] != list.cpu[at(j)] ? list.cpu[at(i)] < list.cpu[at(j)] : i > j;
    };
    std::sort(s.cheapest.begin(), s.cheapest.begin() + list.available, cheaper);
    std::sort(s.cheapest.begin() + list.available, s.cheapest.begin() + list.n, cheaper);
    const Index* order = s.cheapest.data();
    sum_up(s, order);

    const auto cpu = [&](Index a, Index b) {
        return a + b == 0
                   ? 0.0
                   : list.cpu_free + list.cpu_first + (s.cpu_available[at(a)] + s.cpu_moved[at(b)]);
    };
    const auto gpu = [&](Index a, Index b) {
        return a + b == list.n
                   ? 0.0
                   : std::max(s.gpu_available[at(a)] + s.gpu_moved[at(b)], s.flow[at(b)]);
    };
    double best = kInfinity;
    Index best_a = 0;
    Index best_b = 0;
    const auto consider = [&](Index a, Index b) {
        if (std::max(cpu(a, b), gpu(a, b)) < best) {
            best = std::max(cpu(a, b), gpu(a, b));
            best_a = a;
            best_b = b;
        }
    };
    // The fewer of the others the CPU has, the more available ones it may take.
    Index a = 0;
    for (Index b = list.n - list.available; b >= 0; --b) {
        while (a < list.available && cpu(a, b) < gpu(a, b)) {
            ++a;
        }
        if (a > 0) {
            consider(a - 1, b);
        }
        consider(a, b);
    }
    for (Index k = 0; k < list.available; ++k) {
        s.trial[at(order[k])] = k >= best_a;
    }
    for (Index k = list.available; k < list.n; ++k) {
        s.trial[at(order[k])] = k - list.available >= best_b;
    }
}

// Whether the GPU and the bus cannot tell the experts of a kind apart: then no
// partition is better than the best sorted one.
bool uniform(const List& list) noexcept {
    for (Index place = 1; place < list.n; ++place) {
        if (place < list.available) {
            if (list.gpu[at(place)] != list.gpu[0] ||
                std::max(list.ready[at(place)], list.gpu_free) !=
                    std::max(list.ready[0], list.gpu_free)) {
                return false;
            }
        } else if (list.gpu[at(place)] != list.gpu[at(list.available)] ||
                   list.transfer[at(place)] != list.transfer[at(list.available)]) {
            return false;
        }
    }
    return true;
}

}  // namespace

void search_hybrid(Search& search) noexcept {
    search.ends.makespan = kInfinity;
    assign_sorted(search);
    search.offer();
    assign_list(search);
    search.offer();
    assign_event(search);
    search.offer();
    if (!uniform(search.list)) {
        search_labels(search, {kWidth, true, search.labels, search.label_runs, search.steps,
                               search.label_order, search.label_rank, search.label_tree});
    }
}

}  // namespace quernstone::moe
