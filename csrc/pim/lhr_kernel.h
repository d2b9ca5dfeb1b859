#pragma once

#include <array>
#include <cstdint>

// What the levels of lhr.cpp provide: one file each.
namespace quernstone::pim::lhr {

// A layer as the kernels see it: flat weights, channel after channel.
struct Problem {
    const float* weight;
    const float* scales;
    std::int64_t width;         // weights of a channel
    std::int64_t group;         // weights that share a scale, at most `width`
    std::int64_t scale_stride;  // from a channel's scales to the next one's; 0: all share them
    float low, high;            // smallest and largest code
    std::int32_t mask;          // the bits of a code
    float shift;
    float margin;  // how close to an integer is an integer
    // For codes of up to 8 bits, by their lower and their higher four bits: ones, and how many more
    // the next code has. The higher ones of the latter count where the lower bits are all set.
    alignas(64) std::array<float, 16> ones_low, ones_high, step_low, step_high;
};

// Of the flat weights.
struct Range {
    std::int64_t begin, end;
};

enum class Store : std::uint8_t { kWrite, kStream, kAdd };

// kStream, and a strip of slopes, take a gradient that is aligned to 64 bytes and runs of one scale
// that are multiples of this.
inline constexpr std::int64_t kStrip = 64;

struct Kernels {
    double (*sum)(const Problem& p, Range range);
    void (*gradient)(const Problem& p, Range range, float factor, Store store, float* grad);
    // Like sum(), and leaves twice the slopes as bytes in the last quarter of the range's gradient,
    // where expand() finds them.
    double (*sum_and_slopes)(const Problem& p, Range range, float* grad);
    void (*expand)(const Problem& p, Range range, float factor, float* grad);
};

namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace quernstone::pim::lhr
