#include "pim/mapper.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

namespace quernstone::pim {
namespace {

constexpr std::int64_t kMostGroups = 4096;
constexpr std::int64_t kMostSteps = std::int64_t{1} << 22;
constexpr double kMeanShare = 1e-3;  // of the mean beside the last end: it leads off plateaus
constexpr std::int64_t kNowhere = -1;

constexpr std::size_t at(std::int64_t i) noexcept { return static_cast<std::size_t>(i); }

template <class T>
Status check_length(std::span<const T> x, std::size_t n, const char* what) noexcept {
    return same(what, static_cast<std::int64_t>(x.size()), "as many as tasks,",
                static_cast<std::int64_t>(n));
}

Status check(const Mapping& p) noexcept {
    const std::size_t n = p.level.size();
    const auto levels = static_cast<std::int64_t>(p.volts.size());
    if (n < 1 || n > at(kMostTasks)) {
        return invalid("level.shape[0] (tasks)", static_cast<std::int64_t>(n), "1 to", kMostTasks);
    }
    QS_TRY(check_length(p.set, n, "set.shape[0]"));
    QS_TRY(check_length(p.pinned, n, "pinned.shape[0]"));
    QS_TRY(check_length(p.weight, n, "weight.shape[0]"));
    if (p.groups < 1 || p.groups > kMostGroups) {
        return invalid("groups", p.groups, "1 to", kMostGroups);
    }
    if (p.places < 1 || p.places > kMostTasks) {
        return invalid("places", p.places, "1 to", kMostTasks);
    }
    if (static_cast<std::int64_t>(n) > p.groups * p.places) {
        return invalid("level.shape[0] (tasks)", static_cast<std::int64_t>(n),
                       "at most one for each macro,", p.groups * p.places);
    }
    QS_TRY(same("hertz.shape[0]", static_cast<std::int64_t>(p.hertz.size()), "levels,", levels));
    for (const double value : p.volts) {
        if (!std::isfinite(value) || value <= 0.0) {
            return invalid("volts", "a number that is not finite and positive", "volts");
        }
    }
    for (const double value : p.hertz) {
        if (!std::isfinite(value) || value <= 0.0) {
            return invalid("hertz", "a number that is not finite and positive", "hertz");
        }
    }
    for (std::size_t l = 1; l < p.volts.size(); ++l) {
        if (p.volts[l] < p.volts[l - 1] || p.hertz[l] > p.hertz[l - 1]) {
            return invalid("level", static_cast<std::int64_t>(l),
                           "no less volts and no more hertz than the one before");
        }
    }
    for (std::size_t i = 0; i < n; ++i) {
        if (p.level[i] < 0 || p.level[i] >= levels) {
            return invalid("level", p.level[i], "0 or more and below", levels);
        }
        if (p.set[i] < 0 || p.set[i] >= static_cast<std::int64_t>(n)) {
            return invalid("set", p.set[i], "0 or more and below the number of tasks,",
                           static_cast<std::int64_t>(n));
        }
        if (p.pinned[i] < kNowhere || p.pinned[i] >= p.groups) {
            return invalid("pinned", p.pinned[i], "-1, or a group below", p.groups);
        }
        if (!std::isfinite(p.weight[i]) || p.weight[i] < 0.0) {
            return invalid("weight", "a number that is negative or not finite", "0 or more");
        }
        const auto beside = std::count(p.pinned.begin(), p.pinned.end(), p.pinned[i]);
        if (p.pinned[i] != kNowhere && beside > p.places) {
            return invalid("pinned: tasks of one group", beside, "at most as many as its macros,",
                           p.places);
        }
    }
    return {};
}

// What a division costs, of the tasks that are somewhere.
class Cost {
   public:
    explicit Cost(const Mapping& problem)
        : p_(problem),
          top_(at(problem.groups)),
          root_(at(problem.groups)),
          home_(problem.level.size()) {}

    [[nodiscard]] double operator()(std::span<const std::int64_t> group) noexcept {
        std::fill(top_.begin(), top_.end(), 0);
        for (std::size_t i = 0; i < group.size(); ++i) {
            if (group[i] != kNowhere) {
                std::int64_t& top = top_[at(group[i])];
                top = std::max(top, p_.level[i]);
            }
        }
        return p_.objective == Objective::kEnergy ? energy(group) : latency(group);
    }

   private:
    [[nodiscard]] double energy(std::span<const std::int64_t> group) const noexcept {
        double sum = 0.0;
        for (std::size_t i = 0; i < group.size(); ++i) {
            if (group[i] != kNowhere) {
                const double volts = p_.volts[at(top_[at(group[i])])];
                sum += p_.weight[i] * volts * volts;
            }
        }
        return sum;
    }

