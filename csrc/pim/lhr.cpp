#include "pim/lhr.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>

#include "common/cpu.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "pim/lhr_kernel.h"

namespace quernstone::pim::lhr {
namespace {

// Weights of a task: sums of blocks are added in order, whoever made them.
constexpr std::int64_t kBlock = 8192;
// Gradients beyond this leave the caches before anybody reads them.
constexpr std::int64_t kStreamed = std::int64_t{4} << 20;
constexpr std::int64_t kAlign = 64;

const Kernels& active_kernels() noexcept {
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kBaseline:
            return baseline::kKernels;
        case Isa::kAvx2:
            return avx2::kKernels;
        case Isa::kAvx512:
        case Isa::kAvx512Bf16Vnni:
        case Isa::kAvx512Amx:
            return avx512::kKernels;
    }
#endif
    return baseline::kKernels;
}

template <class T>
Status contiguous(const View<T, 2>& x, const char* what) noexcept {
    const bool is =
        (x.stride[1] == 1 || x.extent[1] <= 1) && (x.stride[0] == x.extent[1] || x.extent[0] <= 1);
    return is ? Status{} : invalid(what, "strides", "a contiguous array");
}

Status check(const Layer& layer) noexcept {
    const auto [n, k] = layer.weight.extent;
    if (layer.bits < kMinBits || layer.bits > kMaxBits) {
        return invalid("bits", layer.bits, "2 to 16");
    }
    const int highest = (1 << (layer.bits - 1)) - 1;
    if (layer.shift < -highest || layer.shift > highest) {
        return invalid("shift", layer.shift, "at most, in magnitude,", highest);
    }
    QS_TRY(contiguous(layer.weight, "weight"));
    QS_TRY(contiguous(layer.scales, "scales"));
    if (n * k == 0) {
        return invalid("weight: elements", n * k, "at least 1");
    }
    if (layer.group < 1 || layer.group > k) {
        return invalid("group", layer.group, "1 to the weights of a channel,", k);
    }
    if (layer.scales.extent[0] != 1) {
        QS_TRY(same("scales.shape[0]", layer.scales.extent[0], "1 or", n));
    }
    QS_TRY(
        same("scales.shape[1]", layer.scales.extent[1], "", (k + layer.group - 1) / layer.group));
    const float* scales = layer.scales.data;
    const std::int64_t count = layer.scales.extent[0] * layer.scales.extent[1];
    for (std::int64_t i = 0; i < count; ++i) {
        if (!(scales[i] > 0.0F) || !std::isfinite(scales[i]) || !std::isfinite(1.0F / scales[i])) {
            return invalid("scales",
                           "a number that is not finite and positive, or so small that "
                           "its inverse is not",
                           "none");
        }
    }
    return {};
}

// -3 where all four are set: beyond them the ones of `step_high` count.
void fill_tables(Problem& p) noexcept {
    const auto ones = [&](int code) {
        return static_cast<float>(std::popcount(static_cast<std::uint32_t>(code & p.mask)));
    };
    const bool one_nibble = p.mask <= 15;
    for (int i = 0; i < 16; ++i) {
        const auto at = static_cast<std::size_t>(i);
        p.ones_low[at] = ones(i);
        p.ones_high[at] = ones(16 * i);
        p.step_low[at] = i == 15 && !one_nibble ? -3.0F : ones(i + 1) - ones(i);
        p.step_high[at] = one_nibble ? 0.0F : ones(16 * i + 16) - ones(16 * i + 15) + 3.0F;
    }
}

Problem problem_of(const Layer& layer) noexcept {
    const auto [n, k] = layer.weight.extent;
    // One scale for all is one run.
    const bool single = layer.scales.extent[0] * layer.scales.extent[1] == 1;
    Problem p{};
    p.weight = layer.weight.data;
    p.scales = layer.scales.data;
    p.width = single ? n * k : k;
    p.group = single ? n * k : layer.group;
    p.scale_stride = layer.scales.extent[0] == 1 ? 0 : layer.scales.extent[1];
    p.high = static_cast<float>((1 << (layer.bits - 1)) - 1);
    p.low = -p.high - 1.0F;
    p.mask = (1 << layer.bits) - 1;
    p.shift = static_cast<float>(layer.shift);
    // Twice what the roundings of code * scale * (1 / scale) + shift come to in fp32.
    p.margin = std::ldexp(1.0F, layer.bits - 22);
    fill_tables(p);
    return p;
}

std::int64_t numel(const Layer& layer) noexcept {
    return layer.weight.extent[0] * layer.weight.extent[1];
}

// Calls task(i, range) for each block of a layer.
template <class Task>
void each_block(const Layer& layer, int threads, Task&& task) noexcept {
    const std::int64_t n = numel(layer);
    parallel_for((n + kBlock - 1) / kBlock, threads, [&](std::int64_t i) noexcept {
        task(i, Range{i * kBlock, std::min(n, (i + 1) * kBlock)});
    });
}

// The mean of what sum(range) gives for the blocks.
template <class Sum>
Status mean_of_blocks(const Layer& layer, double& mean, int threads, Sum&& sum) noexcept {
    const std::int64_t blocks = (numel(layer) + kBlock - 1) / kBlock;
    Scratch& scratch = Scratch::of_this_thread();
    const auto bytes = static_cast<std::size_t>(blocks) * sizeof(double);
    auto* sums = reinterpret_cast<double*>(scratch.reserve(bytes));
    if (sums == nullptr) {
        return no_memory("sums of blocks", static_cast<std::int64_t>(bytes));
    }
    each_block(layer, threads, [&](std::int64_t i, Range range) noexcept { sums[i] = sum(range); });
    double total = 0.0;
    for (std::int64_t i = 0; i < blocks; ++i) {
        total += sums[i];
    }
    scratch.release_large();
    mean = total / static_cast<double>(numel(layer));
    return {};
}

Status check_gradient(const Layer& layer, const View<float, 2>& grad) noexcept {
    QS_TRY(same("grad.shape[0]", grad.extent[0], "", layer.weight.extent[0]));
    QS_TRY(same("grad.shape[1]", grad.extent[1], "", layer.weight.extent[1]));
    return contiguous(grad, "grad");
}

// Whether the gradient is to be written past the caches, in whole strips.
bool streams(const Layer& layer, const Problem& p, const View<float, 2>& grad) noexcept {
    const bool single = p.width == numel(layer);
    return numel(layer) >= kStreamed && reinterpret_cast<std::uintptr_t>(grad.data) % kAlign == 0 &&
           (single || (p.width % kStrip == 0 && p.group % kStrip == 0));
}

float per_weight(const Layer& layer, double factor) noexcept {
    return static_cast<float>(factor / static_cast<double>(numel(layer)));
}

}  // namespace

