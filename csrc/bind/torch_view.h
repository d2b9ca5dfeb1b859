#pragma once

#include "bind/bind.h"
#include "bind/torch_shim.h"
#include "common/view.h"

// Tensors of an operator as the core sees them.
namespace quernstone::bind {

inline void expect(const shim::Tensor& x, const char* device, const char* ndim, std::int64_t want) {
    if (!x.on_cpu()) {
        raise(invalid(device, "another device", "cpu"));
    }
    if (x.ndim() != want) {
        raise(invalid(ndim, x.ndim(), "", want));
    }
}

inline void expect_dtype(const shim::Tensor& x, const char* what, std::int32_t want) {
    if (x.dtype() != want) {
        raise(invalid(what, shim::dtype_name(x.dtype()), shim::dtype_name(want)));
    }
}

template <class T>
View<T, 2> matrix(const shim::Tensor& x) {
    auto* data = static_cast<T*>(x.data());
    const std::int64_t *shape = x.shape(), *stride = x.strides();
    // An empty tensor is present all the same.
    return {data != nullptr ? data : reinterpret_cast<T*>(alignof(T)),
            {shape[0], shape[1]},
            {stride[0], stride[1]}};
}

}  // namespace quernstone::bind
