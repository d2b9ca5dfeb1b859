#include "pim/cholesky.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "pim/cholesky_kernel.h"

namespace quernstone::pim {
namespace {

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

const CholeskyKernels& kernels() {
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kBaseline:
            break;
        case Isa::kAvx2:
            return kCholeskyAvx2;
        default:
            return kCholeskyAvx512;
    }
#endif
    return kCholeskyScalar;
}

// Whether a supernode is worth joining to the last of its children: fewer and larger panels for
// some zeros in them.
bool join(std::int64_t columns, std::int64_t zeros, std::int64_t entries) {
    const double share = static_cast<double>(zeros) / static_cast<double>(entries);
    return share < (columns <= 8 ? 0.5 : columns <= 16 ? 0.25 : columns <= 48 ? 0.1 : 0.05);
}

std::int64_t panel_entries(std::int64_t columns, std::int64_t rows) {
    return columns * (columns + 1) / 2 + columns * rows;
}

Status check(const Network& network) {
    const std::int64_t n = network.ground.extent[0], m = network.a.extent[0];
    if (n > std::numeric_limits<std::int32_t>::max() / 2) {
        return invalid("ground.shape[0]", n, "at most 2^30");
    }
    QS_TRY(same("b.shape[0]", network.b.extent[0], "a.shape[0],", m));
    QS_TRY(same("conductance.shape[0]", network.conductance.extent[0], "a.shape[0],", m));
    if (network.x.present() || network.y.present()) {
        QS_TRY(same("x.shape[0]", network.x.extent[0], "ground.shape[0],", n));
        QS_TRY(same("y.shape[0]", network.y.extent[0], "ground.shape[0],", n));
    }
    for (std::int64_t e = 0; e < m; ++e) {
        const std::int32_t a = *network.a.at(e), b = *network.b.at(e);
        if (a < 0 || a >= n) {
            return invalid("a", a, "the index of a node");
        }
        if (b < 0 || b >= n || b == a) {
            return invalid("b", b, "the index of a node that is not a's");
        }
        const double g = *network.conductance.at(e);
        if (!(g > 0.0 && g <= std::numeric_limits<double>::max())) {
            return invalid("conductance: of branch", e, "a positive number");
        }
    }
    for (std::int64_t i = 0; i < n; ++i) {
        const double g = *network.ground.at(i);
        if (!(g >= 0.0 && g <= std::numeric_limits<double>::max())) {
            return invalid("ground: of node", i, "a number of 0 or more");
        }
        if (network.x.present() &&
            !(std::isfinite(*network.x.at(i)) && std::isfinite(*network.y.at(i)))) {
            return invalid("x, y: of node", i, "finite numbers");
        }
    }
    return {};
}

}  // namespace

struct Cholesky::Pattern {
    Neighbours graph;
    std::vector<double> value;     // of an entry of graph.other: a conductance
    std::vector<double> diagonal;  // [n]
    std::vector<double> x, y;      // [n], or empty

    explicit Pattern(const Network& network) {
        const std::int64_t n = network.ground.extent[0], m = network.a.extent[0];
        graph.begin.assign(at(n + 1), 0);
        graph.other.resize(at(2 * m));
        value.resize(at(2 * m));
        diagonal.resize(at(n));
        for (std::int64_t i = 0; i < n; ++i) {
            diagonal[at(i)] = *network.ground.at(i);
        }
        for (std::int64_t e = 0; e < m; ++e) {
            ++graph.begin[at(*network.a.at(e)) + 1];
            ++graph.begin[at(*network.b.at(e)) + 1];
        }
        std::partial_sum(graph.begin.begin(), graph.begin.end(), graph.begin.begin());
        std::vector<std::int64_t> next(graph.begin.begin(), graph.begin.end() - 1);
        for (std::int64_t e = 0; e < m; ++e) {
            const std::int32_t ends[] = {*network.a.at(e), *network.b.at(e)};
            const double g = *network.conductance.at(e);
            for (int side = 0; side < 2; ++side) {
                const std::int64_t place = next[at(ends[side])]++;
                graph.other[at(place)] = ends[1 - side];
                value[at(place)] = g;
                diagonal[at(ends[side])] += g;
            }
        }
        if (network.x.present()) {
            for (std::int64_t i = 0; i < n; ++i) {
                x.push_back(*network.x.at(i));
                y.push_back(*network.y.at(i));
            }
        }
    }
};

