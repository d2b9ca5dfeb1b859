#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "pim/kernel.h"

namespace quernstone::pim::baseline {
namespace {

// Eight bytes in a word: no byte of a sum runs over, since the runs are short enough.
using reg = std::uint64_t;
constexpr int kRegBytes = 8;
constexpr int kParts = 8;
constexpr std::int64_t kFar = 0;
constexpr reg kOnesOfBytes = 0x0101010101010101U;
constexpr reg kLow16 = 0x00ff00ff00ff00ffU;

inline reg load(const std::uint8_t* p) {
    reg x = 0;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(std::uint8_t* p, reg x) { std::memcpy(p, &x, sizeof x); }
inline reg zero() { return 0; }
inline reg add8(reg a, reg b) { return a + b; }
// What does not fit a byte is lost.
inline reg twice8(reg x) { return (x & 0x7f7f7f7f7f7f7f7fU) << 1U; }
// Lanes of 16 bits that may run over.
inline reg add16(reg a, reg b) {
    constexpr reg kTop = 0x8000800080008000U;
    return ((a & ~kTop) + (b & ~kTop)) ^ ((a ^ b) & kTop);
}
inline reg add64(reg a, reg b) { return a + b; }
inline reg and_(reg a, reg b) { return a & b; }
inline reg or_(reg a, reg b) { return a | b; }
inline reg andnot(reg a, reg b) { return ~a & b; }
inline reg xor_(reg a, reg b) { return a ^ b; }
// What crosses from byte to byte is masked away, or is nothing.
inline reg shift_right(reg a, int n) { return a >> n; }
inline reg shift_left(reg a, int n) { return a << n; }
// 255 where a byte is 0.
inline reg zero_bytes(reg a) {
    constexpr reg kLow7 = 0x7f7f7f7f7f7f7f7fU;
    const reg top = ~(((a & kLow7) + kLow7) | a | kLow7);
    return (top >> 7U) * 255U;
}
inline reg high16(reg a) { return (a >> 8U) & kLow16; }
inline reg set8(std::uint8_t x) { return x * kOnesOfBytes; }
inline reg set_word(std::uint8_t x) { return set8(x); }
inline reg set_word(std::uint16_t x) { return x * reg{0x0001000100010001U}; }
template <class U>
inline reg add_word(reg a, reg b) {
    if constexpr (sizeof(U) == 1) {
        constexpr reg kTop = 0x8080808080808080U;
        return ((a & ~kTop) + (b & ~kTop)) ^ ((a ^ b) & kTop);
    } else {
        return add16(a, b);
    }
}
inline void prefetch(const std::byte* /*p*/) {}
inline reg popcount8(reg x) {
    constexpr reg kPairs = 0x5555555555555555U;
    constexpr reg kFours = 0x3333333333333333U;
    constexpr reg kEights = 0x0f0f0f0f0f0f0f0fU;
    x -= (x >> 1U) & kPairs;
    x = (x & kFours) + ((x >> 2U) & kFours);
    return (x + (x >> 4U)) & kEights;
}
inline reg sum_bytes(reg x) {
    return (((x & kLow16) + ((x >> 8U) & kLow16)) * 0x0001000100010001U) >> 48U;
}
inline std::uint64_t sum64(reg x) { return x; }
inline bool any(reg x) { return x != 0; }
inline std::uint64_t mask64(const std::uint8_t* p, int bit) {
    static_assert(std::endian::native == std::endian::little);
    std::uint64_t mask = 0;
    for (int i = 0; i < 8; ++i) {
        // The lowest bits of eight bytes, gathered in the highest byte.
        const reg bits = (load(p + 8 * i) >> bit) & kOnesOfBytes;
        mask |= ((bits * 0x0102040810204080U) >> 56U) << (8 * i);
    }
    return mask;
}
// Kept in one sum: the byte is a power of two or 0.
inline reg dot(reg sum, reg bytes, reg digits) {
    for (int i = 0; i < 64; i += 8) {
        sum += ((bytes >> i) & 255U) * ((digits >> i) & 255U);
    }
    return sum;
}
inline reg shift32(reg x) { return x << 6U; }
inline reg add32(reg a, reg b) { return a + b; }
// That of the k-th shifted right by k.
inline void eight_sums(reg a, reg b, reg c, reg d, reg e, reg f, reg g, reg h, std::int32_t* out) {
    const reg sums[8] = {a, b, c, d, e, f, g, h};
    for (unsigned k = 0; k < 8; ++k) {
        out[k] = static_cast<std::int32_t>(sums[k] >> k);
    }
}

#include "pim/count_kernel.inl"
#include "pim/few_kernel.inl"

}  // namespace

const Kernels kKernels{extract8, extract16, masks, table, few, ones, loads, shift_add};

}  // namespace quernstone::pim::baseline
