#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm/gemm.h"

// Gated feed-forward experts on the CPU: down(silu(gate(x)) * up(x)), for tokens that a router
// has sent to some of them. gemm/README.md has the layout of a matrix and the arithmetic.
//
// Axes: t tokens, c choices of a token, e experts, m hidden (model) width, f feed-forward width.
namespace quernstone::moe {

inline constexpr std::int64_t kMostExperts = 4096;

// The experts of one layer, packed one behind the other. An expert holds gate and up together,
// a block of 16 outputs of one and then of the other, and then down.
struct Experts {
    gemm::Format format = gemm::Format::kBf16;
    std::int64_t count = 0, hidden = 0, intermediate = 0;
    std::int64_t group = 0;
    bool zero_points = false;
    const std::byte* data = nullptr;  // bytes(), aligned to gemm::kAlign

    [[nodiscard]] constexpr gemm::Layout gate() const noexcept {  // and up
        return {format, intermediate, hidden, group, zero_points};
    }
    [[nodiscard]] constexpr gemm::Layout down() const noexcept {
        return {format, hidden, intermediate, group, zero_points};
    }
    [[nodiscard]] constexpr std::int64_t expert_bytes() const noexcept {
        return 2 * gate().bytes() + down().bytes();
    }
    [[nodiscard]] constexpr std::int64_t bytes() const noexcept { return count * expert_bytes(); }
};

[[nodiscard]] Status check(const Experts& experts) noexcept;

// Copies packed gate, up and down matrices of one expert to where it stands in `to`.
void place(const Experts& experts, const std::byte* gate, const std::byte* up,
           const std::byte* down, std::byte* to) noexcept;

struct ForwardArgs {
    View<const float, 2> x;           // [t, m]
    View<const std::int64_t, 2> ids;  // [t, c] expert, or -1: none here; no expert twice
    View<const float, 2> weights;     // [t, c] finite, where the expert is here
    View<float, 2> out;               // [t, m] the weighted sum over c
    gemm::Compute compute = gemm::Compute::kFloat;
};

// Results depend neither on the number of threads nor on the other tokens of a call, with kMixed on
// how many tokens share an expert; a token's experts are summed in the order of their numbers.
[[nodiscard]] Status forward(const Experts& experts, const ForwardArgs& args, int threads) noexcept;

}  // namespace quernstone::moe
