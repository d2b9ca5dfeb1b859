#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "pim/kernel.h"

namespace quernstone::pim::avx2 {
namespace {

#include "pim/avx2_primitives.inl"
#include "pim/count_kernel.inl"
#include "pim/few_kernel.inl"

}  // namespace

const Kernels kKernels{extract8, extract16, masks, table, few, ones, loads, shift_add};

}  // namespace quernstone::pim::avx2