Status Cholesky::make(const Network& network, Cholesky& out) noexcept {
    QS_TRY(check(network));
    try {
        const Pattern pattern(network);
        Cholesky made;
        made.analyse(pattern);
        const std::int32_t failed = made.factor(pattern);
        if (failed >= 0) {
            return invalid("singular: the pivot of node", failed, "a positive one");
        }
        out = std::move(made);
    } catch (const std::bad_alloc&) {
        return no_memory("factor of nodes", network.ground.extent[0]);
    }
    return {};
}

namespace {

// The parent of every column in the elimination tree; a root has -1.
std::vector<std::int32_t> elimination_tree(const Neighbours& graph,
                                           const std::vector<std::int32_t>& order,
                                           const std::vector<std::int32_t>& position) {
    std::vector<std::int32_t> parent(order.size(), -1), ancestor(order.size(), -1);
    for (std::size_t i = 0; i < order.size(); ++i) {
        const auto column = static_cast<std::int32_t>(i);
        const auto v = at(order[i]);
        for (std::int64_t e = graph.begin[v]; e < graph.begin[v + 1]; ++e) {
            std::int32_t k = position[at(graph.other[at(e)])];
            while (k >= 0 && k < column) {
                const std::int32_t up = ancestor[at(k)];
                ancestor[at(k)] = column;
                if (up < 0) {
                    parent[at(k)] = column;
                }
                k = up;
            }
        }
    }
    return parent;
}

// Children before parents and every subtree in one piece: place -> column.
std::vector<std::int32_t> postorder(const std::vector<std::int32_t>& parent) {
    const std::size_t n = parent.size();
    std::vector<std::int32_t> child(n, -1), sibling(n, -1), out, stack;
    for (std::size_t i = n; i-- > 0;) {
        if (parent[i] >= 0) {
            sibling[i] = child[at(parent[i])];
            child[at(parent[i])] = static_cast<std::int32_t>(i);
        }
    }
    out.reserve(n);
    for (std::size_t root = 0; root < n; ++root) {
        if (parent[root] >= 0) {
            continue;
        }
        stack.push_back(static_cast<std::int32_t>(root));
        while (!stack.empty()) {
            const auto top = at(stack.back());
            if (child[top] >= 0) {
                stack.push_back(child[top]);
                child[top] = sibling[at(child[top])];
            } else {
                out.push_back(static_cast<std::int32_t>(top));
                stack.pop_back();
            }
        }
    }
    return out;
}

std::vector<std::int32_t> inverse(const std::vector<std::int32_t>& order) {
    std::vector<std::int32_t> position(order.size());
    for (std::size_t i = 0; i < order.size(); ++i) {
        position[at(order[i])] = static_cast<std::int32_t>(i);
    }
    return position;
}

// Entries below the diagonal of every column of L.
std::vector<std::int32_t> column_counts(const Neighbours& graph,
                                        const std::vector<std::int32_t>& order,
                                        const std::vector<std::int32_t>& position,
                                        const std::vector<std::int32_t>& parent) {
    std::vector<std::int32_t> count(order.size(), 0), seen(order.size(), -1);
    for (std::size_t i = 0; i < order.size(); ++i) {
        const auto row = static_cast<std::int32_t>(i);
        seen[i] = row;
        const auto v = at(order[i]);
        for (std::int64_t e = graph.begin[v]; e < graph.begin[v + 1]; ++e) {
            std::int32_t k = position[at(graph.other[at(e)])];
            while (k < row && seen[at(k)] != row) {
                seen[at(k)] = row;
                ++count[at(k)];
                k = parent[at(k)];
            }
        }
    }
    return count;
}

}  // namespace

