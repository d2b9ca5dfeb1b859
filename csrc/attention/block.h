#pragma once

#include <cstddef>
#include <cstdint>

// What the driver hands to a kernel: plain data and no inline code, so that
// nothing compiled for one instruction set can be linked into another.
namespace quernstone::attention {

enum class GateShape : std::uint8_t { kNone, kPerRow, kPerElement };

struct Row {              // one query of one head
    const void* q;        // [d]
    const void* gate;     // [1 or d] logits, or null
    void* out;            // [d], contiguous
    float* lse;           // or null
    float* gate_logit;    // of the vanilla gate, or null
    float sink;           // logit in nats, -inf where there is none
    std::int32_t lo, hi;  // sees keys lo <= j < hi; neither falls from row to row
    bool sees_first;      // and Block::first_key
};

// A panel's window of a few hundred keys would straddle most borders of the
// shorter steps. Both are multiples of every tile height.
inline constexpr std::int64_t kBlockKeys = 144, kWindowBlockKeys = 288;

// Query rows of one key head. With grouped queries the rows of a group are
// neighbours (query-major), so that a panel of them spans few positions.
struct Block {
    const Row* rows;
    float* gates;  // [row_count] mean gate of each row, or null where nobody asks
    std::int64_t row_count;
    const void* k;  // key 0
    const void* v;
    std::int64_t q_col, k_row, k_col, v_row, v_col, gate_col;  // strides in elements
    std::int64_t width;
    std::int64_t block_keys;  // keys a step of the online softmax takes: one of the two below
    float scale;
    GateShape gate;
    // The key that the vanilla gate weighs against all others. It is kept out
    // of every row's [lo, hi) and merged last. -1: none.
    std::int32_t first_key;
};

// A panel holds one query row per vector lane.
struct Kernel {
    std::int64_t lanes;
    std::size_t (*scratch_bytes)(std::int64_t rows, std::int64_t width);
    void (*run)(const Block& block, std::byte* scratch);
};

// Backward: what one query row adds to the gradients of the keys it sees, and
// they to its own. With A = softmax over the visible keys,
//   dS_j = A_j (v_j . (weight dout) + shift),
// where `weight` and `shift` hold everything that sinks, gates and the
// gradients of the log-sum-exp and the importance bring. README.md derives them.
struct GradRow {
    const void* q;      // [d]
    const void* dout;   // [d]
    const void* gate;   // [d] logits of an element-wise gate on dout, or null
    float* dq;          // [d] sum so far, contiguous
    float lse;          // nats
    float weight;       // factor on dout
    float shift;        // added to v . dout for every key ...
    float first_shift;  // ... but this for GradBlock::first_key
    std::int32_t lo, hi;
};

struct GradBlock {
    const void* k;  // key 0
    const void* v;
    std::int64_t q_col, dout_col, gate_col, k_row, k_col, v_row, v_col;
    std::int64_t width;
    std::int64_t begin, end;            // the keys of this block, at most kGradKeys
    std::int64_t seen_begin, seen_end;  // the keys that some row of the head sees
    float* dk;                          // [end - begin][padded width] sums so far
    float* dv;
    float scale;
    std::int32_t first_key;  // -1: none
};

inline constexpr std::int64_t kGradKeys = 144;  // a multiple of every tile height
inline constexpr std::int64_t kGradRows = 64;   // a multiple of every wide panel

struct GateRow {       // an element-wise gate of one query row
    const void* gate;  // [d] logits
    const void* out;   // [d] gate times attention
    const void* dout;  // [d]
    void* dgate;       // [d], contiguous
    std::int64_t gate_col, out_col, dout_col;
    std::int64_t width;
    float mean;  // gradient of each gate by itself
};

// load() reads the keys of a block; rows() then takes up to kGradRows query rows
// at a time, with the same scratch. gate() makes dgate = (1 - G) (dout out + G mean).
struct GradKernel {
    std::int64_t (*padded)(std::int64_t width);
    std::size_t (*scratch_bytes)(std::int64_t width);
    void (*load)(const GradBlock& block, std::byte* scratch);
    void (*rows)(const GradBlock& block, const GradRow* rows, std::int64_t count,
                 std::byte* scratch);
    void (*gate)(const GateRow& row);
};

// `narrow` holds fewer rows a panel: for a handful of rows, or a small window,
// where a wide panel would compute what nobody sees.
struct Kernels {
    Kernel wide, narrow;
};

namespace baseline {
extern const Kernels kF32, kBf16;
extern const GradKernel kGradF32, kGradBf16;
}  // namespace baseline
namespace avx2 {
extern const Kernels kF32, kBf16;
extern const GradKernel kGradF32, kGradBf16;
}  // namespace avx2
namespace avx512 {
extern const Kernels kF32, kBf16;
extern const GradKernel kGradF32, kGradBf16;
}  // namespace avx512
namespace avx512_bf16_vnni {
extern const Kernels kBf16;
extern const GradKernel kGradBf16;
}  // namespace avx512_bf16_vnni

}  // namespace quernstone::attention
