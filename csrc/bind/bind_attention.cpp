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
// What backward needs beside the inputs; gate_logit [b, h, t] is empty but for kind "vanilla".
constexpr const char* kTrainingSchema =
    "sink_attention_training" QS_ATTENTION_ARGUMENTS
    ", Tensor? token_mask=None) -> (Tensor out, Tensor lse, Tensor importance, Tensor gate_logit)";
constexpr const char* kBackwardSchema =
    "sink_attention_backward(Tensor dout, Tensor? dlse, Tensor? dimportance, Tensor out, "
    "Tensor lse, Tensor? gate_logit, Tensor q, Tensor k, Tensor v, str kind, Tensor? sinks, "
    "Tensor? gate, bool causal, int? window, float? scale, Tensor? key_start, "
    "Tensor? key_lengths, Tensor? token_mask) -> (Tensor dq, Tensor dk, Tensor dv, "
    "Tensor dsinks, Tensor dgate)";

struct Call {
    enum Form : std::uint8_t { kPlain, kAux };

    explicit Call(const Boxed* s, Form form)
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
        if (form != kPlain) {
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

// [b, h, t, 1 or d] of a gate [b, h, t] or [b, h, t, d]
template <class T>
View<T, 4> gate_view(const Tensor& gate) {
    if (gate.ndim() == 4) {
        return view<T, 4>(gate);
    }
    const auto rows = view<T, 3>(gate);
    return {rows.data,
            {rows.extent[0], rows.extent[1], rows.extent[2], 1},
            {rows.stride[0], rows.stride[1], rows.stride[2], 0}};
}

// The arguments that forward and backward share, and what their views point to.
template <class T>
struct Prepared {
    ForwardArgs<T> args;
    std::vector<float> sinks;
    std::vector<std::int64_t> start, lengths;
};

template <class T>
void prepare(const Call& call, Prepared<T>& to) {
    ForwardArgs<T>& args = to.args;
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
    if (call.sinks) {
        expect(*call.sinks, QS_NAME("sinks"), 1);
        if (call.sinks->dtype() != shim::dtype::kFloat32) {
            expect_dtype(*call.sinks, QS_NAME("sinks"), call.q.dtype());
        }
        to.sinks = to_float(*call.sinks, args.q.extent[1]);
        args.sinks = view(to.sinks, *call.sinks);
    }
    if (call.gate) {
        const Tensor& gate = *call.gate;
        if (gate.ndim() != 3) {
            expect(gate, QS_NAME("gate"), 4, "3 or");
        } else {
            expect(gate, QS_NAME("gate"), 3);
        }
        expect_dtype(gate, QS_NAME("gate"), call.q.dtype());
        args.gate = gate_view<const T>(gate);
        if (gate.ndim() == 4 && args.gate.extent[3] != args.q.extent[3]) {
            raise(invalid("gate.shape[3] (head width)", args.gate.extent[3],
                          "q.shape[3] =", args.q.extent[3]));
        }
    }
    if (call.key_start) {
        to.start = to_int64(*call.key_start, QS_NAME("key_start"), args.q.extent[0]);
        args.key_start = view(to.start, *call.key_start);
    }
    if (call.key_lengths) {
        to.lengths = to_int64(*call.key_lengths, QS_NAME("key_lengths"), args.q.extent[0]);
        args.key_lengths = view(to.lengths, *call.key_lengths);
    }
    if (call.token_mask) {
        expect(*call.token_mask, QS_NAME("token_mask"), 2);
        expect_dtype(*call.token_mask, QS_NAME("token_mask"), shim::dtype::kBool);
        args.token_mask = view<const std::uint8_t, 2>(*call.token_mask);
    }
}

// Contiguous, with the shape of a view.
template <class T, int N>
Tensor empty(const std::array<std::int64_t, N>& extent, std::int32_t dtype, View<T, N>& to) {
    Tensor out = shim::empty(N, extent.data(), dtype);
    to = view<T, N>(out);
    std::size_t bytes = sizeof(T);
    for (const std::int64_t n : extent) {
        bytes *= static_cast<std::size_t>(n);
    }
    prefer_huge_pages(to.data, bytes);
    return out;
}

void check_status(const Status& status) {
    if (!status.ok()) {
        raise(status);
    }
}

struct Outputs {
    Tensor out, lse, importance, gate_logit;
};

enum class Depth : std::uint8_t { kPlain, kAux, kTraining };

template <class T>
void forward(const Call& call, Outputs& to, Depth depth) {
    Prepared<T> prepared;
    prepare(call, prepared);
    ForwardArgs<T>& args = prepared.args;
    to.out = empty<T, 4>(args.q.extent, call.q.dtype(), args.out);
    const auto& n = args.q.extent;
    if (depth != Depth::kPlain) {
        to.lse = empty<float, 3>({n[0], n[1], n[2]}, shim::dtype::kFloat32, args.lse);
        to.importance = empty<float, 1>({n[1]}, shim::dtype::kFloat32, args.importance);
    }
    if (depth == Depth::kTraining) {
        const bool vanilla = args.kind == Kind::kVanilla;
        View<float, 3> logit;
        to.gate_logit =
            empty<float, 3>({vanilla ? n[0] : 0, n[1], n[2]}, shim::dtype::kFloat32, logit);
        args.gate_logit = vanilla ? logit : View<float, 3>{};
    }
    check_status(attention::forward(args, num_threads()));
}

void check_inputs(const Call& call) {
    expect(call.q, QS_NAME("q"), 4);
    expect(call.k, QS_NAME("k"), 4);
    expect(call.v, QS_NAME("v"), 4);
    const std::int32_t dtype = call.q.dtype();
    if (dtype != shim::dtype::kFloat32 && dtype != shim::dtype::kBFloat16) {
        refuse("q.dtype", shim::dtype_name(dtype), "torch.float32 or torch.bfloat16");
    }
    expect_dtype(call.k, QS_NAME("k"), dtype);
    expect_dtype(call.v, QS_NAME("v"), dtype);
}

void forward(const Call& call, Outputs& to, Depth depth) {
    check_inputs(call);
    if (call.q.dtype() == shim::dtype::kFloat32) {
        forward<float>(call, to, depth);
    } else {
        forward<bf16>(call, to, depth);
    }
}

void sink_attention(Boxed* stack, std::uint64_t, std::uint64_t) {
    const Call call(stack, Call::kPlain);
    Outputs to;
    forward(call, to, Depth::kPlain);
    stack[0] = to.out.release();
}

void sink_attention_aux(Boxed* stack, std::uint64_t, std::uint64_t) {
    const Call call(stack, Call::kAux);
    Outputs to;
    forward(call, to, Depth::kAux);
    stack[0] = to.out.release();
    stack[1] = to.lse.release();
    stack[2] = to.importance.release();
}

void sink_attention_training(Boxed* stack, std::uint64_t, std::uint64_t) {
    const Call call(stack, Call::kAux);
    Outputs to;
    forward(call, to, Depth::kTraining);
    stack[0] = to.out.release();
    stack[1] = to.lse.release();
    stack[2] = to.importance.release();
    stack[3] = to.gate_logit.release();
}

// The saved and incoming tensors of a backward call.
struct Incoming {
    explicit Incoming(const Boxed* s)
        : dout(reinterpret_cast<shim::Handle>(s[0])),
          out(reinterpret_cast<shim::Handle>(s[3])),
          lse(reinterpret_cast<shim::Handle>(s[4])),
          dlse(shim::take_optional_tensor(s[1])),
          dimportance(shim::take_optional_tensor(s[2])),
          gate_logit(shim::take_optional_tensor(s[5])) {}

    Tensor dout, out, lse;
    std::optional<Tensor> dlse, dimportance, gate_logit;
};

struct Gradients {
    Tensor dq, dk, dv, dsinks, dgate;
};

template <std::size_t N>
void expect_shape(const std::array<std::int64_t, N>& got, const std::array<std::int64_t, N>& want,
                  const char* what) {
    for (std::size_t i = 0; i < N; ++i) {
        if (got[i] != want[i]) {
            raise(invalid(what, got[i], "the extent in the forward pass,", want[i]));
        }
    }
}

template <int N>
View<const float, N> float_view(const Tensor& x, const Name& name, const char* shape,
                                const std::array<std::int64_t, N>& want) {
    expect(x, name, N);
    expect_dtype(x, name, shim::dtype::kFloat32);
    const auto out = view<const float, N>(x);
    expect_shape(out.extent, want, shape);
    return out;
}

template <class T>
void backward(const Call& call, const Incoming& in, Gradients& to) {
    Prepared<T> prepared;
    prepare(call, prepared);
    attention::BackwardArgs<T> args;
    args.forward = prepared.args;
    ForwardArgs<T>& f = args.forward;
    const std::int32_t dtype = call.q.dtype();
    expect(in.dout, QS_NAME("dout"), 4);
    expect_dtype(in.dout, QS_NAME("dout"), dtype);
    args.dout = view<const T, 4>(in.dout);
    expect_shape(args.dout.extent, f.q.extent, "dout.shape");
    expect(in.out, QS_NAME("out"), 4);
    expect_dtype(in.out, QS_NAME("out"), dtype);
    f.out = view<T, 4>(in.out);
    expect_shape(f.out.extent, f.q.extent, "out.shape");
    const std::array<std::int64_t, 3> bht{f.q.extent[0], f.q.extent[1], f.q.extent[2]};
    const auto mutable_view = [](const auto& x) {
        return View<float, 3>{const_cast<float*>(x.data), x.extent, x.stride};
    };
    f.lse = mutable_view(float_view<3>(in.lse, QS_NAME("lse"), "lse.shape", bht));
    if (in.dlse) {
        args.dlse = float_view<3>(*in.dlse, QS_NAME("dlse"), "dlse.shape", bht);
    }
    if (in.dimportance) {
        args.dimportance = float_view<1>(*in.dimportance, QS_NAME("dimportance"),
                                         "dimportance.shape", {f.q.extent[1]});
        if (f.kind == Kind::kVanilla) {
            if (!in.gate_logit) {
                refuse("gate_logit", "None", "the gate_logit of sink_attention_training");
            }
            f.gate_logit = mutable_view(
                float_view<3>(*in.gate_logit, QS_NAME("gate_logit"), "gate_logit.shape", bht));
        }
    }
    to.dq = empty<T, 4>(f.q.extent, dtype, args.dq);
    to.dk = empty<T, 4>(f.k.extent, dtype, args.dk);
    to.dv = empty<T, 4>(f.v.extent, dtype, args.dv);
    View<float, 1> dsinks;
    to.dsinks =
        empty<float, 1>({f.kind == Kind::kSink ? f.q.extent[1] : 0}, shim::dtype::kFloat32, dsinks);
    if (f.kind == Kind::kSink) {
        args.dsinks = dsinks;
    }
    if (f.kind == Kind::kGated) {
        to.dgate = shim::empty(call.gate->ndim(), call.gate->shape(), dtype);
        args.dgate = gate_view<T>(to.dgate);
    } else {
        View<T, 1> none;
        to.dgate = empty<T, 1>({0}, dtype, none);
    }
    check_status(attention::backward(args, num_threads()));
}

void sink_attention_backward(Boxed* stack, std::uint64_t, std::uint64_t) {
    const Incoming in(stack);
    // The other arguments stand in the order of the forward pass.
    const Call call(stack + 6, Call::kAux);
    check_inputs(call);
    Gradients to;
    if (call.q.dtype() == shim::dtype::kFloat32) {
        backward<float>(call, in, to);
    } else {
        backward<bf16>(call, in, to);
    }
    stack[0] = to.dq.release();
    stack[1] = to.dk.release();
    stack[2] = to.dv.release();
    stack[3] = to.dsinks.release();
    stack[4] = to.dgate.release();
}

}  // namespace

void register_attention(pybind11::module_& core) {
    shim::define(kSchema);
    shim::define(kAuxSchema);
    shim::define(kTrainingSchema);
    shim::define(kBackwardSchema);
    shim::implement_cpu("sink_attention", sink_attention);
    shim::implement_cpu("sink_attention_aux", sink_attention_aux);
    shim::implement_cpu("sink_attention_training", sink_attention_training);
    shim::implement_cpu("sink_attention_backward", sink_attention_backward);
    auto m = core.def_submodule("attention", "Attention on the CPU.");
    m.def("last_forward_seconds", &attention::last_forward_seconds,
          "Seconds that the last forward pass on this thread spent in the kernel.");
}

}  // namespace quernstone::bind
