#include <algorithm>
#include <limits>

#include "moe/schedule_search.h"

namespace quernstone::moe {
namespace {

constexpr std::size_t at(Index i) noexcept { return static_cast<std::size_t>(i); }

// The open places of the list relaxed: another machine takes those that are
// dearest for the CPU, the last of them in part.
class Relaxation {
   public:
    Relaxation(const List& list, const Column<double>& other, Index first, Relaxed& memory) noexcept
        : list_(list), other_(other), m_(memory) {
        for (Index p = first; p < list.n; ++p) {
            m_.order[count_++] = p;
            m_.ratio[at(p)] = other[at(p)] > 0.0 ? list.cpu[at(p)] / other[at(p)]
                                                 : std::numeric_limits<double>::infinity();
        }
        std::sort(m_.order.begin(), m_.order.begin() + static_cast<Index>(count_),
                  [&](Index a, Index b) {
                      return m_.ratio[at(a)] != m_.ratio[at(b)] ? m_.ratio[at(a)] > m_.ratio[at(b)]
                                                                : a < b;
                  });
    }

    // Places before `next` are no longer open.
    void open(Index next) noexcept {
        std::size_t kept = 0;
        double cpu = 0.0;
        double other = 0.0;
        for (std::size_t k = 0; k < count_; ++k) {
            const Index p = m_.order[k];
            if (p >= next) {
                m_.order[kept] = p;
                m_.cpu[kept] = cpu += list_.cpu[at(p)];
                m_.other[kept] = other += other_[at(p)];
                ++kept;
            }
        }
        count_ = kept;
    }

    // Least T by which both can be done: the CPU from `cpu` on, the other from `other` on.
    [[nodiscard]] double least(double cpu, double other) const noexcept {
        cpu += count_ > 0 ? m_.cpu[count_ - 1] : 0.0;
        std::size_t low = 0;
        std::size_t high = count_;
        while (low < high) {  // the first expert with which the other is no earlier than the CPU
            const std::size_t mid = (low + high) / 2;
            if (other + m_.other[mid] < cpu - m_.cpu[mid]) {
                low = mid + 1;
            } else {
                high = mid;
            }
        }
        if (low > 0) {
            cpu -= m_.cpu[low - 1];
            other += m_.other[low - 1];
        }
        if (low == count_ || cpu <= other) {
            return std::max(cpu, other);
        }
        const auto p = at(m_.order[low]);
        const double both = list_.cpu[p] + other_[p];
        return both > 0.0 ? cpu - (cpu - other) * (list_.cpu[p] / both) : cpu;
    }

   private:
    const List& list_;
    const Column<double>& other_;
    Relaxed& m_;
    std::size_t count_ = 0;
};

// Least CPU time among the labels seen so far whose GPU time has at most a rank.
class Front {
   public:
    Front(std::span<double> tree) noexcept : tree_(tree) {
        std::fill(tree_.begin(), tree_.end(), std::numeric_limits<double>::infinity());
    }

    [[nodiscard]] double least(std::size_t rank) const noexcept {
        double least = std::numeric_limits<double>::infinity();
        for (std::size_t i = rank + 1; i > 0; i &= i - 1) {
            least = std::min(least, tree_[i - 1]);
        }
        return least;
    }

    void add(std::size_t rank, double cpu) noexcept {
        for (std::size_t i = rank + 1; i <= tree_.size(); i += i & (~i + 1)) {
            tree_[i - 1] = std::min(tree_[i - 1], cpu);
        }
    }

   private:
    std::span<double> tree_;
};

bool earlier(const Label& a, const Label& b) noexcept {
    return a.bus != b.bus ? a.bus < b.bus : a.gpu != b.gpu ? a.gpu < b.gpu : a.cpu < b.cpu;
}

// Drops each label that another one is not behind of on any timeline.
std::size_t keep_undominated(std::span<Label> labels, const LabelMemory& memory) noexcept {
    const std::span<std::uint32_t> rank = memory.rank.first(labels.size());
    const std::span<std::uint32_t> order = memory.order.first(labels.size());
    for (std::uint32_t i = 0; i < labels.size(); ++i) {
        order[i] = i;
    }
    // Of equal times the label that is seen first is ahead.
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
        return labels[a].gpu != labels[b].gpu ? labels[a].gpu < labels[b].gpu : a < b;
    });
    for (std::uint32_t i = 0; i < labels.size(); ++i) {
        rank[order[i]] = i;
    }
    Front front(memory.tree.first(labels.size()));
    std::size_t kept = 0;
    for (std::size_t i = 0; i < labels.size(); ++i) {
        if (front.least(rank[i]) > labels[i].cpu) {
            front.add(rank[i], labels[i].cpu);
            labels[kept++] = labels[i];
        }
    }
    return kept;
}

