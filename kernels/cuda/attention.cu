// The attention decode step: how a call is cut, and the calls that Python makes. See README.md.
//
// Axes: b batch, h query heads, g key heads, t queries, s keys, d head width.
#include "attention.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "attention_decode.h"
#include "launch.h"

namespace quernstone::cuda {
namespace {

bool aligned(const void* data, const std::int64_t (&stride)[3], std::int64_t element) {
    bool all = reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0;
    for (const std::int64_t n : stride) {
        all = all && n * element % kVectorBytes == 0;
    }
    return all;
}

Plan make_plan(const Args& a) {
    const std::int64_t element = a.dtype == QS_F32 ? 4 : 2;
    Plan plan{};
    plan.group = static_cast<int>(a.h / a.g);
    plan.rows = static_cast<int>(plan.group * a.t);
    plan.warps = std::clamp(ceil_div(plan.rows, kRows), 1, kMaxWarps);
    plan.row_blocks = ceil_div(plan.rows, plan.warps * kRows);
    const std::int64_t hidden = a.window > 0 ? a.s - a.t + 1 - a.window : 0;
    plan.first_split = static_cast<int>(std::max<std::int64_t>(hidden, 0)) / kSplit;
    plan.splits = ceil_div(static_cast<int>(a.s), kSplit) - plan.first_split;
    plan.first_apart = a.kind == QS_VANILLA && a.importance != nullptr;
    plan.aligned = a.d * element % kVectorBytes == 0 && aligned(a.k, a.k_stride, element) &&
                   aligned(a.v, a.v_stride, element);
    return plan;
}

template <class T, int W>
cudaError_t launch_partial(const Args& a, const Plan& plan, cudaStream_t stream) {
    const dim3 threads(kWarp, static_cast<unsigned>(plan.warps));
    return launch(decode_partial_kernel<T, W>, a.b * a.g * plan.splits * plan.row_blocks, threads,
                  Tiles<T, W>::bytes(plan.warps), stream, a, plan);
}

template <class T>
cudaError_t launch_all(const Args& a, const Plan& plan, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    if (plan.splits > 0 && a.b > 0 && a.t > 0) {
        error = a.d <= 64    ? launch_partial<T, 64>(a, plan, stream)
                : a.d <= 128 ? launch_partial<T, 128>(a, plan, stream)
                             : launch_partial<T, kMaxWidth>(a, plan, stream);
    }
    if (error == cudaSuccess && a.b > 0 && a.t > 0) {
        constexpr std::size_t kShared = sizeof(float) * kMergers * (kMaxWidth + 2);
        error = launch(decode_merge_kernel<T>, a.b * a.h * a.t, dim3(kWarp, kMergers), kShared,
                       stream, a, plan);
    }
    if (error == cudaSuccess && a.importance != nullptr) {
        error = launch(decode_importance_kernel, a.h, dim3(kWarp), 0, stream, a, plan);
    }
    return error;
}

}  // namespace
}  // namespace quernstone::cuda

using namespace quernstone::cuda;

QS_EXPORT std::int64_t qs_attention_decode_struct_bytes() { return sizeof(QsAttentionDecode); }

QS_EXPORT std::int64_t qs_attention_decode_scratch(const QsAttentionDecode* args) {
    const Plan plan = make_plan(*args);
    const std::int64_t rows = args->b * args->g * plan.rows;
    const std::int64_t per_split =
        std::int64_t{sizeof(Partial)} + args->d * std::int64_t{sizeof(float)};
    return rows * (plan.splits * per_split + 2 * std::int64_t{sizeof(float)});
}

QS_EXPORT const char* qs_attention_decode(const QsAttentionDecode* args, void* stream) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    if (args->s > kMost - 2 * kSplit || args->t > kMost - 2 * kSplit) {
        return "more keys or queries than a 32-bit index counts";
    }
    const Plan plan = make_plan(*args);
    const std::int64_t rows = args->b * args->g * plan.row_blocks;
    if (rows > kMost / std::max(plan.splits, 1) || args->b * args->h * args->t > kMost) {
        return "more blocks than a grid has";
    }
    const auto queue = static_cast<cudaStream_t>(stream);
    cudaError_t error = cudaErrorInvalidValue;
    switch (args->dtype) {
        case QS_F32:
            error = launch_all<float>(*args, plan, queue);
            break;
        case QS_F16:
            error = launch_all<__half>(*args, plan, queue);
            break;
        case QS_BF16:
            error = launch_all<__nv_bfloat16>(*args, plan, queue);
            break;
        default:
            return "dtype is none of QS_F32, QS_F16, QS_BF16";
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
