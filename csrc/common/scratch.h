#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace quernstone {

inline constexpr std::size_t kCacheLine = 64;

// One buffer a thread, kept between calls: a fresh mapping for every call
// would cost more than a short kernel. Freed when the thread ends; a buffer
// above kKeep is given back by release_large().
class Scratch {
   public:
    static constexpr std::size_t kKeep = std::size_t{8} << 20;

    // Null where the memory is not to be had.
    [[nodiscard]] std::byte* reserve(std::size_t bytes) noexcept {
        if (bytes > size_) {
            const std::size_t rounded = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
            buffer_.reset(static_cast<std::byte*>(std::aligned_alloc(kCacheLine, rounded)));
            size_ = buffer_ ? rounded : 0;
        }
        return buffer_.get();
    }

    void release_large() noexcept {
        if (size_ > kKeep) {
            buffer_.reset();
            size_ = 0;
        }
    }

    static Scratch& of_this_thread() noexcept {
        thread_local Scratch scratch;
        return scratch;
    }

   private:
    struct Free {
        void operator()(std::byte* p) const noexcept { std::free(p); }
    };
    std::unique_ptr<std::byte, Free> buffer_;
    std::size_t size_ = 0;
};

}  // namespace quernstone
