#include "bind/packed.h"
#include "common/parallel.h"
#include "moe/experts.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

moe::Experts experts(const std::string& format, std::int64_t count, std::int64_t hidden,
                     std::int64_t intermediate, std::int64_t group, bool zero_points) {
    const moe::Experts made{parse_format(format), count, hidden, intermediate, group, zero_points};
    raise(moe::check(made));
    return made;
}

void place(const moe::Experts& to, std::int64_t index, const Array<std::uint8_t>& gate,
           const Array<std::uint8_t>& up, const Array<std::uint8_t>& down,
           Array<std::uint8_t>& out) {
    if (index < 0 || index >= to.count) {
        raise(invalid("index", index, "0 to", to.count - 1));
    }
    static_cast<void>(output<std::uint8_t, 1>(out, "out"));
    std::byte* bytes = packed_bytes(out, to.bytes(), "out");
    const std::byte* parts[] = {packed_bytes(gate, to.gate().bytes(), "gate"),
                                packed_bytes(up, to.gate().bytes(), "up"),
                                packed_bytes(down, to.down().bytes(), "down")};
    const py::gil_scoped_release release;
    moe::place(to, parts[0], parts[1], parts[2], bytes + index * to.expert_bytes());
}

void forward(const moe::Experts& layout, const Array<std::uint8_t>& packed, const Array<float>& x,
             const Array<std::int64_t>& ids, const Array<float>& weights,
             const std::string& compute, Array<float>& out) {
    moe::Experts used = layout;
    used.data = packed_bytes(packed, layout.bytes(), "packed");
    moe::ForwardArgs args{rows_of<const float>(x, "x"), view<const std::int64_t, 2>(ids, "ids"),
                          view<const float, 2>(weights, "weights"), output<float, 2>(out, "out"),
                          parse_compute(compute)};
    expect_rows(args.out, "out");
    const py::gil_scoped_release release;
    raise(moe::forward(used, args, num_threads()));
}

}  // namespace

void register_moe_experts(py::module_& m) {
    py::class_<moe::Experts>(m, "ExpertsLayout", "How the experts of a layer lie in memory.")
        .def(py::init(&experts), py::arg("format"), py::arg("count"), py::arg("hidden"),
             py::arg("intermediate"), py::arg("group") = 0, py::arg("zero_points") = false)
        .def_property_readonly("bytes", &moe::Experts::bytes)
        .def_property_readonly("expert_bytes", &moe::Experts::expert_bytes);
    m.def("place_expert", &place, py::arg("layout"), py::arg("index"), py::arg("gate").noconvert(),
          py::arg("up").noconvert(), py::arg("down").noconvert(), py::arg("out").noconvert(),
          "Copies one expert's packed matrices to its place.");
    m.def("experts_forward", &forward, py::arg("layout"), py::arg("packed").noconvert(),
          py::arg("x").noconvert(), py::arg("ids").noconvert(), py::arg("weights").noconvert(),
          py::arg("compute"), py::arg("out").noconvert(), "The weighted sum of a token's experts.");
}

}  // namespace quernstone::bind
