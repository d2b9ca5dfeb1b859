#include <cmath>
#include <limits>
#include <stdexcept>
#include <vector>

#include "attention/attention.h"
#include "bind/bind.h"
#include "bind/torch_shim.h"
#include "common/pages.h"
#include "common/parallel.h"

namespace quernstone::bind {
namespace {

using attention::ForwardArgs;
using attention::Kind;
using shim::Boxed;
using shim::Tensor;

#define QS_ATTENTION_ARGUMENTS                                                   \
    "(Tensor q, Tensor k, Tensor v, str kind=\"sink\", Tensor? sinks=None, "     \
    "Tensor? gate=None, bool causal=True, int? window=None, float? scale=None, " \
    "Tensor? key_start=None, Tensor? key_lengths=None"

constexpr const char* kSchema = "sink_attention" QS_ATTENTION_ARGUMENTS ") -> Tensor";
constexpr const char* kAuxSchema =
    "sink_attention_aux" QS_ATTENTION_ARGUMENTS
    ", Tensor? token_mask=None) -> (Tensor out, Tensor lse, Tensor importance)";

struct Call {
    explicit Call(const Boxed* s, bool aux)
        : q(reinterpret_cast<shim::Handle>(s[0])),
          k(reinterpret_cast<shim::Handle>(s[1])),
          v(reinterpret_cast<shim::Handle>(s[2])),
          sinks(shim::take_optional_tensor(s[4])),
          gate(shim::take_optional_tensor(s[5])),
          key_start(shim::take_optional_tensor(s[9])),
          key_lengths(shim::take_optional_tensor(s[10])),
          causal(shim::unbox<bool>(s[6])),
          window(shim::take_optional(s[7])),
          scale(shim::take_optional(s[8])) {
        if (aux) {
            token_mask = shim::take_optional_tensor(s[11]);
        }
        kind = shim::take_string(s[3]);
    }

