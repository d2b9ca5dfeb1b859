#include "quant/bits.h"

namespace quernstone::quant {
namespace {

Status check(std::int64_t codes, int bits, std::int64_t packed) noexcept {
    if (bits < kMinBits || bits > kMaxBits) {
        return invalid("bits", bits, "2 to 8");
    }
    const std::int64_t want = packed_bytes(codes, bits);
    return packed == want ? Status{} : invalid("packed: bytes", packed, "", want);
}

}  // namespace

Status pack_bits(std::span<const std::uint8_t> codes, int bits,
                 std::span<std::uint8_t> packed) noexcept {
    QS_TRY(check(static_cast<std::int64_t>(codes.size()), bits,
                 static_cast<std::int64_t>(packed.size())));
    const unsigned most = (1U << static_cast<unsigned>(bits)) - 1U;
    unsigned window = 0;
    int held = 0;
    std::size_t at = 0;
    for (const std::uint8_t code : codes) {
        if (code > most) {
            return invalid("codes", code, "0 to", static_cast<std::int64_t>(most));
        }
        window |= static_cast<unsigned>(code) << static_cast<unsigned>(held);
        held += bits;
        if (held >= 8) {
            packed[at++] = static_cast<std::uint8_t>(window);
            window >>= 8U;
            held -= 8;
        }
    }
    if (held > 0) {
        packed[at] = static_cast<std::uint8_t>(window);
    }
    return {};
}

Status unpack_bits(std::span<const std::uint8_t> packed, int bits,
                   std::span<std::uint8_t> codes) noexcept {
    QS_TRY(check(static_cast<std::int64_t>(codes.size()), bits,
                 static_cast<std::int64_t>(packed.size())));
    const unsigned mask = (1U << static_cast<unsigned>(bits)) - 1U;
    unsigned window = 0;
    int held = 0;
    std::size_t at = 0;
    for (std::uint8_t& code : codes) {
        if (held < bits) {
            window |= static_cast<unsigned>(packed[at++]) << static_cast<unsigned>(held);
            held += 8;
        }
        code = static_cast<std::uint8_t>(window & mask);
        window >>= static_cast<unsigned>(bits);
        held -= bits;
    }
    return {};
}

}  // namespace quernstone::quant