Status mean_hamming_weight(const Layer& layer, double& mean, int threads) noexcept {
    QS_TRY(check(layer));
    const Problem p = problem_of(layer);
    const Kernels& kernels = active_kernels();
    return mean_of_blocks(layer, mean, threads,
                          [&](Range range) noexcept { return kernels.sum(p, range); });
}

Status mean_gradient(const Layer& layer, double factor, bool accumulate, View<float, 2> grad,
                     int threads) noexcept {
    QS_TRY(check(layer));
    QS_TRY(check_gradient(layer, grad));
    const Problem p = problem_of(layer);
    const Kernels& kernels = active_kernels();
    const Store store = accumulate                ? Store::kAdd
                        : streams(layer, p, grad) ? Store::kStream
                                                  : Store::kWrite;
    const float by = per_weight(layer, factor);
    each_block(layer, threads, [&](std::int64_t, Range range) noexcept {
        kernels.gradient(p, range, by, store, grad.data);
    });
    return {};
}

Status squared(const Layer& layer, double factor, bool accumulate, View<float, 2> grad,
               double& value, int threads) noexcept {
    QS_TRY(check(layer));
    QS_TRY(check_gradient(layer, grad));
    const Problem p = problem_of(layer);
    double mean = 0.0;
    if (accumulate || !streams(layer, p, grad)) {
        QS_TRY(mean_hamming_weight(layer, mean, threads));
        value = factor * mean * mean;
        return mean_gradient(layer, 2.0 * factor * mean, accumulate, grad, threads);
    }
    // The factor of the gradient is known when all weights have been seen: until then the gradient's
    // own memory holds the slopes, a byte each. A last block that is not whole is read again.
    const Kernels& kernels = active_kernels();
    const auto whole = [](Range range) { return range.end - range.begin == kBlock; };
    QS_TRY(mean_of_blocks(layer, mean, threads, [&](Range range) noexcept {
        return whole(range) ? kernels.sum_and_slopes(p, range, grad.data) : kernels.sum(p, range);
    }));
    value = factor * mean * mean;
    const float by = per_weight(layer, 2.0 * factor * mean);
    each_block(layer, threads, [&](std::int64_t, Range range) noexcept {
        if (whole(range)) {
            kernels.expand(p, range, by, grad.data);
        } else {
            kernels.gradient(p, range, by, Store::kWrite, grad.data);
        }
    });
    return {};
}

}  // namespace quernstone::pim::lhr
