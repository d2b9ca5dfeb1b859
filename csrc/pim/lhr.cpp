#include "pim/lhr.h"

#include <algorithm>
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
constexpr std::int64_t kAlign = 64, kVector = 16;

const Kernels& active_kernels() noexcept {
#if defined(QS_HAVE_X86)
    switch (active_isa()) {
        case Isa::kBaseline:
            return baseline::kKernels;
        case Isa::kAvx2:
            return avx2::kKernels;
        case Isa::kAvx512:
        case Isa::kAvx512Bf16Vnni:
            return avx512::kKernels;
    }
#endif
    return baseline::kKernels;
}

template <class T>
Status contiguous(const View<T, 2>& x, const char* what) noexcept {
    const bool is = (x.stride[1] == 1 || x.extent[1] <= 1) &&
                    (x.stride[0] == x.extent[1] || x.extent[0] <= 1);
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
    QS_TRY(same("scales.shape[1]", layer.scales.extent[1], "",
                (k + layer.group - 1) / layer.group));
    const float* scales = layer.scales.data;
    const std::int64_t count = layer.scales.extent[0] * layer.scales.extent[1];
    for (std::int64_t i = 0; i < count; ++i) {
        if (!(scales[i] > 0.0F) || !std::isfinite(scales[i]) || !std::isfinite(1.0F / scales[i])) {
            return invalid("scales", "a number that is not finite and positive, or so small that "
                           "its inverse is not", "none");
        }
    }
    return {};
}

Block block_of(const Layer& layer, std::int64_t index) noexcept {
    const auto [n, k] = layer.weight.extent;
    // One scale for all is one run.
    const bool single = layer.scales.extent[0] * layer.scales.extent[1] == 1;
    Block b{};
    b.weight = layer.weight.data;
    b.scales = layer.scales.data;
    b.begin = index * kBlock;
    b.end = std::min(n * k, b.begin + kBlock);
    b.width = single ? n * k : k;
    b.group = single ? n * k : layer.group;
    b.scale_stride = layer.scales.extent[0] == 1 ? 0 : layer.scales.extent[1];
    b.high = static_cast<float>((1 << (layer.bits - 1)) - 1);
    b.low = -b.high - 1.0F;
    b.mask = (1 << layer.bits) - 1;
    b.shift = static_cast<float>(layer.shift);
    b.margin = std::ldexp(1.0F, layer.bits - 22);
    return b;
}

std::int64_t blocks_of(const Layer& layer) noexcept {
    return (layer.weight.extent[0] * layer.weight.extent[1] + kBlock - 1) / kBlock;
}

Status sum_blocks(const Layer& layer, double& mean, int threads) noexcept {
    const std::int64_t blocks = blocks_of(layer);
    Scratch& scratch = Scratch::of_this_thread();
    const auto bytes = static_cast<std::size_t>(blocks) * sizeof(double);
    auto* sums = reinterpret_cast<double*>(scratch.reserve(bytes));
    if (sums == nullptr) {
        return no_memory("sums of blocks", static_cast<std::int64_t>(bytes));
    }
    const Kernels& kernels = active_kernels();
    parallel_for(blocks, threads,
                 [&](std::int64_t i) noexcept { sums[i] = kernels.sum(block_of(layer, i)); });
    double total = 0.0;
    for (std::int64_t i = 0; i < blocks; ++i) {
        total += sums[i];
    }
    scratch.release_large();
    mean = total / static_cast<double>(layer.weight.extent[0] * layer.weight.extent[1]);
    return {};
}

Status check_gradient(const Layer& layer, const View<float, 2>& grad) noexcept {
    QS_TRY(same("grad.shape[0]", grad.extent[0], "", layer.weight.extent[0]));
    QS_TRY(same("grad.shape[1]", grad.extent[1], "", layer.weight.extent[1]));
    return contiguous(grad, "grad");
}

void write_gradient(const Layer& layer, double factor, bool accumulate, View<float, 2> grad,
                    int threads) noexcept {
    const std::int64_t numel = layer.weight.extent[0] * layer.weight.extent[1];
    const Block first = block_of(layer, 0);
    const bool whole = first.width % kVector == 0 && first.group % kVector == 0;
    const bool single = first.width == numel;
    const bool aligned = reinterpret_cast<std::uintptr_t>(grad.data) % kAlign == 0;
    Store store = Store::kWrite;
    if (accumulate) {
        store = Store::kAdd;
    } else if (numel >= kStreamed && aligned && (whole || single)) {
        store = Store::kStream;
    }
    const auto by = static_cast<float>(factor / static_cast<double>(numel));
    const Kernels& kernels = active_kernels();
    parallel_for(blocks_of(layer), threads, [&](std::int64_t i) noexcept {
        kernels.gradient(block_of(layer, i), by, store, grad.data);
    });
}

}  // namespace

Status mean_hamming_weight(const Layer& layer, double& mean, int threads) noexcept {
    QS_TRY(check(layer));
    return sum_blocks(layer, mean, threads);
}

Status mean_gradient(const Layer& layer, double factor, bool accumulate, View<float, 2> grad,
                     int threads) noexcept {
    QS_TRY(check(layer));
    QS_TRY(check_gradient(layer, grad));
    write_gradient(layer, factor, accumulate, grad, threads);
    return {};
}

Status squared(const Layer& layer, double factor, bool accumulate, View<float, 2> grad,
               double& value, int threads) noexcept {
    QS_TRY(check(layer));
    QS_TRY(check_gradient(layer, grad));
    double mean = 0.0;
    QS_TRY(sum_blocks(layer, mean, threads));
    value = factor * mean * mean;
    write_gradient(layer, 2.0 * factor * mean, accumulate, grad, threads);
    return {};
}

}  // namespace quernstone::pim::lhr
