#include "pim/tree_kernel.h"

namespace quernstone::pim {
namespace tree_avx512 {

#include "pim/tree_kernel.inl"

}  // namespace tree_avx512

const TreeKernels kTreeAvx512 = {&tree_avx512::add, &tree_avx512::accumulate};

}  // namespace quernstone::pim
