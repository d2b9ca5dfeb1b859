#include "common/parallel.h"

namespace quernstone {

Pool& pool() noexcept {
    static Pool instance;
    return instance;
}

int num_threads() noexcept {
    const Pool& p = pool();
    return p.threads != nullptr ? p.threads() : 1;
}

}  // namespace quernstone
