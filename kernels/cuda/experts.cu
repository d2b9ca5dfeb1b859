// Experts for a few tokens each: how a call is cut, and the calls that Python makes. See README.md.
//
// Axes: p experts that have tokens, a assignments sorted by expert, t tokens, m hidden width,
// f feed-forward width.
#include "experts.h"

#include <cstdint>
#include <limits>
#include <type_traits>

#include "experts_decode.h"
#include "launch.h"

namespace quernstone::cuda {
namespace {

constexpr std::int64_t kMostBlocks = std::numeric_limits<std::int32_t>::max();

// Gives the body the tokens of a thread block as a constant.
template <class Body>
cudaError_t with_tokens(const Args& a, const Body& body) {
    return a.most == 1   ? body(std::integral_constant<int, 1>{})
           : a.most == 2 ? body(std::integral_constant<int, 2>{})
                         : body(std::integral_constant<int, kMostTokens>{});
}

// Blocks of a grid: so many parts for every expert and chunk of its tokens; 0 where it has not so
// many.
std::int64_t grid(const Args& a, std::int64_t parts, int tokens) {
    const std::int64_t tasks = a.p * ceil_div<std::int64_t>(a.most, tokens);
    return parts > kMostBlocks / tasks ? 0 : parts * tasks;
}

template <int Format>
cudaError_t launch_gate_up(const Args& a, cudaStream_t stream) {
    const std::int64_t groups = a.t * gate_up(a).groups;
    const cudaError_t error =
        launch(experts_quantize_kernel, ceil_div<std::int64_t>(groups, kThreads / kWarp),
               dim3(kThreads), 0, stream, a);
    if (error != cudaSuccess) {
        return error;
    }
    return with_tokens(a, [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        const std::int64_t blocks = grid(a, ceil_div<std::int64_t>(a.f, kUnit), kTokens);
        return blocks == 0 ? cudaErrorInvalidValue
                           : launch(experts_gate_up_kernel<Format, kTokens>, blocks, dim3(kThreads),
                                    2 * Chunk<kTokens, kGateUpBlocks>::kBytes, stream, a);
    });
}

template <int Format>
cudaError_t launch_down(const Args& a, cudaStream_t stream) {
    return with_tokens(a, [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        const std::int64_t parts = ceil_div<std::int64_t>(a.m, kDownBlocks * kRows);
        const std::int64_t blocks = grid(a, parts, kTokens);
        return blocks == 0 ? cudaErrorInvalidValue
                           : launch(experts_down_kernel<Format, kTokens>, blocks, dim3(kThreads),
                                    2 * Chunk<kTokens, kDownBlocks>::kBytes, stream, a);
    });
}

using Launch = cudaError_t (*)(const Args&, cudaStream_t);

const char* queue(const Args& a, void* stream, Launch int4, Launch int8) {
    if (a.format != QS_INT4 && a.format != QS_INT8) {
        return "format is none of QS_INT4, QS_INT8";
    }
    const Launch launch = a.format == QS_INT4 ? int4 : int8;
    const cudaError_t error = a.a == 0 ? cudaSuccess : launch(a, static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace quernstone::cuda

using namespace quernstone::cuda;

QS_EXPORT std::int64_t qs_experts_struct_bytes() { return sizeof(QsExperts); }

QS_EXPORT std::int64_t qs_experts_scratch(const QsExperts* args) {
    return bytes_of_x(*args) + bytes_of_rows(args->a, down(*args).groups);
}

QS_EXPORT const char* qs_experts_gate_up(const QsExperts* args, void* stream) {
    return queue(*args, stream, launch_gate_up<QS_INT4>, launch_gate_up<QS_INT8>);
}

QS_EXPORT const char* qs_experts_down(const QsExperts* args, void* stream) {
    return queue(*args, stream, launch_down<QS_INT4>, launch_down<QS_INT8>);
}
