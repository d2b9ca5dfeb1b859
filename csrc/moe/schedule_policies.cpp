#include <algorithm>

#include "moe/schedule_search.h"

namespace quernstone::moe {
namespace {

constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }

// The timelines of the event simulation, and who waits for whom.
class Simulation {
   public:
    explicit Simulation(Search& search) noexcept : s_(search), list_(search.list) {
        s_.sort_by_load();
        for (; queued_ < list_.available; ++queued_) {
            s_.queue[at(queued_)] = s_.by_load[at(queued_)];
            s_.arrival[at(s_.queue[at(queued_)])] = list_.ready[at(s_.queue[at(queued_)])];
        }
    }

    void run() noexcept {
        constexpr double kNever = std::numeric_limits<double>::infinity();
        while (queued_ > 0 || front_ < back_) {
            const Index pick = queued_ > 0 ? next_of_gpu() : 0;
            const double gpu =
                queued_ > 0 ? startable(pick) + list_.gpu[at(s_.queue[at(pick)])] : kNever;
            const double bus =
                front_ < back_ ? bus_ + list_.transfer[at(s_.by_load[at(front_)])] : kNever;
            const bool own = front_ < back_;
            const Index worker = own ? s_.by_load[at(back_ - 1)] : s_.queue[at(queued_ - 1)];
            const double cpu = cpu_ + (first_ + list_.cpu[at(worker)]);
            if (gpu <= cpu && gpu <= bus) {
                s_.trial[at(s_.queue[at(pick)])] = 1;
                gpu_ = gpu;
                remove(pick);
            } else if (cpu <= bus) {
                s_.trial[at(worker)] = 0;
                cpu_ = cpu;
                first_ = 0.0;
                own ? --back_ : --queued_;
            } else {
                bus_ = bus;
                insert(s_.by_load[at(front_++)]);
            }
        }
    }

   private:
    [[nodiscard]] double startable(Index q) const noexcept {
        return std::max(gpu_, s_.arrival[at(s_.queue[at(q)])]);
    }

    // Of those that can start first the largest, which stands first.
    [[nodiscard]] Index next_of_gpu() const noexcept {
        Index best = 0;
        for (Index q = 1; q < queued_ && startable(best) > gpu_; ++q) {
            best = startable(q) < startable(best) ? q : best;
        }
        return best;
    }

    void remove(Index q) noexcept {
        std::copy(s_.queue.begin() + q + 1, s_.queue.begin() + queued_, s_.queue.begin() + q);
        --queued_;
    }

    // By load, behind its equals.
    void insert(Index place) noexcept {
        s_.arrival[at(place)] = bus_;
        Index q = queued_++;
        for (; q > 0 && list_.load[at(s_.queue[at(q - 1)])] < list_.load[at(place)]; --q) {
            s_.queue[at(q)] = s_.queue[at(q - 1)];
        }
        s_.queue[at(q)] = place;
    }

    Search& s_;
    const List& list_;
    Index queued_ = 0;                                // of s_.queue, by descending load
    Index front_ = list_.available, back_ = list_.n;  // of by_load: neither moved nor computed
    double cpu_ = list_.cpu_free, gpu_ = list_.gpu_free, bus_ = list_.bus_free;
    double first_ = list_.cpu_first;
};

}  // namespace

void assign_list(Search& search) noexcept {
    const List& list = search.list;
    search.sort_by_load();
    double cpu = list.cpu_free;
    double gpu = list.gpu_free;
    double bus = list.bus_free;
    double first = list.cpu_first;
    Index front = 0;
    Index back = list.n;
    while (front < back) {
        const Index head = search.by_load[at(front)];
        const Index tail = search.by_load[at(back - 1)];
        const bool moved = head >= list.available;
        const double bus_then = bus + (moved ? list.transfer[at(head)] : 0.0);
        const double arrival = moved ? bus_then : list.ready[at(head)];
        const double gpu_then = std::max(gpu, arrival) + list.gpu[at(head)];
        const double cpu_then = cpu + (first + list.cpu[at(tail)]);
        if (gpu_then <= cpu_then) {
            search.trial[at(head)] = 1;
            gpu = gpu_then;
            bus = bus_then;
            ++front;
        } else {
            search.trial[at(tail)] = 0;
            cpu = cpu_then;
            first = 0.0;
            --back;
        }
    }
}

void assign_event(Search& search) noexcept { Simulation(search).run(); }

}  // namespace quernstone::moe
