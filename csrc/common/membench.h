#pragma once

#include <cstddef>
#include <cstdint>

// The memory limits that benchmarks print beside their figures.
namespace quernstone {

// Both split the buffers over the pool's threads and take 64-byte multiples;
// `prefetch` is the distance of software prefetches in bytes, 0 for none. A thread reads from
// `streams` places, 1 to 8, in turn.
[[nodiscard]] double seconds_to_read(const std::byte* from, std::int64_t bytes,
                                     std::int64_t prefetch, int streams) noexcept;
[[nodiscard]] double seconds_to_copy(std::byte* to, const std::byte* from, std::int64_t bytes,
                                     std::int64_t prefetch) noexcept;

}  // namespace quernstone
