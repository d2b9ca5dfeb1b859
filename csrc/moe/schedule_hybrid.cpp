#include <algorithm>

#include "moe/schedule_search.h"

namespace quernstone::moe {
namespace {

constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }
constexpr double kNone = -std::numeric_limits<double>::infinity();

// The best partition of those whose CPU side is the first a of the available
// experts and the first b of the others, in the order of `key`.
void offer_sorted(Search& s) noexcept {
    const List& list = s.list;
    for (Index place = 0; place < list.n; ++place) {
        s.key_order[at(place)] = place;
    }
    // Among equals from the back, where the CPU begins.
    const auto cheaper = [&](Index i, Index j) {
        return s.key[at(i)] != s.key[at(j)] ? s.key[at(i)] < s.key[at(j)] : i > j;
    };
    const Index* order = s.key_order.data();
    std::sort(s.key_order.begin(), s.key_order.begin() + list.available, cheaper);
    std::sort(s.key_order.begin() + list.available, s.key_order.begin() + list.n, cheaper);

    std::fill_n(s.trial.begin(), list.n, std::uint8_t{1});
    double sum = 0.0;
    for (Index a = 0; a <= list.available; ++a) {
        double gpu = list.gpu_free;
        for (Index place = 0; place < list.available; ++place) {
            gpu = s.trial[at(place)] != 0 ? std::max(gpu, list.ready[at(place)]) + list.gpu[at(place)]
                                          : gpu;
        }
        s.gpu_available[at(a)] = gpu;
        s.cpu_available[at(a)] = sum;
        if (a < list.available) {
            s.trial[at(order[a])] = 0;
            sum += list.cpu[at(order[a])];
        }
    }
    const Index others = list.n - list.available;
    sum = 0.0;
    for (Index b = 0; b <= others; ++b) {
        double bus = list.bus_free;
        double end = kNone;
        double work = 0.0;
        for (Index place = list.available; place < list.n; ++place) {
            if (s.trial[at(place)] != 0) {
                bus += list.transfer[at(place)];
                end = std::max(end, bus) + list.gpu[at(place)];
                work += list.gpu[at(place)];
            }
        }
        s.flow[at(b)] = end;
        s.gpu_moved[at(b)] = work;
        s.cpu_moved[at(b)] = sum;
        if (b < others) {
            s.trial[at(order[list.available + b])] = 0;
            sum += list.cpu[at(order[list.available + b])];
        }
    }

    // More of one kind on the CPU asks for less of the other: two fingers.
    double best = std::numeric_limits<double>::infinity();
    Index best_a = 0;
    Index best_b = 0;
    for (Index b = others; b >= 0; --b) {
        for (Index a = 0; a <= list.available; ++a) {
            const bool none = a + b == 0;
            const bool all = a + b == list.n;
            const double cpu = none ? 0.0
                                    : list.cpu_free + list.cpu_first + s.cpu_available[at(a)] +
                                          s.cpu_moved[at(b)];
            const double gpu =
                all ? 0.0 : std::max(s.gpu_available[at(a)] + s.gpu_moved[at(b)], s.flow[at(b)]);
            const double end = std::max(cpu, gpu);
            if (end < best) {
                best = end;
                best_a = a;
                best_b = b;
            }
        }
    }
    for (Index a = 0; a < list.available; ++a) {
        s.trial[at(order[a])] = a >= best_a;
    }
    for (Index b = 0; b < others; ++b) {
        s.trial[at(order[list.available + b])] = b >= best_b;
    }
}

// Moves and exchanges of one expert with one, from `trial`.
class Exchange {
   public:
    explicit Exchange(Search& search) noexcept : s_(search), list_(search.list) {}

    void run() noexcept {
        for (Index round = 0; round < list_.n && improve(); ++round) {
        }
    }

   private:
    // A stretch of the GPU's queue: from when the GPU is free to when it has
    // done the stretch, x -> max(x + work, path).
    struct Stretch {
        double work = 0.0;
        double path = kNone;
    };

    [[nodiscard]] double arrival(Index p) const noexcept {
        return p < list_.available ? list_.ready[at(p)] : s_.bus_at[at(p)] + list_.transfer[at(p)];
    }

    [[nodiscard]] double on_bus(Index p) const noexcept {
        return p < list_.available ? 0.0 : list_.transfer[at(p)];
    }

    void prepare() noexcept {
        const Index n = list_.n;
        double gpu = list_.gpu_free;
        double bus = list_.bus_free;
        cpu_ = list_.cpu_free + list_.cpu_first;
        on_cpu_ = 0;
        for (Index p = 0; p < n; ++p) {
            s_.before[at(p)] = gpu;
            s_.bus_at[at(p)] = bus;
            if (s_.trial[at(p)] != 0) {
                gpu = std::max(gpu, arrival(p)) + list_.gpu[at(p)];
                bus += on_bus(p);
            } else {
                cpu_ += list_.cpu[at(p)];
                ++on_cpu_;
            }
        }
        gpu_ = gpu;
        Stretch rest;
        for (Index p = n; p-- > 0;) {
            s_.work[at(p + 1)] = rest.work;
            s_.path[at(p + 1)] = rest.path;
            if (s_.trial[at(p)] != 0) {
                rest.path = std::max(rest.path, arrival(p) + list_.gpu[at(p)] + rest.work);
                rest.work += list_.gpu[at(p)];
            }
        }
    }

