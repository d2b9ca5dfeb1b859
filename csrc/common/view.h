#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace quernstone {

// A strided array that somebody else owns. Strides count elements and may be
// zero (broadcast) or negative. Plain enough for device code.
template <class T, int N>
struct View {
    T* data = nullptr;
    std::array<std::int64_t, N> extent{};
    std::array<std::int64_t, N> stride{};

    [[nodiscard]] constexpr bool present() const noexcept { return data != nullptr; }

    template <class... I>
    [[nodiscard]] constexpr T* at(I... index) const noexcept {
        static_assert(sizeof...(I) == N);
        const std::array<std::int64_t, N> i{static_cast<std::int64_t>(index)...};
        std::int64_t offset = 0;
        for (std::size_t axis = 0; axis < N; ++axis) {
            offset += i[axis] * stride[axis];
        }
        return data + offset;
    }
};

}  // namespace quernstone
