#include <pybind11/stl.h>

#include "bind/array.h"
#include "common/parallel.h"
#include "pim/pim.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

// int8 or int16, [n, i] or, of one axis, [n]; unsigned ones come as views of these.
pim::Integers integers(const py::array& array, const char* name) {
    const bool narrow = py::isinstance<Array<std::int8_t>>(array);
    if (!narrow && !py::isinstance<Array<std::int16_t>>(array)) {
        raise(invalid(name, "another dtype", "int8 or int16"));
    }
    if (array.ndim() < 1 || array.ndim() > 2) {
        raise(invalid((std::string(name) + ".ndim").c_str(), array.ndim(), "1 or 2"));
    }
    const std::int64_t size = narrow ? 1 : 2;
    const auto last = array.ndim() - 1;
    if (array.size() > 0 && array.shape(last) > 1 && array.strides(last) != size) {
        raise(invalid(name, "a strided last axis", "a contiguous last axis"));
    }
    pim::Integers out;
    out.data = static_cast<const std::byte*>(array.data());
    out.count = array.shape(0);
    out.width = last == 1 ? array.shape(1) : 1;
    out.stride = array.strides(0) / size;
    out.wide = !narrow;
    return out;
}

template <class T, int N>
View<T, N> rows_out(Array<T>& array, const char* name) {
    const auto out = output<T, N>(array, name);
    if (array.size() > 0 && out.extent[N - 1] > 1 && out.stride[N - 1] != 1) {
        raise(invalid(name, "a strided last axis", "a contiguous last axis"));
    }
    return out;
}

pim::Formulation parse_formulation(const std::string& name) {
    if (name == "auto") {
        return pim::Formulation::kAuto;
    }
    if (name == "table") {
        return pim::Formulation::kTable;
    }
    if (name == "dot") {
        return pim::Formulation::kDot;
    }
    if (name == "tiles") {
        return pim::Formulation::kTiles;
    }
    raise(invalid("formulation", ("'" + name + "'").c_str(), "'auto', 'table', 'dot' or 'tiles'"));
    return pim::Formulation::kAuto;
}

pim::Content parse_content(const std::string& name) {
    if (name == "ones") {
        return pim::Content::kOnes;
    }
    if (name == "weights") {
        return pim::Content::kWeights;
    }
    if (name == "row_ones") {
        return pim::Content::kRowOnes;
    }
    raise(invalid("content", ("'" + name + "'").c_str(), "'ones', 'weights' or 'row_ones'"));
    return pim::Content::kOnes;
}

pim::Lines lines(int bits, int idle, bool msb_first, bool input_signed, bool cross_vector,
                 bool zero_gating) {
    const pim::Lines made{bits, idle, msb_first, input_signed, cross_vector, zero_gating};
    raise(pim::check(made));
    return made;
}

pim::Programmed layer(const std::string& content, std::int64_t outputs, std::int64_t inputs,
                      std::int64_t rows, std::int64_t banks, int weight_bits, bool weight_signed) {
    const pim::Programmed made{
        outputs, inputs, rows, banks, weight_bits, weight_signed, parse_content(content), nullptr};
    raise(pim::check(made));
    return made;
}

std::byte* programmed(const Array<std::uint8_t>& data, const pim::Programmed& layer) {
    const auto bytes = view<std::uint8_t, 1>(data, "data");
    raise(same("data: bytes", bytes.extent[0], "", layer.bytes()));
    if (bytes.extent[0] > 1 && bytes.stride[0] != 1) {
        raise(invalid("data", "a strided array", "a contiguous one"));
    }
    if (reinterpret_cast<std::uintptr_t>(bytes.data) % pim::kAlign != 0) {
        raise(invalid("data", "memory that is not aligned", "64 bytes"));
    }
    return reinterpret_cast<std::byte*>(bytes.data);
}

void program(const pim::Programmed& layer, const py::array& weights, Array<std::uint8_t>& out) {
    static_cast<void>(output<std::uint8_t, 1>(out, "out"));
    std::byte* to = programmed(out, layer);
    const auto from = integers(weights, "weights");
    const py::gil_scoped_release release;
    raise(pim::program(layer, from, to));
}

