#pragma once

#include <cstdint>
#include <vector>

#include "common/status.h"
#include "common/view.h"
#include "pim/ordering.h"

// The direct solver of resistive networks: A = L L^T of a sparse symmetric positive definite matrix,
// factored once and solved for any number of right-hand sides. README.md has the method.
namespace quernstone::pim {

// Conductances between n nodes: a diagonal and branches, of which a pair may have several.
struct Network {
    View<const std::int32_t, 1> a, b;   // [m] ends, a != b
    View<const double, 1> conductance;  // [m] > 0
    View<const double, 1> ground;       // [n] >= 0, to what is held at a voltage
    View<const double, 1> x, y;         // [n] places, or absent
};

class Cholesky {
   public:
    // Orders and factors. A pivot that is not positive is told by its node: no path leads from it to
    // what is held at a voltage, or the conductances span more than float64 does.
    [[nodiscard]] static Status make(const Network& network, Cholesky& out) noexcept;

    // out[k] = A^-1 in[k] for every k, [k, n]. Results do not depend on the number of threads, nor
    // on the other right-hand sides beyond rounding. in and out may be the same.
    [[nodiscard]] Status solve(View<const double, 2> in, View<double, 2> out,
                               int threads) const noexcept;

    [[nodiscard]] std::int64_t size() const noexcept {
        return static_cast<std::int64_t>(order_.size());
    }
    // Entries of L that are stored, and those of them that are no padding.
    [[nodiscard]] std::int64_t stored() const noexcept {
        return static_cast<std::int64_t>(panels_.size());
    }
    [[nodiscard]] std::int64_t nonzeros() const noexcept { return nonzeros_; }
    // Multiplications and additions of the factorisation.
    [[nodiscard]] double operations() const noexcept { return operations_; }

   private:
    struct Pattern;
    void analyse(const Pattern& pattern);
    [[nodiscard]] std::int32_t factor(const Pattern& pattern);

    std::vector<std::int32_t> order_;  // position -> node
    // Supernodes: columns first_[s] .. first_[s + 1] with the same rows below them, as a panel of
    // (columns + rows) x columns, column by column.
    std::vector<std::int32_t> first_;
    std::vector<std::int64_t> rows_begin_, panel_begin_;
    std::vector<std::int32_t> rows_;
    std::vector<std::int32_t> parent_;  // of a supernode, -1: none
    std::vector<double> panels_;        // the diagonal holds reciprocals
    std::int64_t nonzeros_ = 0;
    double operations_ = 0.0;
};

// Marks the nodes that a path leads to from where `reached` is not zero.
[[nodiscard]] Status reach(View<const std::int32_t, 1> a, View<const std::int32_t, 1> b,
                           View<std::uint8_t, 1> reached) noexcept;

}  // namespace quernstone::pim
