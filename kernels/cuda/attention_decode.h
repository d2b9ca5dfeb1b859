#pragma once

#include <cuda_pipeline_primitives.h>

#include <limits>

#include "attention.h"
#include "device.h"

// The kernels of the attention decode step: see README.md for the design and its limits.
//
// Axes: b batch, h query heads, g key heads, t queries, s keys, d head width. The rows of a key
// head are its h / g heads x t queries, query-major. Logits are in units of log2 throughout.
extern __shared__ __align__(16) unsigned char qs_shared_memory[];

namespace quernstone::cuda {
namespace {

using Args = QsAttentionDecode;

constexpr int kRows = 4;           // of a warp: a key read from shared memory serves them all
constexpr int kMaxWarps = 4;       // of a block: 16 rows share the keys that it reads
constexpr int kTile = kWarp;       // keys in shared memory at a time, one per lane
constexpr int kSplit = 8 * kTile;  // keys of a block
constexpr int kMergers = 4;        // warps that add up the splits of one row
constexpr int kMaxWidth = 256;
constexpr int kResident = 3;  // blocks of an SM that registers allow for: 168 a thread
constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kHidden = -1.0F;  // in place of a weight: the row does not see the key

// How a call is cut. By its extents alone, and splits begin at multiples of kSplit: a row's bits
// depend on nothing but the row.
struct Plan {
    int group;        // query heads of a key head
    int rows;         // of a key head
    int warps;        // of a block
    int row_blocks;   // blocks beside each other over the same keys
    int first_split;  // whatever lies before, the window hides
    int splits;
    bool first_apart;  // kind vanilla with its gate: the first key joins in last
    bool aligned;      // K and V can be copied 16 bytes at a time
};

// One row's share of a split. Its unnormalised output lies beside it.
struct Partial {
    float max, sum;
};

struct Scratch {
    Partial* partial;  // [b, g, row, split]
    float* out;        // [b, g, row, split, d]
    float* first;      // [b, g, row] logit of the first key, where it is apart and seen
    float* gate;       // [b, h, t]
};

__host__ __device__ inline Scratch scratch(const Args& a, const Plan& plan) {
    const std::int64_t all = a.b * a.g * plan.rows;
    Scratch s{};
    s.partial = static_cast<Partial*>(a.scratch);
    s.out = reinterpret_cast<float*>(s.partial + all * plan.splits);
    s.first = s.out + all * plan.splits * a.d;
    s.gate = s.first + all;
    return s;
}

// Keys lo <= j < hi.
struct Range {
    int lo, hi;
};

// A position of a tensor made one that its memory has.
__device__ int clamped(std::int64_t x, const Args& a) {
    return static_cast<int>(x < 0 ? 0 : x > a.s ? a.s : x);
}

__device__ int first_key(const Args& a, int b) {
    return a.key_start == nullptr ? 0 : clamped(a.key_start[b], a);
}

__device__ Range visible(const Args& a, int b, int query) {
    const std::int64_t p = query + a.s - a.t;
    Range r{first_key(a, b), static_cast<int>(a.s)};
    if (a.key_lengths != nullptr) {
        r.hi = clamped(a.key_lengths[b], a);
    }
    if (a.window > 0) {
        r.lo = max(r.lo, clamped(p - a.window + 1, a));
        r.hi = min(r.hi, clamped(p + a.window, a));
    }
    if (a.causal != 0) {
        r.hi = min(r.hi, clamped(p + 1, a));
    }
    return r;
}

// The keys that are added up in splits: where the first one is apart, all others.
__device__ Range in_splits(const Range& r, int first, const Plan& plan) {
    return {plan.first_apart ? max(r.lo, first + 1) : r.lo, r.hi};
}

// Shared memory of the partial kernel. Keys are read one row per lane: an odd number of 16-byte
// columns lets eight neighbours read from all banks.
template <class T, int W>
struct Tiles {
    static constexpr int kPitch = W + kVectorBytes / int{sizeof(T)};
    static constexpr std::size_t kKeyBytes = sizeof(T) * kTile * kPitch;
    static constexpr std::size_t kValueBytes = sizeof(T) * kTile * W;
    static constexpr std::size_t kWarpBytes = sizeof(float) * kRows * (W + kTile);

    T* key;         // [kTile][kPitch]
    T* value;       // [kTile][W]
    float* q;       // [kRows][W] of this warp, scaled
    float* weight;  // [kTile][kRows] of this warp

    __device__ explicit Tiles(int warp)
        : key(reinterpret_cast<T*>(qs_shared_memory)),
          value(reinterpret_cast<T*>(qs_shared_memory + kKeyBytes)),
          q(reinterpret_cast<float*>(qs_shared_memory + kKeyBytes + kValueBytes +
                                     static_cast<std::size_t>(warp) * kWarpBytes)),
          weight(q + kRows * W) {}

