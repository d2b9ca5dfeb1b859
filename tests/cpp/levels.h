#pragma once

#include "check.h"
#include "common/cpu.h"

namespace quernstone {

template <class Body>
void at_every_level(Body body) {
    const Isa before = active_isa();
    for (const Isa isa : available_isas()) {
        CHECK(set_isa(isa_name(isa)));
        body();
    }
    CHECK(set_isa(isa_name(before)));
}

}  // namespace quernstone
