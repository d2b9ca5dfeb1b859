#include <pybind11/stl.h>

#include <algorithm>
#include <new>
#include <string>

#include "bind/bind.h"
#include "bind/torch_shim.h"
#include "common/cpu.h"
#include "common/membench.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace quernstone::bind {

void raise(const Status& status) {
    if (status.ok()) {
        return;
    }
    const std::string got =
        status.got_text != nullptr ? status.got_text : std::to_string(status.got);
    std::string text = std::string(status.what) + ": got " + got + ", expected " + status.want_text;
    if (status.want_has_number) {
        text += (*status.want_text != '\0' ? " " : "") + std::to_string(status.want);
    }
    if (status.code == Code::kNoMemory) {
        throw std::runtime_error("out of memory: " + text);
    }
    throw std::invalid_argument(text);
}

namespace {

py::list isas() {
    py::list names;
    for (const Isa isa : available_isas()) {
        names.append(std::string(isa_name(isa)));
    }
    return names;
}

void select_isa(const std::string& name) {
    if (!set_isa(name)) {
        throw std::invalid_argument("isa: got '" + name + "', expected one of " +
                                    py::repr(isas()).cast<std::string>());
    }
}

py::dict build_info() {
    py::dict info;
    info["version"] = QS_VERSION;
    info["compiler"] = QS_COMPILER;
    info["build_type"] = QS_BUILD_TYPE;
    info["sanitizers"] = QS_SANITIZERS;
#if defined(QS_EMULATE_AVX512)
    info["emulated"] = "avx512";
#else
    info["emulated"] = "";
#endif
    return info;
}

}  // namespace
}  // namespace quernstone::bind

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    using namespace quernstone;
    m.doc() = "The compiled core of quernstone.";
    m.def(
        "load_torch",
        [m](const std::string& libtorch_cpu) mutable {
            if (shim::load(libtorch_cpu)) {
                bind::register_attention(m);
                bind::register_moe_operator();
                bind::register_moe_step_operator();
            }
        },
        py::arg("libtorch_cpu"), "Registers the operators with torch. A second call does nothing.");
    m.def(
        "isa", [] { return std::string(isa_name(active_isa())); },
        "The instruction-set level in use.");
    bind::register_quant(m);
    bind::register_gemm(m);
    auto moe = m.def_submodule("moe", "Mixture-of-experts inference on a CPU beside a GPU.");
    bind::register_moe_experts(moe);
    bind::register_moe_cache(moe);
    bind::register_moe_decoder(moe);
    bind::register_moe_schedule(moe);
    bind::register_moe_runtime(moe);
    bind::register_moe_step(moe);
    auto pim =
        m.def_submodule("pim", "Bit-serial macros: ones, toggles, products, and their chip.");
    bind::register_pim(pim);
    bind::register_pim_chip(pim);
    bind::register_pim_grid(pim);
    bind::register_pim_lhr(pim);
    m.def("isas", &bind::isas, "The levels that this processor and build have, lowest first.");
    m.def("set_isa", &bind::select_isa, py::arg("name"),
          "Changes the level. Raises ValueError where it is unknown or not available.");
    m.def("num_threads", &num_threads, "Threads that a call may use: torch.set_num_threads rules.");
    m.def("build_info", &bind::build_info, "Compiler, build type, sanitizers, emulated levels.");
    m.def(
        "bench_read",
        [](std::uintptr_t address, std::int64_t bytes, std::int64_t prefetch, int streams) {
            return seconds_to_read(reinterpret_cast<const std::byte*>(address), bytes, prefetch,
                                   std::clamp(streams, 1, 8));
        },
        py::arg("address"), py::arg("bytes"), py::arg("prefetch_bytes"), py::arg("streams"),
        py::call_guard<py::gil_scoped_release>(), "Seconds to read a buffer once.");
    m.def(
        "bench_copy_nt",
        [](std::uintptr_t to, std::uintptr_t from, std::int64_t bytes, std::int64_t prefetch) {
            return seconds_to_copy(reinterpret_cast<std::byte*>(to),
                                   reinterpret_cast<const std::byte*>(from), bytes, prefetch);
        },
        py::arg("to"), py::arg("source"), py::arg("bytes"), py::arg("prefetch_bytes"),
        py::call_guard<py::gil_scoped_release>(),
        "Seconds to copy a buffer once with stores that bypass the caches.");
}
