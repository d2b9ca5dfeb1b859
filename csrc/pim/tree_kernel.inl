// One instruction-set level of the adder trees, included within the namespace of that level. Loops
// over banks are what the compiler makes vectors of.

inline std::uint32_t ones(std::uint32_t x) {
    x -= (x >> 1) & 0x55555555U;
    x = (x & 0x33333333U) + ((x >> 2) & 0x33333333U);
    x = (x + (x >> 4)) & 0x0f0f0f0fU;
    x += x >> 8;
    return (x + (x >> 16)) & 0x3fU;
}

void add(const std::int32_t* left, const std::int32_t* right, std::int32_t* sums,
         std::uint32_t mask, std::uint32_t* counts) {
    for (std::int64_t b = 0; b < kTreeBanks; ++b) {
        const std::int32_t sum = left[b] + (right == nullptr ? 0 : right[b]);
        counts[b] += ones(static_cast<std::uint32_t>(sum ^ sums[b]) & mask);
        sums[b] = sum;
    }
}

void accumulate(const std::int32_t* root, std::int64_t* accumulators, int shift, bool negative,
                bool first, std::uint64_t mask, std::uint32_t* counts) {
    for (std::int64_t b = 0; b < kTreeBanks; ++b) {
        const auto part = static_cast<std::int64_t>(root[b]) * (std::int64_t{1} << shift);
        const std::int64_t before = first ? 0 : accumulators[b];
        const std::int64_t after = negative ? before - part : before + part;
        const std::uint64_t changed = static_cast<std::uint64_t>(after ^ accumulators[b]) & mask;
        counts[b] += ones(static_cast<std::uint32_t>(changed)) +
                     ones(static_cast<std::uint32_t>(changed >> 32));
        accumulators[b] = after;
    }
}