void toggles(pim::Programmed layer, const Array<std::uint8_t>& data, const pim::Lines& lines,
             const py::array& inputs, const std::string& formulation, Array<std::int32_t>& out) {
    layer.data = programmed(data, layer);
    const pim::ToggleArgs args{integers(inputs, "inputs"), lines,
                               rows_out<std::int32_t, 3>(out, "out"),
                               parse_formulation(formulation)};
    const py::gil_scoped_release release;
    raise(pim::toggles(layer, args, num_threads()));
}

void mvm(pim::Programmed layer, const Array<std::uint8_t>& data, const pim::Lines& lines,
         const py::array& inputs, const std::string& formulation, Array<std::int64_t>& out) {
    layer.data = programmed(data, layer);
    const pim::MvmArgs args{integers(inputs, "inputs"), lines,
                            rows_out<std::int64_t, 2>(out, "out"), parse_formulation(formulation)};
    const py::gil_scoped_release release;
    raise(pim::mvm(layer, args, num_threads()));
}

void line_toggles(const pim::Lines& lines, const py::array& inputs, Array<std::uint8_t>& out) {
    const pim::LineArgs args{integers(inputs, "inputs"), lines,
                             rows_out<std::uint8_t, 3>(out, "out")};
    const py::gil_scoped_release release;
    raise(pim::line_toggles(args, num_threads()));
}

py::tuple count_ones(const py::array& run, int bits, bool is_signed) {
    auto from = integers(run, "run");
    if (run.ndim() != 1 || (from.count > 1 && from.stride != 1)) {
        raise(invalid("run", "a strided array", "a contiguous one"));
    }
    pim::Ones ones;
    {
        const py::gil_scoped_release release;
        raise(pim::count_ones(from, bits, is_signed, num_threads(), ones));
    }
    return py::make_tuple(ones.ones, ones.in_range);
}

py::list formulations() {
    py::list names;
    for (const char* name : {"table", "dot", "tiles"}) {
        if (pim::available(parse_formulation(name))) {
            names.append(name);
        }
    }
    return names;
}

}  // namespace

void register_pim(py::module_& m) {
    py::class_<pim::Lines>(m, "Lines", "How the row lines of a macro are driven.")
        .def(py::init(&lines), py::arg("bits"), py::arg("idle"), py::arg("msb_first"),
             py::arg("input_signed"), py::arg("cross_vector"), py::arg("zero_gating"));
    py::class_<pim::Programmed>(m, "Layer", "A layer as it lies in macros.")
        .def(py::init(&layer), py::arg("content"), py::arg("outputs"), py::arg("inputs"),
             py::arg("rows"), py::arg("banks"), py::arg("weight_bits"), py::arg("weight_signed"))
        .def_property_readonly("columns", &pim::Programmed::columns)
        .def_property_readonly("row_tiles", &pim::Programmed::row_tiles)
        .def_property_readonly("bytes", &pim::Programmed::bytes);
    m.def("program", &program, py::arg("layer"), py::arg("weights").noconvert(),
          py::arg("out").noconvert(), "Writes weights as the counts of a layer read them.");
    m.def("toggles", &toggles, py::arg("layer"), py::arg("data").noconvert(), py::arg("lines"),
          py::arg("inputs").noconvert(), py::arg("formulation"), py::arg("out").noconvert(),
          "Products that toggle in each tile of rows, cycle and column.");
    m.def("mvm", &mvm, py::arg("layer"), py::arg("data").noconvert(), py::arg("lines"),
          py::arg("inputs").noconvert(), py::arg("formulation"), py::arg("out").noconvert(),
          "Weights times each vector, one input bit a cycle.");
    m.def("line_toggles", &line_toggles, py::arg("lines"), py::arg("inputs").noconvert(),
          py::arg("out").noconvert(), "Which row lines change in each cycle.");
    m.def("count_ones", &count_ones, py::arg("run").noconvert(), py::arg("bits"),
          py::arg("is_signed"), "Ones of integers, and whether all are of so many bits.");
    m.def(
        "bench_loads",
        [](std::uintptr_t address, std::int64_t bytes, std::int64_t repeats) {
            pim::load_repeatedly(reinterpret_cast<const std::byte*>(address), bytes, repeats,
                                 num_threads());
        },
        py::arg("address"), py::arg("bytes"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>(),
        "Loads 64 bytes at a time, on every thread; a multiple of 512.");
    m.def("formulations", &formulations, "Those that this processor and level have.");
}

}  // namespace quernstone::bind
