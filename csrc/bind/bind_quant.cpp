#include <span>

#include "bind/array.h"
#include "quant/bits.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

std::span<std::uint8_t> bytes_of(const Array<std::uint8_t>& array, const char* name) {
    const auto bytes = view<std::uint8_t, 1>(array, name);
    if (bytes.extent[0] > 1 && bytes.stride[0] != 1) {
        raise(invalid(name, "a strided array", "a contiguous one"));
    }
    return {bytes.data, static_cast<std::size_t>(bytes.extent[0])};
}

}  // namespace

void register_quant(py::module_& core) {
    core.def(
        "pack_bits",
        [](const Array<std::uint8_t>& codes, int bits, Array<std::uint8_t>& packed) {
            static_cast<void>(output<std::uint8_t, 1>(packed, "packed"));
            raise(quant::pack_bits(bytes_of(codes, "codes"), bits, bytes_of(packed, "packed")));
        },
        py::arg("codes").noconvert(), py::arg("bits"), py::arg("packed").noconvert(),
        "Codes one after the other, the lowest bit first.");
    core.def(
        "unpack_bits",
        [](const Array<std::uint8_t>& packed, int bits, Array<std::uint8_t>& codes) {
            static_cast<void>(output<std::uint8_t, 1>(codes, "codes"));
            raise(quant::unpack_bits(bytes_of(packed, "packed"), bits, bytes_of(codes, "codes")));
        },
        py::arg("packed").noconvert(), py::arg("bits"), py::arg("codes").noconvert(),
        "What pack_bits packed.");
}

}  // namespace quernstone::bind
