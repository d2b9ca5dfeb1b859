#pragma once

#include <cstdint>

namespace quernstone {

// Storage only: the upper half of an fp32. Arithmetic lives in the ISA files.
struct bf16 {
    std::uint16_t bits;
};
static_assert(sizeof(bf16) == 2);

}  // namespace quernstone
