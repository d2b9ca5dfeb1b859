#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "bind/packed.h"
#include "common/parallel.h"
#include "moe/decoder.h"

namespace py = pybind11;

namespace quernstone::bind {
namespace {

using MaybeArray = std::optional<Array<float>>;

// bf16 comes from torch as int16: numpy has no such type.
using Half = std::int16_t;

template <class T>
struct Stored {
    using type = T;
};
template <>
struct Stored<bf16> {
    using type = Half;
};

template <class T, int N>
View<T, N> wide_or_half(const py::array& array, const char* name) {
    using S = typename Stored<std::remove_const_t<T>>::type;
    if (!py::isinstance<Array<S>>(array)) {
        raise(invalid(name, "another dtype than q", "float32, or bf16 as int16, throughout"));
    }
    const auto typed = py::reinterpret_borrow<Array<S>>(array);
    if (!std::is_const_v<T> && !typed.writeable()) {
        raise(invalid(name, "a read-only array", "one that can be written"));
    }
    const auto from = view<S, N>(typed, name);
    return {reinterpret_cast<T*>(from.data), from.extent, from.stride};
}

// A layer with references to the arrays that it reads.
class DecoderLayer {
   public:
    DecoderLayer(std::int64_t heads, std::int64_t kv_heads, std::int64_t width,
                 const gemm::Layout& qkv_layout, const Array<std::uint8_t>& qkv,
                 const std::string& qkv_compute, const gemm::Layout& out_layout,
                 const Array<std::uint8_t>& out, const std::string& out_compute,
                 const Array<float>& norm_in, float eps_in, const Array<float>& norm_out,
                 float eps_out, const Array<float>& router, std::int64_t top_k, bool renormalize,
                 std::int64_t shared, const MaybeArray& shared_gate, const MaybeArray& qkv_bias,
                 const MaybeArray& out_bias, const MaybeArray& norm_q, const MaybeArray& norm_k,
                 float eps_heads)
        : kept_{{qkv, out, norm_in, norm_out, router}} {
        attention_.heads = heads;
        attention_.kv_heads = kv_heads;
        attention_.width = width;
        attention_.qkv = {qkv_layout, packed_bytes(qkv, qkv_layout.bytes(), "qkv")};
        attention_.out = {out_layout, packed_bytes(out, out_layout.bytes(), "out")};
        attention_.qkv_compute = parse_compute(qkv_compute);
        attention_.out_compute = parse_compute(out_compute);
        attention_.before = {row(norm_in, "norm_in"), eps_in};
        attention_.qkv_bias = maybe(qkv_bias, "qkv_bias");
        attention_.out_bias = maybe(out_bias, "out_bias");
        attention_.of_q = {maybe(norm_q, "norm_q"), eps_heads};
        attention_.of_k = {maybe(norm_k, "norm_k"), eps_heads};
        router_.before = {row(norm_out, "norm_out"), eps_out};
        router_.weight = rows_of<const float>(router, "router");
        router_.shared_gate = maybe(shared_gate, "shared_gate");
        router_.top_k = top_k;
        router_.shared = shared;
        router_.renormalize = renormalize;
    }

    void inputs(Array<float>& hidden, const MaybeArray& add, const Array<float>& cos,
                const Array<float>& sin, Array<float>& normed, Array<float>& projected,
                const py::array& q, const py::array& k, const py::array& v) const {
        if (py::isinstance<Array<float>>(q)) {
            inputs_of<float>(hidden, add, cos, sin, normed, projected, q, k, v);
        } else {
            inputs_of<bf16>(hidden, add, cos, sin, normed, projected, q, k, v);
        }
    }

    std::tuple<std::int64_t, std::int64_t, std::int64_t> outputs(
        const py::array& attended, Array<float>& joined, Array<float>& hidden, Array<float>& x,
        Array<std::int64_t>& ids, Array<float>& weights, std::optional<double> sensitivity,
        std::optional<double> threshold) const {
        moe::Router router = router_;
        if (sensitivity && threshold) {
            router.gated = true;
            router.sensitivity = *sensitivity;
            router.threshold = *threshold;
        }
        const auto run = [&](auto number) {
            using T = decltype(number);
            moe::OutputArgs<T> args{wide_or_half<const T, 3>(attended, "attended"),
                                    output<float, 2>(joined, "joined"),
                                    output<float, 2>(hidden, "hidden"),
                                    output<float, 2>(x, "x"),
                                    output<std::int64_t, 2>(ids, "ids"),
                                    output<float, 2>(weights, "weights")};
            moe::Counts counts;
            {
                const py::gil_scoped_release release;
                raise(moe::expert_inputs(attention_, router, args, counts, num_threads()));
            }
            return std::tuple{counts.tokens, counts.single, counts.active};
        };
        return py::isinstance<Array<float>>(attended) ? run(float{}) : run(bf16{});
    }

