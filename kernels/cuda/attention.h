#pragma once

#include <stdint.h>

// The attention decode step on a CUDA device: a few queries against a long cache of keys. Plain C,
// called through ctypes by python/quernstone/attention/cuda_decode.py, which checks the arguments.
//
// Axes: b batch, h query heads, g key heads (h % g == 0), t queries, s keys, d head width.

enum { QS_F32 = 0, QS_F16 = 1, QS_BF16 = 2 };
enum { QS_SINK = 0, QS_VANILLA = 1, QS_GATED = 2 };

// Strides count elements, those of the axes before the last: the last axis is contiguous. All
// pointers but this struct's own are to device memory; "may be null" says which are optional.
typedef struct {
    const void* q;               // [b, h, t, d]
    const void *k, *v;           // [b, g, s, d]
    const void* gate;            // [b, h, t, 1 or d] logits, dtype of q; QS_GATED only, else null
    const float* sinks;          // [h] nats; QS_SINK only, else null
    const int64_t* key_start;    // [b] first visible key, clamped to 0..s; may be null
    const int64_t* key_lengths;  // [b] end of the visible keys, clamped to 0..s; may be null
    const uint8_t* token_mask;   // [b, t] contiguous, not 0: counts; may be null
    void* out;                   // [b, h, t, d] contiguous
    float* lse;                  // [b, h, t] contiguous, nats; null: no lse and no importance
    float* importance;           // [h]; null exactly where lse is
    void* scratch;               // qs_attention_decode_scratch() bytes, aligned to 16
    int64_t b, h, g, t, s, d;    // 16 <= d <= 256; s and t below 2^31
    int64_t q_stride[3], k_stride[3], v_stride[3], gate_stride[3];
    int64_t window;  // keys a query sees up to its own position, below 2^32; 0: all
    float scale;
    int32_t dtype, kind;
    int32_t causal;            // query i sees keys j <= i + s - t
    int32_t gate_per_element;  // gate is [b, h, t, d]
} QsAttentionDecode;

#if defined(__cplusplus)
extern "C" {
#endif

// sizeof(QsAttentionDecode), for a caller that wrote the struct down in another language.
int64_t qs_attention_decode_struct_bytes(void);

// Bytes of scratch memory that the call needs. Reads the extents and the window.
int64_t qs_attention_decode_scratch(const QsAttentionDecode* args);

// Queues the kernels on the stream (a cudaStream_t). Null, or a literal that says what failed.
// Results do not depend on the device, the batch, or which queries come along.
const char* qs_attention_decode(const QsAttentionDecode* args, void* stream);

#if defined(__cplusplus)
}
#endif
