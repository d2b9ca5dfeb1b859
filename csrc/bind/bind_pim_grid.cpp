#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "bind/array.h"
#include "common/parallel.h"
#include "pim/cholesky.h"
#include "pim/superpose.h"
#include "pim/tree.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

using pim::Cholesky;

std::unique_ptr<Cholesky> factor(const Array<std::int32_t>& a, const Array<std::int32_t>& b,
                                 const Array<double>& conductance, const Array<double>& ground,
                                 const std::optional<Array<double>>& x,
                                 const std::optional<Array<double>>& y) {
    pim::Network network{view<const std::int32_t, 1>(a, "a"),
                         view<const std::int32_t, 1>(b, "b"),
                         view<const double, 1>(conductance, "conductance"),
                         view<const double, 1>(ground, "ground"),
                         {},
                         {}};
    if (x && y) {
        network.x = view<const double, 1>(*x, "x");
        network.y = view<const double, 1>(*y, "y");
    }
    auto made = std::make_unique<Cholesky>();
    Status status;
    {
        const py::gil_scoped_release release;
        status = Cholesky::make(network, *made);
    }
    raise(status);
    return made;
}

void solve(const Cholesky& factor, const Array<double>& currents, Array<double>& out, int threads) {
    const auto in = view<const double, 2>(currents, "currents");
    const auto to = output<double, 2>(out, "out");
    Status status;
    {
        const py::gil_scoped_release release;
        status = factor.solve(in, to, threads);
    }
    raise(status);
}

void reach(const Array<std::int32_t>& a, const Array<std::int32_t>& b,
           Array<std::uint8_t>& reached) {
    raise(pim::reach(view<const std::int32_t, 1>(a, "a"), view<const std::int32_t, 1>(b, "b"),
                     output<std::uint8_t, 1>(reached, "reached")));
}

void tree_toggles(const Array<std::int32_t>& weights, const Array<std::int32_t>& inputs,
                  std::int64_t rows, std::int64_t banks, int weight_bits, int input_bits,
                  bool input_signed, bool msb_first, Array<std::int64_t>& out) {
    const pim::TreeArgs args{view<const std::int32_t, 2>(weights, "weights"),
                             view<const std::int32_t, 2>(inputs, "inputs"),
                             rows,
                             banks,
                             weight_bits,
                             input_bits,
                             input_signed,
                             msb_first,
                             output<std::int64_t, 4>(out, "out")};
    Status status;
    {
        const py::gil_scoped_release release;
        status = pim::tree_toggles(args, num_threads());
    }
    raise(status);
}

template <class T, int N>
View<T, N> contiguous(View<T, N> of, const char* name) {
    const bool empty = std::find(of.extent.begin(), of.extent.end(), 0) != of.extent.end();
    std::int64_t step = 1;
    for (std::size_t axis = N; axis-- > 0;) {
        if (!empty && of.extent[axis] > 1 && of.stride[axis] != step) {
            raise(invalid(name, "a strided array", "a contiguous one"));
        }
        of.stride[axis] = step;
        step *= of.extent[axis];
    }
    return of;
}

void worst_drops(const Array<double>& currents, const Array<double>& response,
                 const Array<std::int64_t>& begin, const Array<float>& basis,
                 const Array<float>& places, double unit, Array<double>& out) {
    const pim::WorstArgs args{contiguous(view<const double, 2>(currents, "currents"), "currents"),
                              contiguous(view<const double, 2>(response, "response"), "response"),
                              contiguous(view<const std::int64_t, 1>(begin, "begin"), "begin"),
                              contiguous(view<const float, 3>(basis, "basis"), "basis"),
                              contiguous(view<const float, 3>(places, "places"), "places"),
                              unit,
                              contiguous(output<double, 2>(out, "out"), "out")};
    Status status;
    {
        const py::gil_scoped_release release;
        status = pim::worst_drops(args, num_threads());
    }
    raise(status);
}

}  // namespace

void register_pim_grid(py::module_& m) {
    const auto array = [](const char* name) { return py::arg(name).noconvert(); };
    py::class_<Cholesky>(m, "Cholesky", "A factored network of conductances.")
        .def(py::init(&factor), array("a"), array("b"), array("conductance"), array("ground"),
             array("x"), array("y"))
        .def("solve", &solve, array("currents"), array("out"), py::arg("threads"),
             "out[k] = A^-1 currents[k]")
        .def_property_readonly("size", &Cholesky::size)
        .def_property_readonly("stored", &Cholesky::stored)
        .def_property_readonly("nonzeros", &Cholesky::nonzeros)
        .def_property_readonly("operations", &Cholesky::operations);
    m.def("reach", &reach, array("a"), array("b"), array("reached"),
          "Marks the nodes that a path leads to from a marked one.");
    m.def("worst_drops", &worst_drops, array("currents"), array("response"), array("begin"),
          array("basis"), array("places"), py::arg("unit"), array("out"),
          "The worst drop within each macro in each cycle.");
    m.def("tree_stages", &pim::tree_stages, py::arg("rows"));
    m.def("tree_toggles", &tree_toggles, array("weights"), array("inputs"), py::arg("rows"),
          py::arg("banks"), py::arg("weight_bits"), py::arg("input_bits"), py::arg("input_signed"),
          py::arg("msb_first"), array("out"), "Bits that change in adder trees, by stage.");
}

}  // namespace quernstone::bind
