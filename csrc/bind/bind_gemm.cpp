#include <pybind11/stl.h>

#include <optional>

#include "bind/array.h"
#include "bind/packed.h"
#include "common/parallel.h"

namespace py = pybind11;

namespace quernstone::bind {

gemm::Format parse_format(const std::string& format) {
    if (format == "bf16") {
        return gemm::Format::kBf16;
    }
    if (format == "int8") {
        return gemm::Format::kInt8;
    }
    if (format == "int4") {
        return gemm::Format::kInt4;
    }
    raise(invalid("format", format.c_str(), "'bf16', 'int8' or 'int4'"));
    return {};
}

gemm::Compute parse_compute(const std::string& compute) {
    if (compute == "float") {
        return gemm::Compute::kFloat;
    }
    if (compute == "int8") {
        return gemm::Compute::kInt8;
    }
    if (compute == "mixed") {
        return gemm::Compute::kMixed;
    }
    raise(invalid("compute", compute.c_str(), "'float', 'int8' or 'mixed'"));
    return {};
}

std::byte* packed_bytes(const Array<std::uint8_t>& packed, std::int64_t want, const char* name) {
    if (packed.ndim() != 1 || packed.strides(0) != 1 || packed.shape(0) != want) {
        raise(invalid((std::string(name) + ": bytes").c_str(), packed.size(), "", want));
    }
    auto* data = const_cast<std::uint8_t*>(packed.data());
    if (reinterpret_cast<std::uintptr_t>(data) % static_cast<std::uintptr_t>(gemm::kAlign) != 0) {
        raise(invalid(name, "memory that is not aligned", "memory aligned to 64 bytes"));
    }
    return reinterpret_cast<std::byte*>(data);
}

namespace {

gemm::Layout layout(const std::string& format, std::int64_t rows, std::int64_t inputs,
                    std::int64_t group, bool zero_points) {
    const gemm::Layout made{parse_format(format), rows, inputs, group, zero_points};
    raise(gemm::check(made));
    return made;
}

void pack_codes(const gemm::Layout& to, const Array<std::int8_t>& codes, const Array<float>& scales,
                const std::optional<Array<std::uint8_t>>& zero_points, Array<std::uint8_t>& out) {
    gemm::Codes from{
        view<const std::int8_t, 2>(codes, "codes"), view<const float, 2>(scales, "scales"), {}};
    if (zero_points) {
        from.zero_points = view<const std::uint8_t, 2>(*zero_points, "zero_points");
    }
    static_cast<void>(output<std::uint8_t, 1>(out, "out"));
    std::byte* bytes = packed_bytes(out, to.bytes(), "out");
    const py::gil_scoped_release release;
    raise(gemm::pack(to, from, bytes));
}

void pack_bf16(const gemm::Layout& to, const Array<std::uint16_t>& weights,
               Array<std::uint8_t>& out) {
    const auto bits = view<const std::uint16_t, 2>(weights, "weights");
    const View<const bf16, 2> from{reinterpret_cast<const bf16*>(bits.data), bits.extent,
                                   bits.stride};
    static_cast<void>(output<std::uint8_t, 1>(out, "out"));
    std::byte* bytes = packed_bytes(out, to.bytes(), "out");
    const py::gil_scoped_release release;
    raise(gemm::pack(to, from, bytes));
}

void unpack(const gemm::Layout& from, const Array<std::uint8_t>& packed, Array<float>& out) {
    const gemm::Matrix matrix{from, packed_bytes(packed, from.bytes(), "packed")};
    const auto to = output<float, 2>(out, "out");
    const py::gil_scoped_release release;
    raise(gemm::unpack(matrix, to));
}

void multiply(const gemm::Layout& from, const Array<std::uint8_t>& packed, const Array<float>& x,
              const std::string& compute, Array<float>& out) {
    const gemm::Matrix matrix{from, packed_bytes(packed, from.bytes(), "packed")};
    const auto input = rows_of<const float>(x, "x");
    auto to = output<float, 2>(out, "out");
    expect_rows(to, "out");
    const gemm::Compute how = parse_compute(compute);
    const py::gil_scoped_release release;
    raise(gemm::multiply(matrix, input, how, to, num_threads()));
}

}  // namespace

void register_gemm(py::module_& core) {
    py::class_<gemm::Layout>(core, "Layout", "How a packed matrix lies in memory.")
        .def(py::init(&layout), py::arg("format"), py::arg("rows"), py::arg("inputs"),
             py::arg("group") = 0, py::arg("zero_points") = false)
        .def_property_readonly("bytes", &gemm::Layout::bytes);
    core.def("pack_codes", &pack_codes, py::arg("layout"), py::arg("codes").noconvert(),
             py::arg("scales").noconvert(), py::arg("zero_points").noconvert(),
             py::arg("out").noconvert(), "Quantised codes into packed blocks.");
    core.def("pack_bf16", &pack_bf16, py::arg("layout"), py::arg("weights").noconvert(),
             py::arg("out").noconvert(), "bf16 bits into packed blocks.");
    core.def("unpack", &unpack, py::arg("layout"), py::arg("packed").noconvert(),
             py::arg("out").noconvert(), "Packed blocks as fp32.");
    core.def("multiply", &multiply, py::arg("layout"), py::arg("packed").noconvert(),
             py::arg("x").noconvert(), py::arg("compute"), py::arg("out").noconvert(),
             "out[t, n] = sum over k of x[t, k] w[n, k].");
}

}  // namespace quernstone::bind