    __host__ __device__ static constexpr std::size_t bytes(int warps) {
        return kKeyBytes + kValueBytes + static_cast<std::size_t>(warps) * kWarpBytes;
    }
};

// Starts to copy rows [first, first + kTile) of a matrix to shared memory, zeros where a row is
// outside [begin, end) or a column is beyond d: what no query may see is not even read. Nothing
// where all rows are beyond end.
template <class T, int W>
__device__ void stage(T* to, int pitch, const T* from, std::int64_t stride, int first, int begin,
                      int end, int d, bool aligned) {
    constexpr int kVector = kVectorBytes / int{sizeof(T)};
    constexpr int kColumns = W / kVector;
    if (first >= end) {
        return;
    }
    const int threads = static_cast<int>(blockDim.x * blockDim.y);
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); i < kTile * kColumns;
         i += threads) {
        const int row = i / kColumns;
        const int column = i % kColumns * kVector;
        const int key = first + row;
        const bool live = begin <= key && key < end && column < d;
        const T* source = live ? from + key * stride + column : from;
        T* target = to + row * pitch + column;
        if (aligned) {
            __pipeline_memcpy_async(target, source, kVectorBytes, live ? 0 : kVectorBytes);
        } else {
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
                target[c] = live && column + c < d ? source[c] : from_float<T>(0.0F);
            }
        }
    }
    __pipeline_commit();
}

// Everything staged is there, for every thread, and nobody still reads what came before it.
__device__ __forceinline__ void staged() {
    __pipeline_wait_prior(0);
    __syncthreads();
}

// Attention of kRows rows per warp over the keys of one split.
template <class T, int W>
__global__ void __launch_bounds__(kWarp* kMaxWarps, kResident)
    decode_partial_kernel(const Args a, const Plan plan) {
    constexpr int kOwn = W / kWarp;  // columns of a lane, kVector at a time
    constexpr int kPart = kVectorBytes / int{sizeof(T)};
    constexpr int kVector = kOwn < kPart ? kOwn : kPart;
    const int lane = static_cast<int>(threadIdx.x);
    const int warp = static_cast<int>(threadIdx.y);
    const int d = static_cast<int>(a.d);

    // Blocks over the same keys are neighbours: all but one find them in the L2 cache.
    int index = static_cast<int>(blockIdx.x);
    const int block_row = index % plan.row_blocks * plan.warps * kRows;
    index /= plan.row_blocks;
    const int split = index % plan.splits;
    const int bg = index / plan.splits;
    const int b = bg / static_cast<int>(a.g);
    const int g = bg % static_cast<int>(a.g);

    // Ranges of later queries begin and end later: the first and the last bound them all.
    const int last_row = min(block_row + plan.warps * kRows, plan.rows) - 1;
    const int split_begin = (plan.first_split + split) * kSplit;
    const int begin = max(split_begin, visible(a, b, block_row / plan.group).lo);
    const int end = min(split_begin + kSplit, visible(a, b, last_row / plan.group).hi);
    if (begin >= end) {
        return;  // the whole block; the merge knows by the rows' ranges
    }

    const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + g * a.k_stride[1];
    const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + g * a.v_stride[1];
    const Tiles<T, W> tiles(warp);
    const int first = plan.first_apart ? first_key(a, b) : -1;
    const int warp_row = block_row + warp * kRows;
    const Scratch to = scratch(a, plan);
    int lo[kRows];
    int hi[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int row = warp_row + r;
        const int query = row / plan.group;
        const bool real = row < plan.rows;
        const Range range = real ? visible(a, b, query) : Range{0, 0};
        lo[r] = range.lo;
        hi[r] = range.hi;
        const T* q = static_cast<const T*>(a.q) + b * a.q_stride[0] +
                     (g * plan.group + row % plan.group) * a.q_stride[1] + query * a.q_stride[2];
        for (int c = lane; c < W; c += kWarp) {
            tiles.q[r * W + c] = real && c < d ? to_float(q[c]) * (a.scale * kLog2e) : 0.0F;
        }
    }

    float top[kRows];
    float sum[kRows] = {};  // of this lane's keys
    float out[kRows][kOwn] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        top[r] = kNever;
    }
    const auto stage_keys = [&](int tile) {
        stage<T, W>(tiles.key, Tiles<T, W>::kPitch, k, a.k_stride[2], tile, begin, end, d,
                    plan.aligned);
    };
    const auto stage_values = [&](int tile) {
        stage<T, W>(tiles.value, W, v, a.v_stride[2], tile, begin, end, d, plan.aligned);
    };
    // One copy is always on its way while the warps work on the other.
    int tile = begin / kTile * kTile;
    stage_keys(tile);
    for (; tile < end; tile += kTile) {
        staged();  // the keys, and q
        stage_values(tile);
        float logit[kRows] = {};
        const T* key = tiles.key + lane * Tiles<T, W>::kPitch;
#pragma unroll 2
        for (int c = 0; c < W; c += kPart) {
            float x[kPart];
            load(key + c, x);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float part = 0.0F;  // short chains: rounding errors grow with their length
#pragma unroll
                for (int i = 0; i < kPart; i += 4) {
                    float y[4];
                    load(tiles.q + r * W + c + i, y);
                    part += x[i] * y[0];
                    part += x[i + 1] * y[1];
                    part += x[i + 2] * y[2];
                    part += x[i + 3] * y[3];
                }
                logit[r] += part;
            }
        }

        float shrink[kRows];
        float weight[kRows];
        const int j = tile + lane;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            bool seen = lo[r] <= j && j < hi[r];
            if (j == first && seen) {
                to.first[std::int64_t{bg} * plan.rows + warp_row + r] = logit[r];
                seen = false;
            }
            const float above = fmaxf(top[r], warp_max(seen ? logit[r] : kNever));
            const float origin = above == kNever ? 0.0F : above;  // -inf - -inf is no number
            weight[r] = seen ? exp2f(logit[r] - origin) : kHidden;
            shrink[r] = exp2f(top[r] - origin);
            sum[r] = sum[r] * shrink[r] + (seen ? weight[r] : 0.0F);
            top[r] = above;
        }
        store(weight, tiles.weight + lane * kRows);

        staged();  // the values, and this warp's weights
        stage_keys(tile + kTile);
        float more[kRows][kOwn] = {};  // from zero in each tile: short chains again
