#pragma once

#include <cstdint>

// How often operator new was called in this process.
[[nodiscard]] std::int64_t allocations() noexcept;
