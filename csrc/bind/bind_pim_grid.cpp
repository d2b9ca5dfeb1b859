#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bind/array.h"
#include "common/parallel.h"
#include "pim/cholesky.h"

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
}

}  // namespace quernstone::bind