   private:
    template <class T>
    void inputs_of(Array<float>& hidden, const MaybeArray& add, const Array<float>& cos,
                   const Array<float>& sin, Array<float>& normed, Array<float>& projected,
                   const py::array& q, const py::array& k, const py::array& v) const {
        moe::InputArgs<T> args{
            output<float, 2>(hidden, "hidden"), {},
            rows_of<const float>(cos, "cos"),   rows_of<const float>(sin, "sin"),
            output<float, 2>(normed, "normed"), output<float, 2>(projected, "projected"),
            wide_or_half<T, 3>(q, "q"),         wide_or_half<T, 3>(k, "k"),
            wide_or_half<T, 3>(v, "v")};
        if (add) {
            args.add = rows_of<const float>(*add, "add");
        }
        const py::gil_scoped_release release;
        raise(moe::attention_inputs(attention_, args, num_threads()));
    }

    View<const float, 1> maybe(const MaybeArray& array, const char* name) {
        if (!array) {
            return {};
        }
        kept_.emplace_back(*array);
        return row(*array, name);
    }

    static View<const float, 1> row(const Array<float>& array, const char* name) {
        const auto out = view<const float, 1>(array, name);
        if (out.extent[0] > 1 && out.stride[0] != 1) {
            raise(invalid(name, "a strided array", "a contiguous one"));
        }
        return out;
    }

    std::vector<py::array> kept_;
    moe::Attention attention_;
    moe::Router router_;
};

void final_norm(const Array<float>& weight, float eps, const Array<float>& hidden,
                const MaybeArray& add, Array<float>& out) {
    const auto w = view<const float, 1>(weight, "weight");
    if (w.extent[0] > 1 && w.stride[0] != 1) {
        raise(invalid("weight", "a strided array", "a contiguous one"));
    }
    const auto from = rows_of<const float>(hidden, "hidden");
    const auto more = add ? rows_of<const float>(*add, "add") : View<const float, 2>{};
    const auto to = output<float, 2>(out, "out");
    const py::gil_scoped_release release;
    raise(moe::final_norm({w, eps}, from, more, to, num_threads()));
}

}  // namespace

void register_moe_decoder(py::module_& m) {
    py::class_<DecoderLayer>(m, "DecoderLayer",
                             "What a decoder layer does beside attention and its experts.")
        .def(py::init<std::int64_t, std::int64_t, std::int64_t, const gemm::Layout&,
                      const Array<std::uint8_t>&, const std::string&, const gemm::Layout&,
                      const Array<std::uint8_t>&, const std::string&, const Array<float>&, float,
                      const Array<float>&, float, const Array<float>&, std::int64_t, bool,
                      std::int64_t, const MaybeArray&, const MaybeArray&, const MaybeArray&,
                      const MaybeArray&, const MaybeArray&, float>(),
             py::kw_only(), py::arg("heads"), py::arg("kv_heads"), py::arg("width"),
             py::arg("qkv_layout"), py::arg("qkv").noconvert(), py::arg("qkv_compute"),
             py::arg("out_layout"), py::arg("out").noconvert(), py::arg("out_compute"),
             py::arg("norm_in").noconvert(), py::arg("eps_in"), py::arg("norm_out").noconvert(),
             py::arg("eps_out"), py::arg("router").noconvert(), py::arg("top_k"),
             py::arg("renormalize"), py::arg("shared") = 0, py::arg("shared_gate") = py::none(),
             py::arg("qkv_bias") = py::none(), py::arg("out_bias") = py::none(),
             py::arg("norm_q") = py::none(), py::arg("norm_k") = py::none(),
             py::arg("eps_heads") = 0.0F)
        .def("inputs", &DecoderLayer::inputs, py::arg("hidden").noconvert(),
             py::arg("add").noconvert(), py::arg("cos").noconvert(), py::arg("sin").noconvert(),
             py::arg("normed").noconvert(), py::arg("projected").noconvert(), py::arg("q"),
             py::arg("k"), py::arg("v"), "Queries, keys and values of a layer's input.")
        .def("outputs", &DecoderLayer::outputs, py::arg("attended"), py::arg("joined").noconvert(),
             py::arg("hidden").noconvert(), py::arg("x").noconvert(), py::arg("ids").noconvert(),
             py::arg("weights").noconvert(), py::arg("sensitivity") = py::none(),
             py::arg("threshold") = py::none(),
             "From what attention gives to what the experts take: tokens, those with one expert, "
             "experts.");
    m.def("final_norm", &final_norm, py::arg("weight").noconvert(), py::arg("eps"),
          py::arg("hidden").noconvert(), py::arg("add").noconvert(), py::arg("out").noconvert(),
          "RMS norm of the sum of hidden and add.");
}

}  // namespace quernstone::bind
