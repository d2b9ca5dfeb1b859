#pragma once

#include <cstdint>

#include "pim/superpose.h"

// What an instruction-set level gives the worst drops: one macro in kLanes cycles.
namespace quernstone::pim {

inline constexpr std::int64_t kLanes = 16;  // cycles, side by side

struct Screen {
    std::int64_t macros, nodes, columns;  // columns of `basis`: scores and their error
    const float* basis;                   // [macros][columns]
    const float* places;                  // [tiles][columns - 1][kNodesOfTile]
    const double* response;               // [nodes][macros]
};

struct Cycles {
    std::int64_t count;      // kLanes at most
    std::uint32_t idle;      // bit l: nothing is drawn in cycle l
    const float* lanes;      // [macros][kLanes]
    const double* currents;  // [count], `stride` apart
    std::int64_t stride;
    float* room;  // room_of()
    double* out;  // [count], `out_stride` apart
    std::int64_t out_stride;
};

// Floats of scores [columns][kLanes], of nodes and of tiles.
constexpr std::int64_t room_of(std::int64_t columns, std::int64_t tiles) noexcept {
    return (columns + tiles * (kNodesOfTile + 1)) * kLanes;
}

using WorstKernel = void (*)(const Screen& screen, const Cycles& cycles);

namespace superpose_scalar {
void worst(const Screen& screen, const Cycles& cycles);
}
namespace superpose_avx2 {
void worst(const Screen& screen, const Cycles& cycles);
}
namespace superpose_avx512 {
void worst(const Screen& screen, const Cycles& cycles);
}

}  // namespace quernstone::pim
