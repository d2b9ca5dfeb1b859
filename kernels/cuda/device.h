#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// What kernels share: conversions, 16-byte loads, reductions over a warp.
namespace quernstone::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kVectorBytes = 16;  // of one load or copy of a thread
constexpr float kLog2e = 1.4426950408889634F;
constexpr float kLog2eLow = 1.925963033500115e-8F;  // log2(e) is the sum of the two
constexpr float kLn2 = 0.6931471805599453F;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// N neighbours in one load: `from` is aligned to all of them together.
template <class T, int N>
__device__ __forceinline__ void load(const T* from, float (&to)[N]) {
    struct alignas(N * sizeof(T)) Pack {
        T x[N];
    };
    const Pack pack = *reinterpret_cast<const Pack*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        to[i] = to_float(pack.x[i]);
    }
}

template <int N>
__device__ __forceinline__ void store(const float (&from)[N], float* to) {
    struct alignas(N * sizeof(float)) Pack {
        float x[N];
    };
    Pack pack;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        pack.x[i] = from[i];
    }
    *reinterpret_cast<Pack*>(to) = pack;
}

// Like fmaxf, the maximum passes over NaNs.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
    }
    return x;
}

// The same bits in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        x += __shfl_xor_sync(kAllLanes, x, lanes);
    }
    return x;
}

}  // namespace quernstone::cuda
