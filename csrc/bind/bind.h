#pragma once

#include <pybind11/pybind11.h>

#include "common/status.h"

namespace quernstone::bind {

// Throws what Python shall see as a ValueError, or where memory is short as a RuntimeError.
void raise(const Status& status);

// Operators of one vertical with torch, and its functions of _core.
void register_attention(pybind11::module_& core);

// Functions of _core.moe, which need no torch.
void register_moe(pybind11::module_& core);

}  // namespace quernstone::bind
