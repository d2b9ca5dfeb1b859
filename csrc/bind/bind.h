#pragma once

#include <pybind11/pybind11.h>

#include "common/status.h"

namespace quernstone::bind {

// Throws what Python shall see as a ValueError, or where memory is short as a RuntimeError.
void raise(const Status& status);

// Operators of one vertical with torch, and its functions of _core.
void register_attention(pybind11::module_& core);

// Functions of _core that take numpy arrays and need no torch.
void register_quant(pybind11::module_& core);
void register_gemm(pybind11::module_& core);

// Functions of _core.moe.
void register_moe_experts(pybind11::module_& moe);
void register_moe_cache(pybind11::module_& moe);
void register_moe_decoder(pybind11::module_& moe);
void register_moe_schedule(pybind11::module_& moe);
void register_moe_runtime(pybind11::module_& moe);
void register_moe_step(pybind11::module_& moe);

// The operators of experts with torch.
void register_moe_operator();
void register_moe_step_operator();

// Functions of _core.pim.
void register_pim_chip(pybind11::module_& pim);
void register_pim(pybind11::module_& pim);
void register_pim_grid(pybind11::module_& pim);

// Functions of _core.pim.
void register_pim_lhr(pybind11::module_& pim);

}  // namespace quernstone::bind
