#pragma once

#include <limits>

#include "device.h"
#include "experts.h"

// The kernels of experts for a few tokens: see README.md for the design and its limits.
//
// Axes: p experts that have tokens, a assignments sorted by expert, t tokens, m hidden width,
// f feed-forward width, n outputs and k inputs of a matrix.
extern __shared__ __align__(16) unsigned char qs_shared_memory[];

namespace quernstone::cuda {
namespace {

using Args = QsExperts;

// Of the packed layout.
constexpr int kRows = 16;   // outputs of a block
constexpr int kLine = 64;   // bytes: 4 of every output of a block
constexpr int kGroup = 32;  // inputs that share an activation's scale
constexpr int kAlign = 64;  // bytes, of a block
constexpr int kUnit = 32;   // feed-forward outputs of a thread block: a group of down's inputs
constexpr int kWords = 8;   // of 4 activations of a group

constexpr int kThreads = 256;
constexpr int kQuads = kRows / 4;                 // 16 bytes of a line are 4 outputs
constexpr int kChunk = kThreads / kQuads / 2;     // groups that are in shared memory
constexpr int kGateUpBlocks = 2 * kUnit / kRows;  // of a thread block: gate and up in turns
constexpr int kDownBlocks = 2;
constexpr int kMostTokens = 4;  // of a thread block
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A matrix of one expert.
struct Matrix {
    std::int64_t block_bytes;
    int blocks;  // of the matrix; of gate and up together
    int groups;  // of kGroup inputs in a packed row
    int scales;  // byte of a block's scales
    int zeros;   // byte of its zero points
    int shift;   // groups of kGroup << shift inputs share a scale
};

__host__ __device__ inline Matrix matrix(const Args& a, std::int64_t rows, std::int64_t inputs) {
    const int unit = a.format == QS_INT4 ? a.group : kGroup;
    const std::int64_t units = (inputs + unit - 1) / unit;
    const std::int64_t codes = kRows * units * unit * a.format / 8;
    const std::int64_t scales = a.format == QS_INT4 ? 2 * kRows * units : 4 * kRows;
    const std::int64_t zeros = a.zero_points != 0 ? kRows * units : 0;
    Matrix m{};
    m.block_bytes = (codes + scales + zeros + kAlign - 1) / kAlign * kAlign;
    m.blocks = static_cast<int>((rows + kRows - 1) / kRows);
    m.groups = static_cast<int>(units * (unit / kGroup));
    m.scales = static_cast<int>(codes);
    m.zeros = static_cast<int>(codes + scales);
    m.shift = unit == 128 ? 2 : unit == 64 ? 1 : 0;
    return m;
}

__host__ __device__ inline Matrix gate_up(const Args& a) {
    Matrix m = matrix(a, a.f, a.m);
    m.blocks *= 2;
    return m;
}

__host__ __device__ inline Matrix down(const Args& a) { return matrix(a, a.m, a.f); }

// Rows of activations as int8, a scale and the sum of the codes for each group.
struct Rows {
    std::int8_t* codes;  // [row, group, kGroup]
    float* scales;       // [row, group]
    std::int32_t* sums;  // [row, group]
};

struct Scratch {
    Rows x;      // [t]
    Rows inner;  // [a]
};

__host__ __device__ inline std::int64_t bytes_of_rows(std::int64_t rows, std::int64_t groups) {
    return rows * groups * (kGroup + 8);
}

__host__ __device__ inline Rows rows_at(unsigned char* at, std::int64_t rows, std::int64_t groups) {
    const std::int64_t n = rows * groups;
    return {reinterpret_cast<std::int8_t*>(at), reinterpret_cast<float*>(at + n * kGroup),
            reinterpret_cast<std::int32_t*>(at + n * (kGroup + 4))};
}

// The first part's size is a multiple of 8 only: codes are read 16 bytes at a time.
__host__ __device__ inline std::int64_t bytes_of_x(const Args& a) {
    return (bytes_of_rows(a.t, gate_up(a).groups) + 15) / 16 * 16;
}

__host__ __device__ inline Scratch scratch(const Args& a) {
    auto* memory = static_cast<unsigned char*>(a.scratch);
    return {rows_at(memory, a.t, gate_up(a).groups),
            rows_at(memory + bytes_of_x(a), a.a, down(a).groups)};
}

// One number of a group in each lane of a warp to codes; lanes that are not `real` hold none.
__device__ void quantize(float value, bool real, const Rows& to, std::int64_t group) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const float size = real ? fabsf(value) : 0.0F;
    // Infinite or NaN; the maximum passes over NaNs.
    const bool finite = warp_max(size <= kLargest ? 0.0F : 1.0F) == 0.0F;
    const float most = warp_max(size);
    const float inverse = finite && most > 1e-36F ? __fdiv_rn(127.0F, most) : 0.0F;
    const int code = real && finite ? __float2int_rn(__fmul_rn(value, inverse)) : 0;
    const int sum = warp_sum(code);
    to.codes[group * kGroup + lane] = static_cast<std::int8_t>(code);
    if (lane == 0) {
        to.scales[group] = finite ? __fmul_rn(most, 1.0F / 127.0F) : kNan;
        to.sums[group] = sum;
    }
}

// A group of a token per warp.
__global__ void __launch_bounds__(kThreads) experts_quantize_kernel(const Args a) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int groups = gate_up(a).groups;
    const std::int64_t at =
        std::int64_t{blockIdx.x} * (kThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
    if (at >= a.t * groups) {
        return;  // a whole warp
    }
    const std::int64_t input = at % groups * kGroup + lane;
    const bool real = input < a.m;
    quantize(real ? a.x[at / groups * a.m + input] : 0.0F, real, scratch(a).x, at);
}

__device__ __forceinline__ int dot4(int sum, unsigned weights, int x) {
    return __dp4a(static_cast<int>(weights), x, sum);
}

// Sums over the 32 inputs of a group: 4 outputs, whose codes lie beside each other, times T tokens.
template <int Format, int T>
__device__ __forceinline__ void group_dots(const unsigned char* line, const int (&x)[T][kWords],
                                           int (&dots)[T][4]) {
    constexpr int kLines = Format == QS_INT4 ? kWords / 2 : kWords;
    uint4 codes[kLines];
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
        codes[i] = *reinterpret_cast<const uint4*>(line + i * kLine);
    }
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
        const unsigned row[4] = {codes[i].x, codes[i].y, codes[i].z, codes[i].w};
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
            for (int t = 0; t < T; ++t) {
                if (Format == QS_INT4) {
                    dots[t][r] = dot4(dots[t][r], row[r] & 0x0f0f0f0fU, x[t][2 * i]);
                    dots[t][r] = dot4(dots[t][r], row[r] >> 4 & 0x0f0f0f0fU, x[t][2 * i + 1]);
                } else {
                    dots[t][r] = dot4(dots[t][r], row[r] ^ 0x80808080U, x[t][i]);  // less 128
                }
            }
        }
    }
}

