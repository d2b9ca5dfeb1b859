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

// `narrow` holds fewer rows a panel: for a handful of rows, or a small window,
// where a wide panel would compute what nobody sees.
struct Kernels {
    Kernel wide, narrow;
};

namespace baseline {
extern const Kernels kF32, kBf16;
}
namespace avx2 {
extern const Kernels kF32, kBf16;
}
namespace avx512 {
extern const Kernels kF32, kBf16;
}
namespace avx512_bf16_vnni {
extern const Kernels kBf16;
}

}  // namespace quernstone::attention