// The `width` labels of least bound, in their order.
std::size_t trim(std::span<Label> labels, const LabelMemory& memory) noexcept {
    const std::span<double> bounds = memory.tree.first(labels.size());
    for (std::size_t i = 0; i < labels.size(); ++i) {
        bounds[i] = labels[i].bound;
    }
    const auto last = bounds.begin() + static_cast<std::ptrdiff_t>(memory.width - 1);
    std::nth_element(bounds.begin(), last, bounds.end());
    const double limit = *last;
    std::size_t below = 0;
    for (const Label& label : labels) {
        below += label.bound < limit ? 1 : 0;
    }
    std::size_t equal = memory.width - below;
    std::size_t kept = 0;
    for (const Label& label : labels) {
        if (label.bound < limit || (label.bound == limit && equal > 0)) {
            equal -= label.bound == limit ? 1 : 0;
            labels[kept++] = label;
        }
    }
    return kept;
}

}  // namespace

bool search_labels(Search& s, const LabelMemory& memory) noexcept {
    const List& list = s.list;
    Relaxation gpu_open(list, list.gpu, 0, s.relaxed[0]);
    Relaxation bus_open(list, list.transfer, list.available, s.relaxed[1]);
    const std::span<Label> now = memory.now;
    now[0] = {list.cpu_free + list.cpu_first, list.gpu_free, list.bus_free, 0.0, 0};
    std::size_t size = 1;
    std::size_t used = 0;
    bool all = true;
    const double enough = s.ends.makespan * (1.0 - kRounding);
    for (Index p = 0; p < list.n && size > 0; ++p) {
        gpu_open.open(p + 1);
        bus_open.open(p + 1);
        const auto hopeful = [&](Label& label) noexcept {
            label.bound = std::max(gpu_open.least(label.cpu, label.gpu),
                                   bus_open.least(label.cpu, label.bus));
            return label.bound < enough;
        };
        // Two runs, each in the order of the labels that they come from.
        Label* const left = memory.runs.data();
        Label* left_end = left;
        for (std::uint32_t i = 0; i < size; ++i) {
            Label label{now[i].cpu + list.cpu[at(p)], now[i].gpu, now[i].bus, 0.0, i << 1};
            if (hopeful(label)) {
                *left_end++ = label;
            }
        }
        Label* const right = left_end;
        Label* right_end = right;
        const bool moved = p >= list.available;
        for (std::uint32_t i = 0; i < size; ++i) {
            const double bus = now[i].bus + (moved ? list.transfer[at(p)] : 0.0);
            const double arrival = moved ? bus : list.ready[at(p)];
            Label label{now[i].cpu, std::max(now[i].gpu, arrival) + list.gpu[at(p)], bus, 0.0,
                        (i << 1) | 1};
            if (!hopeful(label)) {
                continue;
            }
            // Those that had to wait for the same arrival are behind one another.
            if (right_end != right && !earlier(right_end[-1], label)) {
                --right_end;
            }
            *right_end++ = label;
        }
        Label* const end = std::merge(left, left_end, right, right_end, memory.now.data(), earlier);
        size = keep_undominated(now.first(static_cast<std::size_t>(end - now.data())), memory);
        if (size > memory.width) {
            all = false;
            if (!memory.trims) {
                return false;
            }
            size = trim(now.first(size), memory);
        }
        if (used + size > memory.steps.size()) {
            return false;
        }
        s.first_step[at(p)] = used;
        for (std::size_t i = 0; i < size; ++i) {
            memory.steps[used++] = now[i].step;
        }
    }
    const auto done = [](const Label& label) { return std::max(label.cpu, label.gpu); };
    std::size_t best = 0;
    for (std::size_t i = 1; i < size; ++i) {
        best = done(now[i]) < done(now[best]) ? i : best;
    }
    if (size > 0 && list.n > 0) {
        for (Index p = list.n; p-- > 0;) {
            const std::uint32_t step = memory.steps[s.first_step[at(p)] + best];
            s.trial[at(p)] = step & 1;
            best = step >> 1;
        }
        s.offer();
    }
    return all;
}

}  // namespace quernstone::moe