// Shared memory of one chunk of groups. Outputs of odd groups change places with those of the next
// block: eight neighbours then write to all banks.
template <int T, int Blocks>
struct Chunk {
    static constexpr int kOutputs = Blocks * kRows;
    static constexpr std::size_t kProductBytes = sizeof(float) * T * kChunk * kOutputs;
    static constexpr std::size_t kBytes = kProductBytes + 2 * kChunk * kOutputs;

    float* products;        // [T][kChunk][kOutputs] whole numbers
    std::uint16_t* scales;  // [kChunk][kOutputs] bf16 of int4

    __device__ explicit Chunk(int turn)
        : products(
              reinterpret_cast<float*>(qs_shared_memory + static_cast<std::size_t>(turn) * kBytes)),
          scales(reinterpret_cast<std::uint16_t*>(
              qs_shared_memory + static_cast<std::size_t>(turn) * kBytes + kProductBytes)) {}

    __device__ static int place(int group, int block) {
        return group * kOutputs + (block ^ (group & 1)) * kRows;
    }
};

__device__ __forceinline__ float of_bf16(unsigned bits) { return __uint_as_float(bits << 16); }

// out[t][n] of neighbouring blocks of one matrix: every group's products at once, and then their
// sum, group after group in one order, by a thread for each output and token. That thread,
// number t * kOutputs + n, returns it; the others return 0.
template <int Format, int T, int Blocks, class RowOf>
__device__ float ordered_product(const Args& a, const Matrix& m, const unsigned char* first,
                                 int blocks, const Rows& x, const RowOf& row_of) {
    using Shared = Chunk<T, Blocks>;
    const int thread = static_cast<int>(threadIdx.x);
    const int quad = thread % kQuads;
    const int local = thread / kQuads % kChunk;
    const int half = thread / (kQuads * kChunk);
    const int output = thread % Shared::kOutputs;
    const bool sums = thread < T * Shared::kOutputs && output < blocks * kRows;
    const int token = thread / Shared::kOutputs;
    const float* x_scales = x.scales + row_of(sums ? token : 0) * m.groups;
    float total = 0.0F;
    for (int begin = 0; begin < m.groups; begin += kChunk) {
        const Shared shared(begin / kChunk % 2);
        const int group = begin + local;
        if (group < m.groups) {
            int codes[T][kWords];
            int sum[T];
#pragma unroll
            for (int t = 0; t < T; ++t) {
                const std::int64_t at = row_of(t) * m.groups + group;
                const auto* words = reinterpret_cast<const int4*>(x.codes + at * kGroup);
                const int4 low = words[0];
                const int4 high = words[1];
                const int all[kWords] = {low.x,  low.y,  low.z,  low.w,
                                         high.x, high.y, high.z, high.w};
#pragma unroll
                for (int i = 0; i < kWords; ++i) {
                    codes[t][i] = all[i];
                }
                sum[t] = x.sums[at];
            }
#pragma unroll
            for (int i = 0; i < Blocks / 2; ++i) {
                const int block = half * (Blocks / 2) + i;
                if (block >= blocks) {
                    break;
                }
                const unsigned char* from = first + block * m.block_bytes;
                int dots[T][4] = {};
                group_dots<Format, T>(from + group * (kGroup * kRows * Format / 8) + quad * 16,
                                      codes, dots);
                const int to = Shared::place(local, block) + quad * 4;
                unsigned zeros = 0x08080808U;
                if (Format == QS_INT4) {
                    const int at = (group >> m.shift) * kRows + quad * 4;
                    *reinterpret_cast<uint2*>(shared.scales + to) =
                        *reinterpret_cast<const uint2*>(from + m.scales + 2 * at);
                    if (a.zero_points != 0) {
                        zeros = *reinterpret_cast<const unsigned*>(from + m.zeros + at);
                    }
                }
#pragma unroll
                for (int t = 0; t < T; ++t) {
                    float products[4];
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int zero = static_cast<int>(zeros >> 8 * r & 255U);
                        const int shift = Format == QS_INT4 ? zero * sum[t] : 0;
                        products[r] = static_cast<float>(dots[t][r] - shift);  // exact
                    }
                    store(products, shared.products + t * kChunk * Shared::kOutputs + to);
                }
            }
        }
        // One barrier a chunk: who writes to a buffer again has met, at the other buffer's
        // barrier, those who read it before.
        __syncthreads();
        if (sums) {
            const float* products = shared.products + token * kChunk * Shared::kOutputs;
            const int end = min(kChunk, m.groups - begin);
#pragma unroll 8
            for (int g = 0; g < end; ++g) {
                const int at = Shared::place(g, output / kRows) + output % kRows;
                float scale = x_scales[begin + g];
                if (Format == QS_INT4) {
                    scale = __fmul_rn(of_bf16(shared.scales[at]), scale);
                }
                total = __fmaf_rn(products[at], scale, total);
            }
        }
    }
    if (Format == QS_INT8 && sums) {
        const unsigned char* from = first + output / kRows * m.block_bytes + m.scales;
        total = __fmul_rn(total, reinterpret_cast<const float*>(from)[output % kRows]);
    }
    return total;
}

