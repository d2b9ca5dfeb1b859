#include "pim/ordering.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <span>

namespace quernstone::pim {
namespace {

using Vertices = std::span<std::int32_t>;

// Parts of a set of vertices, in the order of elimination.
enum Part : std::uint8_t { kLeft, kRight, kSeparator };

constexpr std::size_t kLeaf = 32;  // ordered by minimum degree; at most the bits of a mask
// A part may hold this share of the vertices at least.
constexpr std::size_t kBalance = 5;

class Dissection {
   public:
    Dissection(const Neighbours& graph, const double* x, const double* y)
        : graph_(graph),
          axes_{x, y},
          size_(static_cast<std::size_t>(graph.size())),
          set_of_(size_, 0),
          part_(size_),
          best_(size_),
          local_(size_),
          queue_(size_),
          values_(size_) {}

    std::vector<std::int32_t> order() {
        std::vector<std::int32_t> out(size_);
        for (std::size_t i = 0; i < size_; ++i) {
            out[i] = static_cast<std::int32_t>(i);
        }
        // A stack of its own: a path of vertices could be as deep as it is long.
        std::vector<Vertices> sets{out};
        while (!sets.empty()) {
            const Vertices set = sets.back();
            sets.pop_back();
            if (set.size() <= kLeaf) {
                by_degree(set);
                continue;
            }
            mark(set);
            if (!cut(set)) {
                continue;
            }
            const std::size_t left = gather(set, kLeft);
            const std::size_t right = gather(set.subspan(left), kRight);
            sets.push_back(set.first(left));
            sets.push_back(set.subspan(left, right));
        }
        return out;
    }

   private:
    // Gives a set its number, by which its vertices are told from others.
    void mark(Vertices set) {
        ++set_number_;
        for (const std::int32_t v : set) {
            set_of_[at(v)] = set_number_;
        }
    }

    // Sorts a set into left, right and separator, best_; false where no cut is balanced.
    bool cut(Vertices set) {
        const double side = std::sqrt(static_cast<double>(set.size()));
        std::size_t smallest = set.size();
        const auto consider = [&](bool balanced) {
            const std::size_t separator = balanced ? separate(set) : set.size();
            if (separator < set.size() && separator <= smallest) {
                smallest = separator;
                for (const std::int32_t v : set) {
                    best_[at(v)] = part_[at(v)];
                }
            }
        };
        const auto more_than = [&](double share) {
            return static_cast<double>(smallest) > share * side;
        };
        const bool placed = axes_[0] != nullptr && axes_[1] != nullptr;
        std::size_t longer = 0;
        if (placed) {
            longer = extent(set, axes_[1]) > extent(set, axes_[0]) ? 1 : 0;
            consider(halve(set, axes_[longer]));
        }
        // Rails that few vias join are cut best between them; in a mesh, levels are diagonals, which
        // are as long as straight cuts of a square and leave less fill.
        if (more_than(0.8)) {
            consider(halve_by_levels(set));
        }
        if (placed && more_than(1.2)) {
            consider(halve(set, axes_[1 - longer]));
        }
        return smallest < set.size();
    }

    static double extent(Vertices set, const double* axis) {
        const auto [low, high] = std::minmax_element(
            set.begin(), set.end(), [&](auto a, auto b) { return axis[at(a)] < axis[at(b)]; });
        return axis[at(*high)] - axis[at(*low)];
    }

    // Left and right of the median.
    bool halve(Vertices set, const double* axis) {
        for (std::size_t i = 0; i < set.size(); ++i) {
            values_[i] = axis[at(set[i])];
        }
        const auto middle = values_.begin() + static_cast<std::ptrdiff_t>(set.size() / 2);
        std::nth_element(values_.begin(), middle,
                         values_.begin() + static_cast<std::ptrdiff_t>(set.size()));
        const double median = *middle;
        std::size_t left = 0;
        for (const std::int32_t v : set) {
            const bool is_left = axis[at(v)] < median;
            part_[at(v)] = is_left ? kLeft : kRight;
            left += is_left ? 1 : 0;
        }
        return std::min(left, set.size() - left) * kBalance >= set.size();
    }

    // Near and far from an end of the set.
    bool halve_by_levels(Vertices set) {
        std::size_t reached = search(set[0], set);
        if (reached == set.size()) {
            reached = search(queue_[reached - 1], set);
        }
        std::size_t left = reached;
        if (reached == set.size()) {
            // The level that holds the middle is where the left part ends.
            const std::int32_t level = local_[at(queue_[reached / 2])];
            left = 0;
            while (left < reached && local_[at(queue_[left])] < level) {
                ++left;
            }
        }
        for (std::size_t i = 0; i < left; ++i) {
            part_[at(queue_[i])] = kLeft;
        }
        return left > 0 && left < set.size();
    }

