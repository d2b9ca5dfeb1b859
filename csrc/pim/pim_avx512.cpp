#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "pim/kernel.h"

namespace quernstone::pim::avx512 {
namespace {

#include "pim/avx512_primitives.inl"
#include "pim/count_kernel.inl"

// 2 * 128 * 127 is below 2^15.
inline reg dot(reg sum, reg bytes, reg digits) {
    return _mm512_add_epi32(
        sum, _mm512_madd_epi16(_mm512_maddubs_epi16(bytes, digits), _mm512_set1_epi16(1)));
}

#include "pim/avx512_few.inl"
#include "pim/few_kernel.inl"

}  // namespace

const Kernels kKernels{extract8, extract16, masks, table, few, ones, loads, shift_add};

}  // namespace quernstone::pim::avx512
