#pragma once

#include "cuda_runtime.h"

// Copies to shared memory arrive when they are waited for and not before; until then the bytes there
// are spoilt.
inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes,
                                    std::size_t zeros = 0) {
    emulation::copy_later(to, from, bytes, zeros);
}

inline void __pipeline_commit() { emulation::commit_copies(); }

inline void __pipeline_wait_prior(std::size_t groups) { emulation::finish_copies(groups); }