// A thread block's expert and up to T of its assignments.
template <int T>
struct Task {
    int part;  // of the outputs
    int first, count;
    const unsigned char* expert;

    __device__ Task(const Args& a, int parts) {
        const int chunks = static_cast<int>((a.most + T - 1) / T);
        int index = static_cast<int>(blockIdx.x);
        part = index % parts;
        index /= parts;
        const int place = index / chunks;
        first = a.begins[place] + index % chunks * T;
        count = min(a.begins[place + 1] - first, T);
        expert = static_cast<const unsigned char*>(a.data) + a.offsets[place];
    }
};

// e^x for x <= 0 in the CPU's steps; 0 below -87, as far as a sum with 1 can tell.
__device__ float exp_of_negative(float x) {
    const float clamped = fmaxf(x, -87.0F);
    const float n = rintf(__fmul_rn(clamped, kLog2e));
    float r = __fmaf_rn(n, -0.693359375F, clamped);
    r = __fmaf_rn(n, 2.12194440e-4F, r);
    float p = 1.0F / 5040.0F;
    p = __fmaf_rn(p, r, 1.0F / 720.0F);
    p = __fmaf_rn(p, r, 1.0F / 120.0F);
    p = __fmaf_rn(p, r, 1.0F / 24.0F);
    p = __fmaf_rn(p, r, 1.0F / 6.0F);
    p = __fmaf_rn(p, r, 0.5F);
    p = __fmaf_rn(p, r, 1.0F);
    p = __fmaf_rn(p, r, 1.0F);
    return __fmul_rn(p, __int_as_float((__float2int_rn(n) + 127) << 23));
}