#pragma unroll 2
        for (int key_index = 0; key_index < kTile; ++key_index) {
            float p[kRows];
            load(tiles.weight + key_index * kRows, p);
#pragma unroll
            for (int c = 0; c < kOwn; c += kVector) {
                float x[kVector];
                load(tiles.value + key_index * W + c * kWarp + lane * kVector, x);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    if (!(p[r] < 0.0F)) {  // 0 times a NaN would reach rows that may not see it
#pragma unroll
                        for (int i = 0; i < kVector; ++i) {
                            more[r][c + i] += p[r] * x[i];
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int c = 0; c < kOwn; ++c) {
                out[r][c] = out[r][c] * shrink[r] + more[r][c];
            }
        }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const float total = warp_sum(sum[r]);
        const int row = warp_row + r;
        if (row < plan.rows) {
            const std::int64_t slot = (std::int64_t{bg} * plan.rows + row) * plan.splits + split;
            if (lane == 0) {
                to.partial[slot] = {top[r], total};
            }
#pragma unroll
            for (int c = 0; c < kOwn; ++c) {
                const int column = c / kVector * kVector * kWarp + lane * kVector + c % kVector;
                if (column < d) {
                    to.out[slot * a.d + column] = out[r][c];
                }
            }
        }
    }
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }

// sigmoid(ln(total 2^top) - sink), the sink in nats. A difference of numbers around 60 is rounded by
// 4e-6, which the gate would inherit: what rounding takes is put back.
__device__ float sink_gate(float top, float total, float sink) {
    const float x = __fmul_rn(sink, kLog2e);  // not part of a fused multiply-add
    const float difference = top - x;
    const float part = difference - top;
    const float low =
        (fmaf(sink, kLog2e, -x) + sink * kLog2eLow) - ((top - (difference - part)) - (x + part));
    if (difference < -256.0F) {
        return 0.0F;  // `low` may be anything
    }
    if (difference < 0.0F) {
        const float odds = total * exp2f(difference) * exp2f(-low);
        return odds / (1.0F + odds);
    }
    return 1.0F / (1.0F + exp2f(-difference) / total);
}