    // Groups that share an operator run at one clock, and so do those that share one with them.
    [[nodiscard]] double latency(std::span<const std::int64_t> group) noexcept {
        std::iota(root_.begin(), root_.end(), std::int64_t{0});
        std::fill(home_.begin(), home_.end(), kNowhere);
        for (std::size_t i = 0; i < group.size(); ++i) {
            if (group[i] == kNowhere) {
                continue;
            }
            std::int64_t& home = home_[at(p_.set[i])];
            if (home == kNowhere) {
                home = group[i];
            }
            join(home, group[i]);
        }
        double last = 0.0;
        double sum = 0.0;
        for (std::size_t i = 0; i < group.size(); ++i) {
            if (group[i] != kNowhere) {
                const double time = p_.weight[i] / p_.hertz[at(top_[at(root(group[i]))])];
                last = std::max(last, time);
                sum += time;
            }
        }
        return last + kMeanShare * sum / static_cast<double>(group.size());
    }

    [[nodiscard]] std::int64_t root(std::int64_t g) noexcept {
        while (root_[at(g)] != g) {
            g = root_[at(g)] = root_[at(root_[at(g)])];
        }
        return g;
    }

    void join(std::int64_t a, std::int64_t b) noexcept {
        a = root(a);
        b = root(b);
        root_[at(b)] = a;
        top_[at(a)] = std::max(top_[at(a)], top_[at(b)]);
    }

    const Mapping& p_;
    std::vector<std::int64_t> top_;   // [g] the greatest level in it, in its domain at a root
    std::vector<std::int64_t> root_;  // [g]
    std::vector<std::int64_t> home_;  // [s] a group of the set
};

// splitmix64: the same numbers with every standard library.
class Random {
   public:
    explicit Random(std::uint64_t seed) noexcept : state_(seed) {}

    [[nodiscard]] std::uint64_t next() noexcept {
        std::uint64_t z = state_ += 0x9E3779B97F4A7C15U;
        z = (z ^ (z >> 30U)) * 0xBF58476D1CE4E5B9U;
        z = (z ^ (z >> 27U)) * 0x94D049BB133111EBU;
        return z ^ (z >> 31U);
    }
    [[nodiscard]] std::size_t below(std::size_t count) noexcept { return next() % count; }
    [[nodiscard]] double unit() noexcept { return static_cast<double>(next() >> 11U) * 0x1p-53; }

   private:
    std::uint64_t state_;
};

// Pinned tasks in their groups, the others by falling level of their set and of themselves.
void sort_into(const Mapping& p, std::span<std::int64_t> group) {
    std::vector<std::int64_t> room(at(p.groups), p.places);
    std::vector<std::int64_t> set_level(p.level.size(), 0);
    std::vector<std::size_t> order;
    for (std::size_t i = 0; i < group.size(); ++i) {
        group[i] = p.pinned[i];
        if (p.pinned[i] == kNowhere) {
            order.push_back(i);
        } else {
            --room[at(p.pinned[i])];
        }
        std::int64_t& level = set_level[at(p.set[i])];
        level = std::max(level, p.level[i]);
    }
    const bool by_set = p.objective == Objective::kLatency;
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        const auto key = [&](std::size_t i) {
            const std::int64_t set = p.set[i];
            return by_set ? std::tuple{-set_level[at(set)], set, -p.level[i]}
                          : std::tuple{-p.level[i], set, std::int64_t{0}};
        };
        return key(a) < key(b);
    });
    std::size_t g = 0;
    for (const std::size_t i : order) {
        while (room[g] == 0) {
            ++g;
        }
        group[i] = static_cast<std::int64_t>(g);
        --room[g];
    }
}

class Annealer {
   public:
    Annealer(const Mapping& p, std::uint64_t seed, std::span<std::int64_t> best)
        : p_(p), cost_(p), random_(seed), best_(best) {
        sort_into(p, best);
        // Macros without a task take part in exchanges: they are places that nobody asks for.
        now_.assign(best.begin(), best.end());
        std::vector<std::int64_t> room(at(p.groups), p.places);
        for (std::size_t i = 0; i < now_.size(); ++i) {
            --room[at(now_[i])];
            if (p.pinned[i] == kNowhere) {
                movable_.push_back(i);
            }
        }
        for (std::int64_t g = 0; g < p.groups; ++g) {
            free_.insert(free_.end(), at(room[at(g)]), g);
        }
    }

    double run(std::int64_t moves) noexcept {
        double cost = cost_(now_);
        double least = cost;
        if (movable_.empty() || p_.groups == 1) {
            return least;
        }
        const double hot = kHot * cost;
        const double cooling = std::log(kCold / kHot);
        for (std::int64_t move = 0; move < moves; ++move) {
            const double share = static_cast<double>(move) / static_cast<double>(moves);
            const double heat = hot * std::exp(cooling * share);
            const std::size_t i = movable_[random_.below(movable_.size())];
            std::int64_t& other = partner();
            if (other == now_[i]) {
                continue;
            }
            std::swap(now_[i], other);
            const double changed = cost_(now_);
            if (changed <= cost || random_.unit() < std::exp((cost - changed) / heat)) {
                cost = changed;
                if (cost < least) {
                    least = cost;
                    std::copy(now_.begin(), now_.end(), best_.begin());
                }
            } else {
                std::swap(now_[i], other);
            }
        }
        return least;
    }

   private:
    static constexpr double kHot = 0.02;  // of the first cost
    static constexpr double kCold = 1e-6;

