#pragma once

#include <cstdint>

namespace stress {

// Executes random plans on tiny experts with a device whose workers race: policies, caches, slots,
// guesses and cancelled loads as they come. How many gave other bits than the CPU alone.
std::int64_t run(std::int64_t executions, std::uint64_t seed);

}  // namespace stress
