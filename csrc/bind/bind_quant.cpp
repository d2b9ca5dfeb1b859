#include <span>

#include "bind/array.h"
#include "common/parallel.h"
#include "quant/bits.h"
#include "quant/gptq.h"

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
    core.def(
        "round_columns",
        [](Array<double>& weight, const Array<double>& upper, const Array<double>& scale,
           const Array<double>& zero, const Array<double>& penalty, std::int64_t lowest,
           std::int64_t reach, bool of_output, Array<std::int16_t>& codes) {
            quant::RoundColumnsArgs args;
            args.weight = output<double, 3>(weight, "weight");
            args.upper = view<const double, 3>(upper, "upper");
            args.scale = view<const double, 2>(scale, "scale");
            args.zero = view<const double, 2>(zero, "zero");
            args.penalty = view<const double, 1>(penalty, "penalty");
            args.codes = output<std::int16_t, 3>(codes, "codes");
            args.lowest = lowest;
            args.reach = reach;
            args.of_output = of_output;
            Status status;
            {
                const py::gil_scoped_release release;
                status = quant::round_columns(args, num_threads());
            }
            raise(status);
        },
        py::arg("weight").noconvert(), py::arg("upper").noconvert(), py::arg("scale").noconvert(),
        py::arg("zero").noconvert(), py::arg("penalty").noconvert(), py::arg("lowest"),
        py::arg("reach"), py::arg("of_output"), py::arg("codes").noconvert(),
        "Rounds the columns of matrices one after the other; weight becomes the errors.");
}

}  // namespace quernstone::bind