__device__ float silu_multiply(float gate, float up) {
    const float e = exp_of_negative(-fabsf(gate));
    const float share = __fdiv_rn(gate < 0.0F ? e : 1.0F, __fadd_rn(1.0F, e));
    return __fmul_rn(__fmul_rn(gate, share), up);
}

// kUnit feed-forward outputs of T assignments, as the group of activations that down reads.
template <int Format, int T>
__global__ void __launch_bounds__(kThreads, 2) experts_gate_up_kernel(const Args a) {
    constexpr int kOutputs = kGateUpBlocks * kRows;
    const Matrix m = gate_up(a);
    const Task<T> task(a, static_cast<int>((a.f + kUnit - 1) / kUnit));
    if (task.count <= 0) {
        return;
    }
    const auto row_of = [&](int t) -> std::int64_t {
        return a.tokens[task.first + min(t, task.count - 1)];
    };
    const int block = task.part * kGateUpBlocks;
    const int blocks = min(kGateUpBlocks, m.blocks - block);
    const Scratch memory = scratch(a);
    const float total = ordered_product<Format, T, kGateUpBlocks>(
        a, m, task.expert + block * m.block_bytes, blocks, memory.x, row_of);

    float* both = reinterpret_cast<float*>(qs_shared_memory);  // [T][gate, up, gate, up][kRows]
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();
    if (thread < T * kOutputs) {
        both[thread] = total;
    }
    __syncthreads();
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    if (warp >= task.count) {
        return;  // a whole warp
    }
    const float* gate = both + warp * kOutputs + lane / kRows * 2 * kRows + lane % kRows;
    const std::int64_t output = std::int64_t{task.part} * kUnit + lane;
    const std::int64_t row = std::int64_t{task.first + warp} * down(a).groups;
    quantize(silu_multiply(gate[0], gate[kRows]), output < a.f, memory.inner, row + task.part);
    if ((task.part + 1) * kUnit >= a.f) {  // the last unit: groups up to the end of a packed row
        for (std::int64_t g = task.part + 1; g < down(a).groups; ++g) {
            quantize(0.0F, false, memory.inner, row + g);
        }
    }
}

// Neighbouring blocks of the outputs of T assignments.
template <int Format, int T>
__global__ void __launch_bounds__(kThreads, 2) experts_down_kernel(const Args a) {
    constexpr int kOutputs = kDownBlocks * kRows;
    const Matrix m = down(a);
    const Task<T> task(a, (m.blocks + kDownBlocks - 1) / kDownBlocks);
    if (task.count <= 0) {
        return;
    }
    const auto row_of = [&](int t) -> std::int64_t { return task.first + min(t, task.count - 1); };
    const int block = task.part * kDownBlocks;
    const int blocks = min(kDownBlocks, m.blocks - block);
    const unsigned char* from =
        task.expert + gate_up(a).blocks * gate_up(a).block_bytes + block * m.block_bytes;
    const float total =
        ordered_product<Format, T, kDownBlocks>(a, m, from, blocks, scratch(a).inner, row_of);
    const int thread = static_cast<int>(threadIdx.x);
    const int token = thread / kOutputs;
    const std::int64_t output = std::int64_t{block} * kRows + thread % kOutputs;
    if (token < task.count && output < a.m) {
        a.out[(task.first + token) * a.m + output] = total;
    }
}

}  // namespace
}  // namespace quernstone::cuda
