#pragma once

#include <string>

#include "bind/array.h"
#include "gemm/gemm.h"

namespace quernstone::bind {

gemm::Format parse_format(const std::string& format);
gemm::Compute parse_compute(const std::string& compute);

// The memory of packed weights, when there are `want` bytes of it and it is aligned.
std::byte* packed_bytes(const Array<std::uint8_t>& packed, std::int64_t want, const char* name);

template <class V>
void expect_rows(const V& view, const char* name) {
    if (view.extent[0] > 0 && view.extent[1] > 1 && view.stride[1] != 1) {
        raise(invalid(name, "a strided last axis", "a contiguous last axis"));
    }
}

template <class T>
View<T, 2> rows_of(const Array<std::remove_const_t<T>>& array, const char* name) {
    const auto out = view<T, 2>(array, name);
    expect_rows(out, name);
    return out;
}

}  // namespace quernstone::bind
