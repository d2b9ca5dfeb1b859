#pragma once

#include <cstdint>

#include "pim/kernel.h"
#include "pim/pim.h"

// The memory of a programmed layer: blocks of digits, which program() writes and counts read. Not
// for files of an instruction-set level, whose copy of integer() might be linked.
namespace quernstone::pim {

// Vector or output n, input i.
[[nodiscard]] inline std::int64_t integer(const Integers& x, std::int64_t n,
                                          std::int64_t i) noexcept {
    const std::int64_t at = n * x.stride + i;
    return x.wide ? std::int64_t{reinterpret_cast<const std::int16_t*>(x.data)[at]}
                  : std::int64_t{reinterpret_cast<const std::int8_t*>(x.data)[at]};
}

// Block b of the tile of rows r.
[[nodiscard]] Block block_at(const Programmed& layer, std::int64_t r, std::int64_t b) noexcept;

}  // namespace quernstone::pim