void Cholesky::analyse(const Pattern& pattern) {
    const Neighbours& graph = pattern.graph;
    const bool placed = !pattern.x.empty();
    order_ = nested_dissection(graph, placed ? pattern.x.data() : nullptr,
                               placed ? pattern.y.data() : nullptr);
    std::vector<std::int32_t> position = inverse(order_);
    std::vector<std::int32_t> parent = elimination_tree(graph, order_, position);
    const std::vector<std::int32_t> post = postorder(parent);
    const std::vector<std::int32_t> moved = inverse(post);
    std::vector<std::int32_t> order(order_.size()), up(order_.size());
    for (std::size_t i = 0; i < post.size(); ++i) {
        const auto from = at(post[i]);
        order[i] = order_[from];
        up[i] = parent[from] < 0 ? -1 : moved[at(parent[from])];
    }
    order_ = std::move(order);
    parent = std::move(up);
    position = inverse(order_);
    const std::vector<std::int32_t> count = column_counts(graph, order_, position, parent);
    nonzeros_ = static_cast<std::int64_t>(count.size());
    for (const std::int32_t c : count) {
        nonzeros_ += c;
        operations_ += (c + 1.0) * (c + 1.0);
    }

    const auto n = static_cast<std::int64_t>(order_.size());
    first_.clear();
    std::vector<std::int64_t> zeros;
    for (std::int64_t begin = 0, end = 0; begin < n; begin = end) {
        for (end = begin + 1;
             end < n && parent[at(end - 1)] == end && count[at(end - 1)] == count[at(end)] + 1;) {
            ++end;
        }
        const std::int64_t rows = count[at(end - 1)];
        std::int64_t own = begin, padding = 0;
        while (!first_.empty()) {
            // The last supernode before this one, a child if its tree goes up into it.
            const std::int32_t top = parent[at(own - 1)];
            if (top < own || top >= end) {
                break;
            }
            const std::int64_t from = first_.back();
            const std::int64_t entries = panel_entries(end - from, rows);
            const std::int64_t sum = padding + zeros.back() + entries -
                                     panel_entries(end - own, rows) -
                                     panel_entries(own - from, count[at(own - 1)]);
            if (!join(end - from, sum, entries)) {
                break;
            }
            own = from;
            padding = sum;
            first_.pop_back();
            zeros.pop_back();
        }
        first_.push_back(static_cast<std::int32_t>(own));
        zeros.push_back(padding);
    }
    const std::size_t supernodes = first_.size();
    first_.push_back(static_cast<std::int32_t>(n));

    std::vector<std::int32_t> owner(at(n)), seen(at(n), -1), child(supernodes, -1),
        sibling(supernodes, -1);
    for (std::size_t s = 0; s < supernodes; ++s) {
        std::fill(owner.begin() + first_[s], owner.begin() + first_[s + 1],
                  static_cast<std::int32_t>(s));
    }
    parent_.assign(supernodes, -1);
    rows_.clear();
    rows_begin_.assign(1, 0);
    panel_begin_.assign(1, 0);
    for (std::size_t s = 0; s < supernodes; ++s) {
        const auto label = static_cast<std::int32_t>(s);
        const auto begin = static_cast<std::ptrdiff_t>(rows_.size());
        const auto take = [&](std::int32_t row) {
            if (row >= first_[s + 1] && seen[at(row)] != label) {
                seen[at(row)] = label;
                rows_.push_back(row);
            }
        };
        for (std::int32_t j = first_[s]; j < first_[s + 1]; ++j) {
            const auto v = at(order_[at(j)]);
            for (std::int64_t e = graph.begin[v]; e < graph.begin[v + 1]; ++e) {
                take(position[at(graph.other[at(e)])]);
            }
        }
        for (std::int32_t c = child[s]; c >= 0; c = sibling[at(c)]) {
            for (std::int64_t r = rows_begin_[at(c)]; r < rows_begin_[at(c) + 1]; ++r) {
                take(rows_[at(r)]);
            }
        }
        std::sort(rows_.begin() + begin, rows_.end());
        const auto rows = static_cast<std::int64_t>(rows_.size()) - begin;
        if (rows > 0) {
            const auto up_to = at(owner[at(rows_[at(begin)])]);
            parent_[s] = static_cast<std::int32_t>(up_to);
            sibling[s] = child[up_to];
            child[up_to] = label;
        }
        const std::int64_t columns = first_[s + 1] - first_[s];
        rows_begin_.push_back(static_cast<std::int64_t>(rows_.size()));
        panel_begin_.push_back(panel_begin_.back() + columns * (columns + rows));
    }
}