    [[nodiscard]] std::int64_t& partner() noexcept {
        const std::size_t k = random_.below(movable_.size() + free_.size());
        return k < movable_.size() ? now_[movable_[k]] : free_[k - movable_.size()];
    }

    const Mapping& p_;
    Cost cost_;
    Random random_;
    std::span<std::int64_t> best_;
    std::vector<std::int64_t> now_;
    std::vector<std::int64_t> free_;  // groups of macros without a task
    std::vector<std::size_t> movable_;
};

// A cost never falls when a task is added, so a part that costs the best or more ends there.
class Solver {
   public:
    Solver(const Mapping& p, std::span<std::int64_t> best)
        : p_(p),
          cost_(p),
          best_(best),
          now_(p.level.size(), kNowhere),
          room_(at(p.groups), p.places),
          distinct_(at(p.groups), false) {
        for (std::size_t i = 0; i < now_.size(); ++i) {
            if (p.pinned[i] == kNowhere) {
                order_.push_back(i);
            } else {
                now_[i] = p.pinned[i];
                --room_[at(p.pinned[i])];
                distinct_[at(p.pinned[i])] = true;
            }
        }
        std::stable_sort(order_.begin(), order_.end(),
                         [&](std::size_t a, std::size_t b) { return p.level[a] > p.level[b]; });
    }

    [[nodiscard]] bool run(double& cost) noexcept {
        sort_into(p_, best_);
        least_ = cost_(best_);
        const bool done = place(0);
        cost = least_;
        return done;
    }

   private:
    [[nodiscard]] bool place(std::size_t k) noexcept {
        if (++steps_ > kMostSteps) {
            return false;
        }
        const double cost = cost_(now_);
        if (cost >= least_) {
            return true;
        }
        if (k == order_.size()) {
            least_ = cost;
            std::copy(now_.begin(), now_.end(), best_.begin());
            return true;
        }
        bool fresh = false;  // one empty group stands for all of them
        for (std::size_t g = 0; g < room_.size(); ++g) {
            const bool empty = room_[g] == p_.places && !distinct_[g];
            if (room_[g] == 0 || (empty && fresh)) {
                continue;
            }
            fresh = fresh || empty;
            now_[order_[k]] = static_cast<std::int64_t>(g);
            --room_[g];
            const bool done = place(k + 1);
            ++room_[g];
            now_[order_[k]] = kNowhere;
            if (!done) {
                return false;
            }
        }
        return true;
    }

    const Mapping& p_;
    Cost cost_;
    std::span<std::int64_t> best_;
    std::vector<std::int64_t> now_;
    std::vector<std::int64_t> room_;
    std::vector<bool> distinct_;
    std::vector<std::size_t> order_;
    double least_ = std::numeric_limits<double>::infinity();
    std::int64_t steps_ = 0;
};

Status check_output(const Mapping& p, std::span<const std::int64_t> group) noexcept {
    QS_TRY(check(p));
    return check_length(group, p.level.size(), "group.shape[0]");
}

Status short_of_memory(const Mapping& p) noexcept {
    return no_memory("tasks", static_cast<std::int64_t>(p.level.size() * sizeof(std::int64_t)));
}

}  // namespace

Status cost(const Mapping& p, std::span<const std::int64_t> group, double& out) noexcept {
    QS_TRY(check_output(p, group));
    try {
        std::vector<std::int64_t> room(at(p.groups), p.places);
        for (std::size_t i = 0; i < group.size(); ++i) {
            if (group[i] < 0 || group[i] >= p.groups) {
                return invalid("group", group[i], "0 or more and below", p.groups);
            }
            if (--room[at(group[i])] < 0) {
                return invalid("group: tasks of one", p.places + 1, "at most", p.places);
            }
            if (p.pinned[i] != kNowhere && p.pinned[i] != group[i]) {
                return invalid("group", group[i], "the one that the task is pinned to,",
                               p.pinned[i]);
            }
        }
        out = Cost(p)(group);
        return {};
    } catch (const std::bad_alloc&) {
        return short_of_memory(p);
    }
}

Status anneal(const Mapping& p, std::int64_t moves, std::uint64_t seed,
              std::span<std::int64_t> group, double& out) noexcept {
    QS_TRY(check_output(p, group));
    if (moves < 0 || moves > std::int64_t{1} << 40) {
        return invalid("moves", moves, "0 to 2^40");
    }
    try {
        out = Annealer(p, seed, group).run(moves);
        return {};
    } catch (const std::bad_alloc&) {
        return short_of_memory(p);
    }
}

Status solve(const Mapping& p, std::span<std::int64_t> group, double& out) noexcept {
    QS_TRY(check_output(p, group));
    try {
        if (!Solver(p, group).run(out)) {
            return invalid("tasks", static_cast<std::int64_t>(p.level.size()),
                           "a problem of at most 2^22 partial divisions; anneal takes any");
        }
        return {};
    } catch (const std::bad_alloc&) {
        return short_of_memory(p);
    }
}

}  // namespace quernstone::pim
