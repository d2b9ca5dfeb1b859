#pragma once

#include <pybind11/numpy.h>

#include <string>

#include "bind/bind.h"
#include "common/view.h"

namespace quernstone::bind {

// numpy arrays as they come: nothing is converted or copied, the dtype is Python's to check.
template <class T>
using Array = pybind11::array_t<T, 0>;

template <class T, int N>
View<T, N> view(const Array<std::remove_const_t<T>>& array, const char* name) {
    if (array.ndim() != N) {
        raise(invalid((std::string(name) + ".ndim").c_str(), array.ndim(), "", N));
    }
    View<T, N> out;
    out.data = const_cast<T*>(static_cast<const T*>(array.data()));
    for (int i = 0; i < N; ++i) {
        const auto axis = static_cast<std::size_t>(i);
        out.extent[axis] = array.shape(i);
        out.stride[axis] = array.strides(i) / static_cast<std::int64_t>(sizeof(T));
    }
    if (out.data == nullptr) {
        out.data = reinterpret_cast<T*>(alignof(T));  // an empty array is present all the same
    }
    return out;
}

// The same of an array that is written to.
template <class T, int N>
View<T, N> output(Array<T>& array, const char* name) {
    if (!array.writeable()) {
        raise(invalid(name, "a read-only array", "one that can be written"));
    }
    return view<T, N>(array, name);
}

}  // namespace quernstone::bind