    // Breadth first; queue_ holds the vertices as they are reached and local_ their levels. What is
    // not reached is kRight.
    std::size_t search(std::int32_t start, Vertices set) {
        for (const std::int32_t v : set) {
            local_[at(v)] = -1;
            part_[at(v)] = kRight;
        }
        std::size_t count = 0;
        queue_[count++] = start;
        local_[at(start)] = 0;
        for (std::size_t i = 0; i < count; ++i) {
            const std::int32_t v = queue_[i];
            each(v, [&](std::int32_t w) {
                if (local_[at(w)] < 0) {
                    local_[at(w)] = local_[at(v)] + 1;
                    queue_[count++] = w;
                }
            });
        }
        return count;
    }

    // Takes the vertices of one side that touch the other out of it: the side that has fewer.
    std::size_t separate(Vertices set) {
        std::array<std::size_t, 2> touching{};
        for (const std::int32_t v : set) {
            local_[at(v)] = 0;
            each(v, [&](std::int32_t w) { local_[at(v)] |= part_[at(w)] != part_[at(v)]; });
            touching[part_[at(v)]] += static_cast<std::size_t>(local_[at(v)]);
        }
        const Part from = touching[kLeft] <= touching[kRight] ? kLeft : kRight;
        for (const std::int32_t v : set) {
            if (part_[at(v)] == from && local_[at(v)] != 0) {
                part_[at(v)] = kSeparator;
            }
        }
        return touching[from];
    }

    // Moves the vertices of a part to the front.
    std::size_t gather(Vertices set, Part part) {
        const auto end = std::partition(set.begin(), set.end(),
                                        [&](std::int32_t v) { return best_[at(v)] == part; });
        return static_cast<std::size_t>(end - set.begin());
    }

    // Minimum degree. A neighbour outside counts one and stays: all of them come later.
    void by_degree(Vertices set) {
        mark(set);
        std::array<std::uint64_t, kLeaf> inside{};
        std::array<int, kLeaf> outside{};
        for (std::size_t i = 0; i < set.size(); ++i) {
            local_[at(set[i])] = static_cast<std::int32_t>(i);
        }
        for (std::size_t i = 0; i < set.size(); ++i) {
            const auto v = at(set[i]);
            for (std::int64_t e = graph_.begin[v]; e < graph_.begin[v + 1]; ++e) {
                const auto w = at(graph_.other[static_cast<std::size_t>(e)]);
                if (set_of_[w] == set_number_) {
                    inside[i] |= std::uint64_t{1} << local_[w];
                } else {
                    ++outside[i];
                }
            }
        }
        std::array<std::int32_t, kLeaf> order{};
        std::uint64_t left = (std::uint64_t{1} << set.size()) - 1;
        for (std::size_t next = 0; next < set.size(); ++next) {
            std::size_t pick = 0;
            int least = 1 << 30;
            for (std::uint64_t rest = left; rest != 0; rest &= rest - 1) {
                const auto i = static_cast<std::size_t>(std::countr_zero(rest));
                const int degree = std::popcount(inside[i] & left) + outside[i];
                if (degree < least) {
                    least = degree;
                    pick = i;
                }
            }
            order[next] = set[pick];
            left &= ~(std::uint64_t{1} << pick);
            const std::uint64_t clique = inside[pick] & left;
            for (std::uint64_t rest = clique; rest != 0; rest &= rest - 1) {
                const auto i = static_cast<std::size_t>(std::countr_zero(rest));
                inside[i] |= clique & ~(std::uint64_t{1} << i);
                outside[i] = std::max(outside[i], outside[pick]);
            }
        }
        std::copy_n(order.begin(), set.size(), set.begin());
    }

    template <class Visit>
    void each(std::int32_t v, Visit visit) const {
        for (std::int64_t e = graph_.begin[at(v)]; e < graph_.begin[at(v) + 1]; ++e) {
            const std::int32_t w = graph_.other[static_cast<std::size_t>(e)];
            if (set_of_[at(w)] == set_number_) {
                visit(w);
            }
        }
    }

    static std::size_t at(std::int32_t v) { return static_cast<std::size_t>(v); }

    const Neighbours& graph_;
    std::array<const double*, 2> axes_;
    std::size_t size_;
    std::vector<std::int32_t> set_of_;
    std::vector<Part> part_, best_;
    std::vector<std::int32_t> local_, queue_;
    std::vector<double> values_;
    std::int32_t set_number_ = 0;
};

}  // namespace

std::vector<std::int32_t> nested_dissection(const Neighbours& graph, const double* x,
                                            const double* y) {
    return Dissection(graph, x, y).order();
}

}  // namespace quernstone::pim
