#pragma once

#include <cstdint>
#include <vector>

// Elimination orders of sparse symmetric matrices.
namespace quernstone::pim {

// The graph of a matrix: neighbours of every vertex, both directions stored, a pair once or more
// often, no loops.
struct Neighbours {
    std::vector<std::int64_t> begin;  // [n + 1]
    std::vector<std::int32_t> other;  // [begin[n]]

    [[nodiscard]] std::int32_t size() const noexcept {
        return static_cast<std::int32_t>(begin.size()) - 1;
    }
};

// Nested dissection: new position -> vertex, separators last. Cuts are straight lines where `x` and
// `y` place the vertices (null: unknown) and levels of a breadth-first search where they do not
// help. Throws std::bad_alloc alone.
[[nodiscard]] std::vector<std::int32_t> nested_dissection(const Neighbours& graph, const double* x,
                                                          const double* y);

}  // namespace quernstone::pim
