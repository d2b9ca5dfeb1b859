// Experts for a few tokens each: how a call is cut, and the calls that Python makes. See README.md.
//
// Axes: p experts that have tokens, a assignments sorted by expert, t tokens, m hidden width,
// f feed-forward width.
#include "experts.h"

#include <cstdint>
#include <limits>

#include "experts_decode.h"
#include "launch.h"

namespace quernstone::cuda {
namespace {

constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max();

template <int Format, int T>
cudaError_t launch_products(const Args& a, cudaStream_t stream) {
    const std::int64_t tasks = a.p * ceil_div<std::int64_t>(a.most, T);
    const std::int64_t units = ceil_div<std::int64_t>(a.f, kUnit);
    const std::int64_t parts = ceil_div<std::int64_t>(a.m, kDownBlocks * kRows);
    if (units > kMostBlocks / tasks || parts > kMostBlocks / tasks) {
        return cudaErrorInvalidValue;
    }
    const cudaError_t error =
        launch(experts_gate_up_kernel<Format, T>, units * tasks, dim3(kThreads),
               2 * Chunk<T, kGateUpBlocks>::kBytes, stream, a);
    return error != cudaSuccess
               ? error
               : launch(experts_down_kernel<Format, T>, parts * tasks, dim3(kThreads),
                        2 * Chunk<T, kDownBlocks>::kBytes, stream, a);
}

template <int Format>
cudaError_t launch_all(const Args& a, cudaStream_t stream) {
    const std::int64_t groups = a.t * gate_up(a).groups;
    const cudaError_t error =
        launch(experts_quantize_kernel, ceil_div<std::int64_t>(groups, kThreads / kWarp),
               dim3(kThreads), 0, stream, a);
    if (error != cudaSuccess) {
        return error;
    }
    return a.most == 1   ? launch_products<Format, 1>(a, stream)
           : a.most == 2 ? launch_products<Format, 2>(a, stream)
                         : launch_products<Format, kMostTokens>(a, stream);
}

}  // namespace
}  // namespace quernstone::cuda

using namespace quernstone::cuda;

QS_EXPORT std::int64_t qs_experts_struct_bytes() { return sizeof(QsExperts); }

QS_EXPORT std::int64_t qs_experts_scratch(const QsExperts* args) {
    return bytes_of_x(*args) + bytes_of_rows(args->a, down(*args).groups);
}

QS_EXPORT const char* qs_experts(const QsExperts* args, void* stream) {
    const auto queue = static_cast<cudaStream_t>(stream);
    if (args->a == 0) {
        return nullptr;
    }
    cudaError_t error = cudaErrorInvalidValue;
    switch (args->format) {
        case QS_INT4:
            error = launch_all<QS_INT4>(*args, queue);
            break;
        case QS_INT8:
            error = launch_all<QS_INT8>(*args, queue);
            break;
        default:
            return "format is none of QS_INT4, QS_INT8";
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