    Tensor q, k, v;
    std::optional<Tensor> sinks, gate, key_start, key_lengths, token_mask;
    bool causal;
    std::optional<Boxed> window, scale;
    std::string kind;
};

[[noreturn]] void refuse(const char* what, const char* got, const char* want) {
    raise(invalid(what, got, want));
    throw std::logic_error("unreachable");
}

Kind parse_kind(const std::string& kind) {
    if (kind == "sink") {
        return Kind::kSink;
    }
    if (kind == "vanilla") {
        return Kind::kVanilla;
    }
    if (kind == "gated") {
        return Kind::kGated;
    }
    refuse("kind", kind.c_str(), "'sink', 'vanilla' or 'gated'");
}

// Names of one argument in messages.
struct Name {
    const char *device, *ndim, *dtype;
};
#define QS_NAME(x) Name{x ".device", x ".ndim", x ".dtype"}

void expect(const Tensor& x, const Name& name, std::int64_t ndim, const char* besides = "") {
    if (!x.on_cpu()) {
        refuse(name.device, "another device", "cpu");
    }
    if (x.ndim() != ndim) {
        raise(invalid(name.ndim, x.ndim(), besides, ndim));
    }
}

void expect_dtype(const Tensor& x, const Name& name, std::int32_t want) {
    if (x.dtype() != want) {
        refuse(name.dtype, shim::dtype_name(x.dtype()), shim::dtype_name(want));
    }
}

template <class T, int N>
View<T, N> view(const Tensor& x) {
    View<T, N> out;
    out.data = static_cast<T*>(x.data());
    const std::int64_t* shape = x.shape();
    const std::int64_t* strides = x.strides();
    for (std::size_t i = 0; i < N; ++i) {
        out.extent[i] = shape[i];
        out.stride[i] = strides[i];
    }
    if (out.data == nullptr) {
        out.data = reinterpret_cast<T*>(alignof(T));  // an empty tensor is present all the same
    }
    return out;
}

// The numbers of a vector, unless it has another length than it should: then
// nothing is copied, and forward() names the length.
std::vector<float> to_float(const Tensor& x, std::int64_t want) {
    const std::int64_t n = x.shape()[0] == want ? want : 0;
    const std::int64_t stride = x.strides()[0];
    std::vector<float> out(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
        if (x.dtype() == shim::dtype::kFloat32) {
            out[static_cast<std::size_t>(i)] = static_cast<const float*>(x.data())[i * stride];
        } else {
            const auto bits = static_cast<const std::uint16_t*>(x.data())[i * stride];
            out[static_cast<std::size_t>(i)] = shim::unbox<float>(Boxed{bits} << 16);
        }
    }
    return out;
}

std::vector<std::int64_t> to_int64(const Tensor& x, const Name& name, std::int64_t want) {
    expect(x, name, 1);
    if (x.dtype() != shim::dtype::kInt32 && x.dtype() != shim::dtype::kInt64) {
        refuse(name.dtype, shim::dtype_name(x.dtype()), "torch.int64 or torch.int32");
    }
    const std::int64_t n = x.shape()[0] == want ? want : 0;
    const std::int64_t stride = x.strides()[0];
    std::vector<std::int64_t> out(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) {
        out[static_cast<std::size_t>(i)] =
            x.dtype() == shim::dtype::kInt64
                ? static_cast<const std::int64_t*>(x.data())[i * stride]
                : static_cast<const std::int32_t*>(x.data())[i * stride];
    }
    return out;
}

template <class T>
View<const T, 1> view(const std::vector<T>& copy, const Tensor& x) {
    const T* data = copy.empty() ? reinterpret_cast<const T*>(alignof(T)) : copy.data();
    return {data, {x.shape()[0]}, {1}};
}

template <class T>
void forward(const Call& call, Tensor& out, Tensor* lse, Tensor* importance) {
    ForwardArgs<T> args;
    args.q = view<const T, 4>(call.q);
    args.k = view<const T, 4>(call.k);
    args.v = view<const T, 4>(call.v);
    args.kind = parse_kind(call.kind);
    args.causal = call.causal;
    if (call.window) {
        args.window = shim::unbox<std::int64_t>(*call.window);
        if (args.window < 1) {
            raise(invalid("window", args.window, "at least 1"));
        }
    }
    const double scale = call.scale ? shim::unbox<double>(*call.scale)
                                    : 1.0 / std::sqrt(static_cast<double>(args.q.extent[3]));
    if (call.scale && std::fabs(scale) > double{std::numeric_limits<float>::max()}) {
        refuse("scale", std::to_string(scale).c_str(), "a finite number that fp32 holds");
    }
    args.scale = static_cast<float>(scale);
    std::vector<float> sinks;
    if (call.sinks) {
        expect(*call.sinks, QS_NAME("sinks"), 1);
        if (call.sinks->dtype() != shim::dtype::kFloat32) {
            expect_dtype(*call.sinks, QS_NAME("sinks"), call.q.dtype());
        }
        sinks = to_float(*call.sinks, args.q.extent[1]);
        args.sinks = view(sinks, *call.sinks);
    }
    if (call.gate) {
        const Tensor& gate = *call.gate;
        if (gate.ndim() != 3) {
            expect(gate, QS_NAME("gate"), 4, "3 or");
        } else {
            expect(gate, QS_NAME("gate"), 3);
        }
        expect_dtype(gate, QS_NAME("gate"), call.q.dtype());
        if (gate.ndim() == 4) {
            args.gate = view<const T, 4>(gate);
            if (args.gate.extent[3] != args.q.extent[3]) {
                raise(invalid("gate.shape[3] (head width)", args.gate.extent[3],
                              "q.shape[3] =", args.q.extent[3]));
            }
        } else {
            const auto rows = view<const T, 3>(gate);
            args.gate = {rows.data,
                         {rows.extent[0], rows.extent[1], rows.extent[2], 1},
                         {rows.stride[0], rows.stride[1], rows.stride[2], 0}};
        }
    }
    std::vector<std::int64_t> start;
    std::vector<std::int64_t> lengths;
    if (call.key_start) {
        start = to_int64(*call.key_start, QS_NAME("key_start"), args.q.extent[0]);
        args.key_start = view(start, *call.key_start);
    }
    if (call.key_lengths) {
        lengths = to_int64(*call.key_lengths, QS_NAME("key_lengths"), args.q.extent[0]);
        args.key_lengths = view(lengths, *call.key_lengths);
    }
    if (call.token_mask) {
        expect(*call.token_mask, QS_NAME("token_mask"), 2);
        expect_dtype(*call.token_mask, QS_NAME("token_mask"), shim::dtype::kBool);
        args.token_mask = view<const std::uint8_t, 2>(*call.token_mask);
    }
    out = shim::empty(4, args.q.extent.data(), call.q.dtype());
    args.out = view<T, 4>(out);
    const auto& n = args.out.extent;
    prefer_huge_pages(args.out.data,
                      static_cast<std::size_t>(n[0] * n[1] * n[2] * n[3]) * sizeof(T));
    if (lse != nullptr) {
        *lse = shim::empty(3, args.q.extent.data(), shim::dtype::kFloat32);
        *importance = shim::empty(1, &args.q.extent[1], shim::dtype::kFloat32);
        args.lse = view<float, 3>(*lse);
        args.importance = view<float, 1>(*importance);
    }
    const Status status = attention::forward(args, num_threads());
    if (!status.ok()) {
        raise(status);
    }
}

void dispatch(const Call& call, Tensor& out, Tensor* lse, Tensor* importance) {
    expect(call.q, QS_NAME("q"), 4);
    expect(call.k, QS_NAME("k"), 4);
    expect(call.v, QS_NAME("v"), 4);
    const std::int32_t dtype = call.q.dtype();
    if (dtype != shim::dtype::kFloat32 && dtype != shim::dtype::kBFloat16) {
        refuse("q.dtype", shim::dtype_name(dtype), "torch.float32 or torch.bfloat16");
    }
    expect_dtype(call.k, QS_NAME("k"), dtype);
    expect_dtype(call.v, QS_NAME("v"), dtype);
    if (dtype == shim::dtype::kFloat32) {
        forward<float>(call, out, lse, importance);
    } else {
        forward<bf16>(call, out, lse, importance);
    }
}

void sink_attention(Boxed* stack, std::uint64_t, std::uint64_t) {
    const Call call(stack, false);
    Tensor out;
    dispatch(call, out, nullptr, nullptr);
    stack[0] = out.release();
}

void sink_attention_aux(Boxed* stack, std::uint64_t, std::uint64_t) {
    const Call call(stack, true);
    Tensor out;
    Tensor lse;
    Tensor importance;
    dispatch(call, out, &lse, &importance);
    stack[0] = out.release();
    stack[1] = lse.release();
    stack[2] = importance.release();
}

}  // namespace

void register_attention(pybind11::module_& core) {
    shim::define(kSchema);
    shim::define(kAuxSchema);
    shim::implement_cpu("sink_attention", sink_attention);
    shim::implement_cpu("sink_attention_aux", sink_attention_aux);
    auto m = core.def_submodule("attention", "Attention on the CPU.");
    m.def("last_forward_seconds", &attention::last_forward_seconds,
          "Seconds that the last forward pass on this thread spent in the kernel.");
}

}  // namespace quernstone::bind
