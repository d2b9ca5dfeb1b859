#include "bind/array.h"
#include "common/parallel.h"
#include "pim/lhr.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

pim::lhr::Layer layer(const Array<float>& weight, const Array<float>& scales, std::int64_t group,
                      int bits, int shift) {
    return {view<const float, 2>(weight, "weight"), view<const float, 2>(scales, "scales"), group,
            bits, shift};
}

double mean_hamming_weight(const Array<float>& weight, const Array<float>& scales,
                           std::int64_t group, int bits, int shift) {
    const auto of = layer(weight, scales, group, bits, shift);
    double mean = 0.0;
    const py::gil_scoped_release release;
    raise(pim::lhr::mean_hamming_weight(of, mean, num_threads()));
    return mean;
}

void mean_gradient(const Array<float>& weight, const Array<float>& scales, std::int64_t group,
                   int bits, int shift, double factor, bool accumulate, Array<float>& grad) {
    const auto of = layer(weight, scales, group, bits, shift);
    const auto to = output<float, 2>(grad, "grad");
    const py::gil_scoped_release release;
    raise(pim::lhr::mean_gradient(of, factor, accumulate, to, num_threads()));
}

double squared(const Array<float>& weight, const Array<float>& scales, std::int64_t group, int bits,
               int shift, double factor, bool accumulate, Array<float>& grad) {
    const auto of = layer(weight, scales, group, bits, shift);
    const auto to = output<float, 2>(grad, "grad");
    double value = 0.0;
    const py::gil_scoped_release release;
    raise(pim::lhr::squared(of, factor, accumulate, to, value, num_threads()));
    return value;
}

}  // namespace

void register_pim_lhr(py::module_& pim) {
    pim.def("lhr_mean", &mean_hamming_weight, py::arg("weight").noconvert(),
            py::arg("scales").noconvert(), py::arg("group"), py::arg("bits"), py::arg("shift"),
            "Mean interpolated Hamming weight, in bits.");
    pim.def("lhr_gradient", &mean_gradient, py::arg("weight").noconvert(),
            py::arg("scales").noconvert(), py::arg("group"), py::arg("bits"), py::arg("shift"),
            py::arg("factor"), py::arg("accumulate"), py::arg("grad").noconvert(),
            "grad (+)= factor * d mean / d weight.");
    pim.def("lhr_squared", &squared, py::arg("weight").noconvert(), py::arg("scales").noconvert(),
            py::arg("group"), py::arg("bits"), py::arg("shift"), py::arg("factor"),
            py::arg("accumulate"), py::arg("grad").noconvert(),
            "factor * mean^2, and grad (+)= its gradient.");
}

}  // namespace quernstone::bind
