// The CUDA kernels of experts under the emulator, beside the CPU's, in memory of just their size.
//
// Axes: p experts, a assignments sorted by expert, t tokens, m hidden width, f feed-forward width.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "check.h"
#include "emulator.h"
#include "experts.h"
#include "moe/experts.h"

namespace {

using emulation::Order;
using quernstone::View;
using quernstone::gemm::Format;
using quernstone::gemm::Layout;
using quernstone::moe::Experts;
using quernstone::moe::ForwardArgs;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Bytes = std::unique_ptr<std::byte, Free>;

Bytes bytes(std::int64_t size) {
    return Bytes(static_cast<std::byte*>(
        ::operator new(static_cast<std::size_t>(size), std::align_val_t{64})));
}

Bytes packed(const Layout& layout, std::mt19937& engine) {
    const bool int4 = layout.format == Format::kInt4;
    const std::int64_t groups = int4 ? layout.padded_inputs() / layout.group : 1;
    std::vector<std::int8_t> codes(static_cast<std::size_t>(layout.rows * layout.inputs));
    std::vector<float> scales(static_cast<std::size_t>(layout.rows * groups));
    std::vector<std::uint8_t> zeros(layout.zero_points ? scales.size() : 0);
    std::uniform_int_distribution<int> code(int4 ? 0 : -127, int4 ? 15 : 127);
    std::uniform_real_distribution<float> scale(0.001F, 0.01F);
    for (std::int8_t& one : codes) {
        one = static_cast<std::int8_t>(code(engine));
    }
    for (float& one : scales) {
        one = scale(engine);
    }
    for (std::uint8_t& one : zeros) {
        one = static_cast<std::uint8_t>(code(engine));
    }
    Bytes to = bytes(layout.bytes());
    quernstone::gemm::Codes from{{codes.data(), {layout.rows, layout.inputs}, {layout.inputs, 1}},
                                 {scales.data(), {layout.rows, groups}, {groups, 1}},
                                 {}};
    if (layout.zero_points) {
        from.zero_points = {zeros.data(), {layout.rows, groups}, {groups, 1}};
    }
    CHECK(quernstone::gemm::pack(layout, from, to.get()).ok());
    return to;
}

struct Shape {
    std::int64_t m, f;
    Format format;
    std::int64_t group = 0;
    bool zero_points = false;
};

// Every expert has some tokens; the last has `most`.
void compare(const Shape& shape, std::int32_t most) {
    std::mt19937 engine(1);
    Experts experts{shape.format, 2, shape.m, shape.f, shape.group, shape.zero_points};
    const Bytes data = bytes(experts.bytes());
    for (std::int64_t e = 0; e < experts.count; ++e) {
        const Bytes gate = packed(experts.gate(), engine);
        const Bytes up = packed(experts.gate(), engine);
        const Bytes down = packed(experts.down(), engine);
        place(experts, gate.get(), up.get(), down.get(), data.get() + e * experts.expert_bytes());
    }
    experts.data = data.get();
    const std::vector<std::int32_t> begins{0, 1, 1 + most};
    const std::int64_t a = 1 + most;
    std::vector<float> x(static_cast<std::size_t>(a * shape.m));
    std::normal_distribution<float> normal;
    for (float& one : x) {
        one = normal(engine);
    }
    std::vector<std::int32_t> tokens;
    std::vector<std::int64_t> ids, offsets{0, experts.expert_bytes()};
    for (std::int32_t i = 0; i < a; ++i) {
        tokens.push_back(i);
        ids.push_back(i == 0 ? 0 : 1);
    }
    const std::vector<float> ones(static_cast<std::size_t>(a), 1.0F);
    std::vector<float> want(x.size(), kNan);
    ForwardArgs args;
    args.x = {x.data(), {a, shape.m}, {shape.m, 1}};
    args.ids = {ids.data(), {a, 1}, {1, 1}};
    args.weights = {ones.data(), {a, 1}, {1, 1}};
    args.out = {want.data(), {a, shape.m}, {shape.m, 1}};
    args.compute = quernstone::gemm::Compute::kInt8;
    CHECK(forward(experts, args, 1).ok());

    for (const emulation::Schedule& schedule :
         {emulation::Schedule{}, emulation::Schedule{Order::kDescending, 0, 0x11},
          emulation::Schedule{Order::kShuffled, 7, 0x3c}}) {
        std::vector<float> out(x.size(), kNan);
        QsExperts call{};
        call.data = data.get();
        call.offsets = offsets.data();
        call.begins = begins.data();
        call.tokens = tokens.data();
        call.x = x.data();
        call.out = out.data();
        call.p = 2;
        call.a = call.t = a;
        call.m = shape.m;
        call.f = shape.f;
        call.most = most;
        call.format = shape.format == Format::kInt4 ? QS_INT4 : QS_INT8;
        call.group = static_cast<std::int32_t>(shape.group);
        call.zero_points = shape.zero_points ? 1 : 0;
        const Bytes scratch = bytes(qs_experts_scratch(&call));
        std::memset(scratch.get(), 0xff, static_cast<std::size_t>(qs_experts_scratch(&call)));
        call.scratch = scratch.get();
        emulation::set_schedule(schedule);
        CHECK(qs_experts_gate_up(&call, nullptr) == nullptr);
        CHECK(qs_experts_down(&call, nullptr) == nullptr);
        emulation::set_schedule({});
        CHECK(out == want);
    }
}

TEST(cuda_experts_under_the_emulator_have_the_bits_of_the_cpu_in_int4) {
    compare({32, 32, Format::kInt4, 32}, 1);
    compare({33, 47, Format::kInt4, 32, true}, 2);
    compare({130, 17, Format::kInt4, 64, true}, 3);
    compare({20, 1060, Format::kInt4, 128}, 5);
    compare({1060, 15, Format::kInt4, 32, true}, 1);
}

TEST(cuda_experts_under_the_emulator_have_the_bits_of_the_cpu_in_int8) {
    compare({32, 32, Format::kInt8}, 1);
    compare({33, 47, Format::kInt8}, 5);
    compare({1060, 15, Format::kInt8}, 2);
}

TEST(cuda_experts_in_a_format_that_they_have_not_say_so) {
    QsExperts call{};
    call.format = 16;
    call.p = call.a = call.t = call.m = call.f = call.most = 1;
    CHECK(qs_experts_gate_up(&call, nullptr) != nullptr);
    CHECK(qs_experts_down(&call, nullptr) != nullptr);
}

}  // namespace
