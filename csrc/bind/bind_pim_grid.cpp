#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bind/array.h"
#include "common/parallel.h"
#include "pim/cholesky.h"
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
    m.def("tree_stages", &pim::tree_stages, py::arg("rows"));
    m.def("tree_toggles", &tree_toggles, array("weights"), array("inputs"), py::arg("rows"),
          py::arg("banks"), py::arg("weight_bits"), py::arg("input_bits"), py::arg("input_signed"),
          py::arg("msb_first"), array("out"), "Bits that change in adder trees, by stage.");
}

}  // namespace quernstone::bind
