#include <cstring>
#include <vector>

#include "bind/torch_view.h"
#include "common/bf16.h"
#include "common/parallel.h"
#include "moe/experts.h"

// quernstone::moe_experts: what Experts computes, without Python between a model and the kernel.
namespace quernstone::bind {
namespace {

using shim::Boxed;
using shim::Tensor;

constexpr const char* kSchema =
    "moe_experts(Tensor x, Tensor ids, Tensor weights, Tensor packed, Tensor settings) -> Tensor";

// [6] int64: one tensor, since every argument of an operator costs a call a fraction of a us.
namespace setting {
enum : std::size_t { kFormat, kHidden, kIntermediate, kGroup, kZeroPoints, kCompute, kCount };
}

float widen(bf16 x) noexcept {
    const std::uint32_t bits = std::uint32_t{x.bits} << 16;
    float wide = 0.0F;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// To the nearest, ties to even; NaN stays one.
bf16 narrow(float x) noexcept {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffU) > 0x7f800000U) {
        return {static_cast<std::uint16_t>((bits >> 16) | 0x40U)};
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
}

// Its numbers are read from the first on.
void expect_run(const Tensor& x, const char* what) {
    if (x.shape()[0] > 1 && x.strides()[0] != 1) {
        raise(invalid(what, "a strided tensor", "a contiguous one"));
    }
}

void experts(Boxed* stack, std::uint64_t, std::uint64_t) {
    const auto tensor = [stack](int i) { return Tensor(reinterpret_cast<shim::Handle>(stack[i])); };
    const Tensor x = tensor(0), ids = tensor(1), weights = tensor(2), packed = tensor(3),
                 settings = tensor(4);
    expect(x, "x.device", "x.ndim", 2);
    expect(ids, "ids.device", "ids.ndim", 2);
    expect(weights, "weights.device", "weights.ndim", 2);
    expect(packed, "packed.device", "packed.ndim", 1);
    expect(settings, "settings.device", "settings.ndim", 1);
    expect_dtype(packed, "packed.dtype", shim::dtype::kUInt8);
    expect_run(packed, "packed");
    expect_dtype(settings, "settings.dtype", shim::dtype::kInt64);
    expect_run(settings, "settings");
    if (settings.shape()[0] != setting::kCount) {
        raise(invalid("settings.shape[0]", settings.shape()[0], "", setting::kCount));
    }
    expect_dtype(ids, "ids.dtype", shim::dtype::kInt64);
    expect_dtype(weights, "weights.dtype", shim::dtype::kFloat32);
    const bool narrowed = x.dtype() == shim::dtype::kBFloat16;
    if (!narrowed) {
        expect_dtype(x, "x.dtype", shim::dtype::kFloat32);
    }
    const auto* given = static_cast<const std::int64_t*>(settings.data());
    const std::int64_t format = given[setting::kFormat];
    if (format < 0 || format > static_cast<std::int64_t>(gemm::Format::kInt4)) {
        raise(invalid("format", format, "0 to 2"));
    }
    moe::Experts of{static_cast<gemm::Format>(format),
                    1,
                    given[setting::kHidden],
                    given[setting::kIntermediate],
                    given[setting::kGroup],
                    given[setting::kZeroPoints] != 0};
    raise(moe::check(of));
    of.data = static_cast<const std::byte*>(packed.data());
    of.count = packed.shape()[0] / of.expert_bytes();
    if (of.count < 1 || packed.shape()[0] % of.expert_bytes() != 0) {
        raise(invalid("packed.shape[0]", packed.shape()[0], "a multiple of", of.expert_bytes()));
    }
    if (reinterpret_cast<std::uintptr_t>(of.data) % gemm::kAlign != 0) {
        raise(invalid("packed", "memory that is not aligned", "64 bytes"));
    }
    const std::int64_t shape[] = {x.shape()[0], x.shape()[1]};
    Tensor out = shim::empty(2, shape, x.dtype());
    const std::int64_t how = given[setting::kCompute];
    if (how < 0 || how > static_cast<std::int64_t>(gemm::Compute::kMixed)) {
        raise(invalid("compute", how, "0 to 2"));
    }
    const auto compute = static_cast<gemm::Compute>(how);
    const auto id = matrix<const std::int64_t>(ids);
    const auto weight = matrix<const float>(weights);
    const std::int64_t tokens = shape[0], width = shape[1];
    if (!narrowed && (x.strides()[1] == 1 || width < 2)) {
        raise(moe::forward(of, {matrix<const float>(x), id, weight, matrix<float>(out), compute},
                           num_threads()));
        stack[0] = out.release();
        return;
    }
    thread_local std::vector<float> room;
    room.resize(static_cast<std::size_t>(2 * tokens * width));
    float* const wide = room.data();
    float* const found = wide + tokens * width;
    const auto widen_all = [&](const auto& from, const auto& number) {
        for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t i = 0; i < width; ++i) {
                wide[t * width + i] = number(*from.at(t, i));
            }
        }
    };
    if (narrowed) {
        widen_all(matrix<const bf16>(x), widen);
    } else {
        widen_all(matrix<const float>(x), [](float value) { return value; });
    }
    raise(moe::forward(of,
                       {{wide, {tokens, width}, {width, 1}},
                        id,
                        weight,
                        {found, {tokens, width}, {width, 1}},
                        compute},
                       num_threads()));
    for (std::int64_t i = 0; i < tokens * width; ++i) {
        if (narrowed) {
            static_cast<bf16*>(out.data())[i] = narrow(found[i]);
        } else {
            static_cast<float*>(out.data())[i] = found[i];
        }
    }
    if (room.size() > (std::size_t{1} << 20)) {
        room = {};
    }
    stack[0] = out.release();
}

}  // namespace

void register_moe_operator() {
    shim::define(kSchema);
    shim::implement_cpu("moe_experts", experts);
}

}  // namespace quernstone::bind
