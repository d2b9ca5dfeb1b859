#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

// What the calls on the host share.
#define QS_EXPORT extern "C" __attribute__((visibility("default")))

namespace quernstone::cuda {

constexpr std::size_t kSharedWithoutAsking = 48 * 1024;

template <class T>
constexpr T ceil_div(T a, T b) {
    return a / b + (a % b != 0 ? 1 : 0);
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), std::int64_t blocks, dim3 threads,
                   std::size_t shared, cudaStream_t stream, const Parameters&... arguments) {
    if (shared > kSharedWithoutAsking) {
        const cudaError_t error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
        if (error != cudaSuccess) {
            return error;
        }
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace quernstone::cuda
