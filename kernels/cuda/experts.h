#pragma once

#include <stdint.h>

// Experts of a layer on a CUDA device for a few tokens each. Plain C, called through ctypes by
// python/quernstone/moe/cuda_experts.py, which checks the arguments.
//
// Axes: p experts that have tokens, a assignments (a token at one of its experts) sorted by expert,
// t tokens, m hidden width, f feed-forward width.

enum { QS_INT8 = 8, QS_INT4 = 4 };

// All pointers but this struct's own are to device memory.
typedef struct {
    const void* data;        // packed experts, aligned to 64; csrc/gemm/README.md has the layout
    const int64_t* offsets;  // [p] bytes from data to an expert, multiples of 64
    const int32_t* begins;   // [p + 1] the first assignment of an expert
    const int32_t* tokens;   // [a] row of x
    const float* x;          // [t, m] contiguous
    float* out;              // [a, m] contiguous: down(silu(gate(x)) * up(x)), not weighted
    void* scratch;           // qs_experts_scratch() bytes, aligned to 16
    int64_t p, a, t, m, f;
    int64_t most;         // tokens of the expert that has the most
    int32_t format;       // QS_INT4 or QS_INT8
    int32_t group;        // QS_INT4: inputs that share a scale, 32, 64 or 128
    int32_t zero_points;  // QS_INT4: a byte beside each scale; else code 8 is zero
} QsExperts;

#if defined(__cplusplus)
extern "C" {
#endif

// sizeof(QsExperts), for a caller that wrote the struct down in another language.
int64_t qs_experts_struct_bytes(void);

// Bytes of scratch memory that the call needs. Reads the extents and the format.
int64_t qs_experts_scratch(const QsExperts* args);

// Each queues its half of a call on the stream (a cudaStream_t), the first one what reads gate and up,
// the second one what reads down; between them are the caller's own waits. Null, or a literal that
// says what failed. A result has the bits of the CPU's arithmetic with activations of 8 bits,
// whatever the other tokens.
const char* qs_experts_gate_up(const QsExperts* args, void* stream);
const char* qs_experts_down(const QsExperts* args, void* stream);

#if defined(__cplusplus)
}
#endif