    // GPU time after everything behind place p, of which the transfers come `later`.
    [[nodiscard]] double finish(double gpu, Index p, double later) const noexcept {
        return std::max(gpu + s_.work[at(p + 1)], s_.path[at(p + 1)] + later);
    }

    // GPU time after place j, taken on at time `gpu` while transfers come `later`.
    [[nodiscard]] double take(double gpu, Index j, double later) const noexcept {
        const double ready = j < list_.available ? list_.ready[at(j)]
                                                 : s_.bus_at[at(j)] + later + list_.transfer[at(j)];
        return std::max(gpu, ready) + list_.gpu[at(j)];
    }

    void consider(double cpu, bool cpu_used, double gpu, bool gpu_used, Index out,
                  Index in) noexcept {
        const double end = std::max(cpu_used ? cpu : 0.0, gpu_used ? gpu : 0.0);
        // Of equal ends the one that leaves the machines more time together.
        if (end < end_ || (end == end_ && cpu + gpu < sum_)) {
            end_ = end;
            sum_ = cpu + gpu;
            out_ = out;
            in_ = in;
        }
    }

    bool improve() noexcept {
        prepare();
        const Index n = list_.n;
        const double end = std::max(on_cpu_ > 0 ? cpu_ : 0.0, on_cpu_ < n ? gpu_ : 0.0);
        // Only what is better by more than rounding counts, or this might not end.
        end_ = end * (1.0 - 1e-12);
        sum_ = (cpu_ + gpu_) * (1.0 - 1e-12);
        out_ = in_ = -1;
        for (Index i = 0; i < n; ++i) {
            if (s_.trial[at(i)] != 0) {
                leave(i);
            } else {
                const double gpu = finish(take(s_.before[at(i)], i, 0.0), i, on_bus(i));
                consider(cpu_ - list_.cpu[at(i)], on_cpu_ > 1, gpu, true, -1, i);
            }
        }
        if (out_ < 0 && in_ < 0) {
            return false;
        }
        if (out_ >= 0) {
            s_.trial[at(out_)] = 0;
        }
        if (in_ >= 0) {
            s_.trial[at(in_)] = 1;
        }
        return true;
    }

    // Place i leaves the GPU, alone or for a place j of the CPU's.
    void leave(Index i) noexcept {
        const Index n = list_.n;
        const double cpu = cpu_ + list_.cpu[at(i)];
        const double earlier = -on_bus(i);
        consider(cpu, true, finish(s_.before[at(i)], i, earlier), on_cpu_ < n - 1, i, -1);
        Stretch between;
        for (Index j = i + 1; j < n; ++j) {
            if (s_.trial[at(j)] != 0) {
                between.path =
                    std::max(between.path, arrival(j)) + list_.gpu[at(j)];
                between.work += list_.gpu[at(j)];
            } else if (cpu - list_.cpu[at(j)] <= end_) {
                double gpu = std::max(s_.before[at(i)] + between.work, between.path + earlier);
                gpu = finish(take(gpu, j, earlier), j, earlier + on_bus(j));
                consider(cpu - list_.cpu[at(j)], true, gpu, true, i, j);
            }
        }
        between = {};
        for (Index j = i; j-- > 0;) {
            if (s_.trial[at(j)] != 0) {
                between.path = std::max(between.path, arrival(j) + list_.gpu[at(j)] + between.work);
                between.work += list_.gpu[at(j)];
            } else if (cpu - list_.cpu[at(j)] <= end_) {
                const double later = on_bus(j);
                double gpu = take(s_.before[at(j)], j, 0.0);
                gpu = std::max(gpu + between.work, between.path + later);
                gpu = finish(gpu, i, later + earlier);
                consider(cpu - list_.cpu[at(j)], true, gpu, true, i, j);
            }
        }
    }

    Search& s_;
    const List& list_;
    double cpu_ = 0.0, gpu_ = 0.0;  // ends of the present partition
    Index on_cpu_ = 0;
    double end_ = 0.0, sum_ = 0.0;  // of the best neighbour so far
    Index out_ = -1, in_ = -1;
};

}  // namespace

void search_hybrid(Search& search) noexcept {
    const List& list = search.list;
    search.ends.makespan = std::numeric_limits<double>::infinity();
    const auto start = [&]() noexcept {
        search.offer();
        Exchange(search).run();
        search.offer();
    };
    for (Index p = 0; p < list.n; ++p) {
        search.key[at(p)] = list.cpu[at(p)];
    }
    offer_sorted(search);
    start();
    assign_list(search);
    start();
    assign_event(search);
    start();
    for (Index p = 0; p < list.n; ++p) {
        const double gpu = list.gpu[at(p)];
        search.key[at(p)] =
            gpu > 0.0 ? list.cpu[at(p)] / gpu : std::numeric_limits<double>::infinity();
    }
    offer_sorted(search);
    start();
}

}  // namespace quernstone::moe
