#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "emulator.h"

// The part of CUDA C++ that the kernels use, for a host compiler: every CUDA thread is a fiber.
// What is missing here does not compile, and is added with the first kernel that needs it.

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::max;
using std::min;

using emulation::blockDim;
using emulation::blockIdx;
using emulation::dim3;
using emulation::gridDim;
using emulation::threadIdx;

using Where = std::source_location;

// Each is one rounding: the tests' flags keep g++ from fusing them.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};

// c and the products of four signed bytes
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) {
        c += static_cast<std::int8_t>(a >> 8 * i) * static_cast<std::int8_t>(b >> 8 * i);
    }
    return c;
}

inline void __syncthreads(Where where = Where::current()) {
    emulation::wait({emulation::Wait::kBlock, 0, 0, 0}, where);
}

inline void __syncwarp(unsigned mask = 0xffffffffU, Where where = Where::current()) {
    emulation::wait({emulation::Wait::kWarp, mask, 0, 0}, where);
}

namespace emulation {
template <class T>
T exchange(unsigned mask, T x, unsigned source, Where where) {
    static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(std::uint64_t));
    std::uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    bits = wait({Wait::kWarp, mask, source, bits}, where);
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes, Where where = Where::current()) {
    return emulation::exchange(mask, x, emulation::lane() ^ static_cast<unsigned>(lanes), where);
}

template <class T>
T __shfl_sync(unsigned mask, T x, int source, Where where = Where::current()) {
    return emulation::exchange(mask, x, static_cast<unsigned>(source) % 32U, where);
}

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

template <class T>
cudaError_t cudaFuncSetAttribute(T* kernel, cudaFuncAttribute, int bytes) {
    emulation::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<std::size_t>(bytes));
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const bool done =
        emulation::launch({config->gridDim, config->blockDim, config->dynamicSmemBytes},
                          reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
    return done ? cudaSuccess : cudaErrorLaunchFailure;
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? emulation::last_error() : "invalid argument";
}