// Multifrontal: a supernode takes what its children leave, and leaves the rest to its parent.
// Returns the node of a pivot that is not positive or nothing but rounding, or -1.
std::int32_t Cholesky::factor(const Pattern& pattern) {
    const std::size_t supernodes = parent_.size();
    const std::vector<std::int32_t> position = inverse(order_);
    const CholeskyKernels& level = kernels();
    panels_.resize(at(panel_begin_.back()));
    std::vector<std::vector<double>> left(supernodes);
    std::vector<std::int32_t> child(supernodes, -1), sibling(supernodes, -1);
    std::vector<std::int32_t> local(order_.size());
    std::vector<double> front;
    for (std::size_t s = 0; s < supernodes; ++s) {
        const std::int64_t columns = first_[s + 1] - first_[s];
        const std::int64_t rows = rows_begin_[s + 1] - rows_begin_[s];
        const std::int64_t size = columns + rows;
        const std::int64_t stride = (size + kPad - 1) / kPad * kPad;
        const std::int32_t* below = rows_.data() + rows_begin_[s];
        front.assign(at(stride * size), 0.0);
        for (std::int64_t r = 0; r < rows; ++r) {
            local[at(below[r])] = static_cast<std::int32_t>(columns + r);
        }
        for (std::int64_t j = 0; j < columns; ++j) {
            local[at(first_[s] + j)] = static_cast<std::int32_t>(j);
            const auto v = at(order_[at(first_[s] + j)]);
            double* column = front.data() + j * stride;
            column[j] = pattern.diagonal[v];
            for (std::int64_t e = pattern.graph.begin[v]; e < pattern.graph.begin[v + 1]; ++e) {
                const std::int32_t row = position[at(pattern.graph.other[at(e)])];
                if (row > first_[s] + j) {
                    const std::int64_t i = row < first_[s + 1] ? row - first_[s] : local[at(row)];
                    column[i] -= pattern.value[at(e)];
                }
            }
        }
        for (std::int32_t c = child[s]; c >= 0; c = sibling[at(c)]) {
            const std::int32_t* from = rows_.data() + rows_begin_[at(c)];
            const std::int64_t count = rows_begin_[at(c) + 1] - rows_begin_[at(c)];
            const double* value = left[at(c)].data();
            for (std::int64_t j = 0; j < count; ++j) {
                double* column = front.data() + local[at(from[j])] * stride;
                for (std::int64_t i = j; i < count; ++i) {
                    column[local[at(from[i])]] += value[j * count + i];
                }
            }
            left[at(c)] = {};
        }
        const std::int64_t failed = level.eliminate(front.data(), stride, size, columns);
        if (failed >= 0) {
            return order_[at(first_[s] + failed)];
        }
        // What is left of a diagonal below a few of its roundings is not the network's.
        constexpr double kRounding = 64.0 * std::numeric_limits<double>::epsilon();
        for (std::int64_t j = 0; j < columns; ++j) {
            const double inverse = front[at(j * stride + j)];
            const std::int32_t node = order_[at(first_[s] + j)];
            if (!(pattern.diagonal[at(node)] * inverse * inverse * kRounding < 1.0)) {
                return node;
            }
        }
        double* panel = panels_.data() + panel_begin_[s];
        for (std::int64_t j = 0; j < columns; ++j) {
            std::copy_n(front.data() + j * stride, size, panel + j * size);
        }
        if (parent_[s] >= 0) {
            left[s].resize(at(rows * rows));
            for (std::int64_t j = 0; j < rows; ++j) {
                std::copy_n(front.data() + (columns + j) * stride + columns + j, rows - j,
                            left[s].data() + j * rows + j);
            }
            sibling[s] = child[at(parent_[s])];
            child[at(parent_[s])] = static_cast<std::int32_t>(s);
        }
    }
    return -1;
}

