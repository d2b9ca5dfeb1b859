#pragma once

#include <cstdint>

namespace quernstone::pim {

inline constexpr std::int64_t kTreeBanks = 16;  // that are computed together

struct TreeKernels {
    // sums = left + right for kTreeBanks banks, `right` null where there is none; adds the bits of
    // `mask` that changed in each to counts.
    void (*add)(const std::int32_t* left, const std::int32_t* right, std::int32_t* sums,
                std::uint32_t mask, std::uint32_t* counts);
    // accumulators += or -= root << shift after a clear if `first`; counts as above.
    void (*accumulate)(const std::int32_t* root, std::int64_t* accumulators, int shift,
                       bool negative, bool first, std::uint64_t mask, std::uint32_t* counts);
};

extern const TreeKernels kTreeScalar, kTreeAvx2, kTreeAvx512;

}  // namespace quernstone::pim