// One row per block: adds up its splits in a fixed order, then gates it.
template <class T>
__global__ void __launch_bounds__(kWarp* kMergers, kResident)
    decode_merge_kernel(const Args a, const Plan plan) {
    constexpr int kOwn = kMaxWidth / kWarp;
    const int lane = static_cast<int>(threadIdx.x);
    const int warp = static_cast<int>(threadIdx.y);
    const int d = static_cast<int>(a.d);
    const int bht = static_cast<int>(blockIdx.x);
    const int query = bht % static_cast<int>(a.t);
    const int bh = bht / static_cast<int>(a.t);
    const int h = bh % static_cast<int>(a.h);
    const int b = bh / static_cast<int>(a.h);
    const int g = h / plan.group;
    const std::int64_t row = (b * a.g + g) * plan.rows + query * plan.group + h % plan.group;
    const Scratch from = scratch(a, plan);

    const Range all = visible(a, b, query);
    const int first = first_key(a, b);
    const bool blind = all.lo >= all.hi;
    const bool first_seen = plan.first_apart && !blind && all.lo == first;
    const Range range = in_splits(all, first, plan);
    const int begin = range.lo / kSplit;
    const int end = range.lo < range.hi ? (range.hi - 1) / kSplit + 1 : begin;
    const std::int64_t slot = row * plan.splits - plan.first_split;

    float top = kNever;
    for (int i = begin + lane; i < end; i += kWarp) {
        top = fmaxf(top, from.partial[slot + i].max);
    }
    top = warp_max(top);
    const float origin = top == kNever ? 0.0F : top;
    float sum = 0.0F;
    float out[kOwn] = {};
    for (int i = begin + warp; i < end; i += kMergers) {
        const Partial part = from.partial[slot + i];
        const float weight = exp2f(part.max - origin);
        sum += weight * part.sum;
        const float* values = from.out + (slot + i) * a.d;
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
            if (c * kWarp + lane < d) {
                out[c] += weight * values[c * kWarp + lane];
            }
        }
    }
    float* sums = reinterpret_cast<float*>(qs_shared_memory);  // [kMergers]
    float* outs = sums + kMergers;                             // [kMergers][kMaxWidth]
    float* gates = outs + kMergers * kMaxWidth;                // [kMergers]
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
        outs[warp * kMaxWidth + c * kWarp + lane] = out[c];
    }
    if (lane == 0) {
        sums[warp] = sum;
    }
    __syncthreads();
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);

    float gate = 1.0F;
    float keep = 1.0F;  // weight of what was added up
    float first_weight = 0.0F;
    float total = sum;
    if (first_seen) {
        const float logit = from.first[row];
        top = fmaxf(top, logit);
        const float above = top == kNever ? 0.0F : top;
        keep = sum == 0.0F ? 0.0F : exp2f(origin - above);
        first_weight = exp2f(logit - above);
        total = sum * keep + first_weight;
        gate = sum * keep / total;
    }
    const float lse = total == 0.0F ? kNever : (top + log2f(total)) * kLn2;
    if (a.kind == QS_SINK) {
        gate = total == 0.0F ? 0.0F : sink_gate(top, total, a.sinks[h]);
    }
    const T* gate_row = static_cast<const T*>(a.gate);
    if (a.kind == QS_GATED) {
        gate_row += b * a.gate_stride[0] + h * a.gate_stride[1] + query * a.gate_stride[2];
    }
    float gate_sum = 0.0F;
    for (int c = warp * kWarp + lane; c < d; c += kMergers * kWarp) {
        float x =
            (outs[c] + outs[kMaxWidth + c]) + (outs[2 * kMaxWidth + c] + outs[3 * kMaxWidth + c]);
        if (first_seen) {
            const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + g * a.v_stride[1];
            x = x * keep + first_weight * to_float(v[first * a.v_stride[2] + c]);
        }
        if (a.kind == QS_GATED) {
            gate = sigmoid(to_float(gate_row[a.gate_per_element != 0 ? c : 0]));
        }
        gate_sum += gate;
        x = total == 0.0F ? 0.0F : x / total * (a.kind == QS_VANILLA ? 1.0F : gate);
        static_cast<T*>(a.out)[bht * a.d + c] = from_float<T>(blind ? 0.0F : x);
    }
    if (a.importance != nullptr) {
        gate_sum = warp_sum(gate_sum);
        if (lane == 0) {
            gates[warp] = gate_sum;
        }
        __syncthreads();
        if (lane == 0 && warp == 0) {
            a.lse[bht] = lse;
            from.gate[bht] =
                ((gates[0] + gates[1]) + (gates[2] + gates[3])) / static_cast<float>(d);
        }
    }
}

// Mean gate of one head per block of a warp. A token whose gate nobody can tell does not count.
__global__ void __launch_bounds__(kWarp) decode_importance_kernel(const Args a, const Plan plan) {
    const int lane = static_cast<int>(threadIdx.x);
    const int h = static_cast<int>(blockIdx.x);
    const int t = static_cast<int>(a.t);
    const float* gate = scratch(a, plan).gate;
    double sum = 0.0;
    double count = 0.0;
    for (int i = lane; i < static_cast<int>(a.b) * t; i += kWarp) {
        const int b = i / t;
        const Range range = in_splits(visible(a, b, i % t), first_key(a, b), plan);
        if (range.lo < range.hi && (a.token_mask == nullptr || a.token_mask[i] != 0)) {
            sum += static_cast<double>(gate[(b * a.h + h) * t + i % t]);
            count += 1.0;
        }
    }
    sum = warp_sum(sum);
    count = warp_sum(count);
    if (lane == 0) {
        a.importance[h] = count == 0.0 ? 0.0F : static_cast<float>(sum / count);
    }
}

}  // namespace
}  // namespace quernstone::cuda
