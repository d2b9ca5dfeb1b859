#pragma once

#include <cstdint>

// What the levels of lhr.cpp provide: one file each.
namespace quernstone::pim::lhr {

// A run of the flat weights [begin, end) of a layer.
struct Block {
    const float* weight;
    const float* scales;
    std::int64_t begin, end;
    std::int64_t width;         // weights of a channel
    std::int64_t group;         // weights that share a scale, at most `width`
    std::int64_t scale_stride;  // from a channel's scales to the next one's; 0: all share them
    float low, high;            // smallest and largest code
    std::int32_t mask;          // the bits of a code
    float shift;
    float margin;               // how close to an integer is an integer
};

enum class Store : std::uint8_t { kWrite, kStream, kAdd };

struct Kernels {
    double (*sum)(const Block& block);
    // kStream takes a gradient that is aligned to 64 bytes and runs of multiples of 16.
    void (*gradient)(const Block& block, float factor, Store store, float* grad);
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
