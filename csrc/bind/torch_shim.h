#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

// torch's C shim, resolved when the extension is imported: neither a header
// nor a library of torch is needed to build. Needs torch >= 2.10.
namespace quernstone::shim {

using Handle = void*;
using Boxed = std::uint64_t;  // one slot of an operator's stack
using Kernel = void (*)(Boxed* stack, std::uint64_t inputs, std::uint64_t outputs);

// Opens libtorch_cpu (already loaded by `import torch`) and hands its thread
// pool to parallel_for. False where that was done before: the core outlives a
// Python package that is imported again. Throws std::runtime_error naming what
// is missing.
bool load(const std::string& libtorch_cpu);

void define(const char* schema);
void implement_cpu(const char* name, Kernel kernel);

// Owns one reference to a tensor.
class Tensor {
   public:
    Tensor() = default;
    explicit Tensor(Handle handle) : handle_(handle) {}
    Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    ~Tensor();

    [[nodiscard]] void* data() const;
    [[nodiscard]] std::int64_t ndim() const;
    [[nodiscard]] const std::int64_t* shape() const;
    [[nodiscard]] const std::int64_t* strides() const;
    [[nodiscard]] std::int32_t dtype() const;
    [[nodiscard]] bool on_cpu() const;
    [[nodiscard]] Boxed release() {
        return reinterpret_cast<Boxed>(std::exchange(handle_, nullptr));
    }

   private:
    Handle handle_ = nullptr;
};

// Contiguous and uninitialised, on the CPU.
[[nodiscard]] Tensor empty(std::int64_t ndim, const std::int64_t* shape, std::int32_t dtype);

namespace dtype {  // c10::ScalarType
inline constexpr std::int32_t kUInt8 = 0, kInt32 = 3, kInt64 = 4, kFloat32 = 6, kBool = 11,
                              kBFloat16 = 15;
}
[[nodiscard]] const char* dtype_name(std::int32_t dtype);

[[nodiscard]] std::string take_string(Boxed slot);

template <class T>
T unbox(Boxed slot) {
    static_assert(sizeof(T) <= sizeof(Boxed));
    T value{};
    std::memcpy(&value, &slot, sizeof value);
    return value;
}

// An optional arrives as null or as a slot on the heap that the callee owns.
inline std::optional<Boxed> take_optional(Boxed slot) {
    auto* inner = reinterpret_cast<Boxed*>(slot);
    if (inner == nullptr) {
        return std::nullopt;
    }
    const Boxed value = *inner;
    delete inner;
    return value;
}

inline std::optional<Tensor> take_optional_tensor(Boxed slot) {
    const auto inner = take_optional(slot);
    return inner ? std::optional<Tensor>(reinterpret_cast<Handle>(*inner)) : std::nullopt;
}

}  // namespace quernstone::shim
