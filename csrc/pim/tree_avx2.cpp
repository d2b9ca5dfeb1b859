#include "pim/tree_kernel.h"

namespace quernstone::pim {
namespace tree_avx2 {

#include "pim/tree_kernel.inl"

}  // namespace tree_avx2

const TreeKernels kTreeAvx2 = {&tree_avx2::add, &tree_avx2::accumulate};

}  // namespace quernstone::pim