Status Cholesky::solve(View<const double, 2> in, View<double, 2> out, int threads) const noexcept {
    const std::int64_t n = size(), count = in.extent[0];
    QS_TRY(same("currents.shape[1]", in.extent[1], "one for each of the nodes,", n));
    QS_TRY(same("out.shape[0]", out.extent[0], "currents.shape[0],", count));
    QS_TRY(same("out.shape[1]", out.extent[1], "currents.shape[1],", n));
    const Panels factor{static_cast<std::int64_t>(parent_.size()),
                        first_.data(),
                        rows_begin_.data(),
                        rows_.data(),
                        panel_begin_.data(),
                        panels_.data()};
    const CholeskyKernels& level = kernels();
    // A few at a time cost less one by one than together with zeros.
    constexpr std::int64_t kFew = 4;
    const std::int64_t whole = (count + kTogether - 1 - kFew) / kTogether;
    const std::int64_t single = std::max<std::int64_t>(count - whole * kTogether, 0);
    std::atomic<bool> short_of_memory{false};
    parallel_for(whole + single, threads, [&](std::int64_t task) noexcept {
        const bool together = task < whole;
        const std::int64_t width = together ? kTogether : 1;
        const std::int64_t begin = together ? task * kTogether : whole * kTogether + task - whole;
        const std::int64_t some = std::min(width, count - begin);
        Scratch& scratch = Scratch::of_this_thread();
        auto* x = reinterpret_cast<double*>(
            scratch.reserve(at(n * (width + (together ? 0 : 1)) + 1) * sizeof(double)));
        if (x == nullptr) {
            short_of_memory = true;
            return;
        }
        for (std::int64_t p = 0; p < n; ++p) {
            for (std::int64_t k = 0; k < width; ++k) {
                x[p * width + k] = k < some ? *in.at(begin + k, order_[at(p)]) : 0.0;
            }
        }
        if (together) {
            level.solve_together(factor, x);
        } else {
            level.solve_one(factor, x, x + n);
        }
        for (std::int64_t p = 0; p < n; ++p) {
            for (std::int64_t k = 0; k < some; ++k) {
                *out.at(begin + k, order_[at(p)]) = x[p * width + k];
            }
        }
        scratch.release_large();
    });
    if (short_of_memory) {
        return no_memory("currents", n * kTogether * static_cast<std::int64_t>(sizeof(double)));
    }
    return {};
}

Status reach(View<const std::int32_t, 1> a, View<const std::int32_t, 1> b,
             View<std::uint8_t, 1> reached) noexcept {
    const std::int64_t n = reached.extent[0], m = a.extent[0];
    QS_TRY(same("b.shape[0]", b.extent[0], "a.shape[0],", m));
    try {
        std::vector<std::int32_t> root(at(n + 1));
        std::iota(root.begin(), root.end(), 0);
        const auto find = [&](std::int64_t i) {
            while (root[at(i)] != i) {
                i = root[at(i)] = root[at(root[at(i)])];
            }
            return i;
        };
        const auto unite = [&](std::int64_t i, std::int64_t j) {
            root[at(find(i))] = static_cast<std::int32_t>(find(j));
        };
        for (std::int64_t e = 0; e < m; ++e) {
            if (*a.at(e) < 0 || *a.at(e) >= n || *b.at(e) < 0 || *b.at(e) >= n) {
                return invalid("a, b: of branch", e, "indices of nodes");
            }
            unite(*a.at(e), *b.at(e));
        }
        for (std::int64_t i = 0; i < n; ++i) {
            if (*reached.at(i) != 0) {
                unite(i, n);
            }
        }
        for (std::int64_t i = 0; i < n; ++i) {
            *reached.at(i) = find(i) == find(n) ? 1 : 0;
        }
    } catch (const std::bad_alloc&) {
        return no_memory("reached", n);
    }
    return {};
}

}  // namespace quernstone::pim
