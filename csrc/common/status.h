#pragma once

#include <cstdint>

namespace quernstone {

enum class Code : std::uint8_t { kOk, kInvalid, kNoMemory };

// What went wrong, without allocating: every text is a literal. Reads as
// "<what>: got <got_text or got>, expected <want_text> <want>".
struct Status {
    Code code = Code::kOk;
    const char* what = nullptr;
    const char* got_text = nullptr;  // null: the number `got` is the text
    std::int64_t got = 0;
    const char* want_text = "";
    std::int64_t want = 0;
    bool want_has_number = false;

    [[nodiscard]] constexpr bool ok() const noexcept { return code == Code::kOk; }
};

constexpr Status invalid(const char* what, std::int64_t got, const char* want) noexcept {
    return {Code::kInvalid, what, nullptr, got, want, 0, false};
}

constexpr Status invalid(const char* what, std::int64_t got, const char* want,
                         std::int64_t number) noexcept {
    return {Code::kInvalid, what, nullptr, got, want, number, true};
}

constexpr Status invalid(const char* what, const char* got, const char* want) noexcept {
    return {Code::kInvalid, what, got, 0, want, 0, false};
}

constexpr Status no_memory(const char* what, std::int64_t bytes) noexcept {
    return {Code::kNoMemory, what, nullptr, bytes, "that many bytes of memory", 0, false};
}

}  // namespace quernstone

// Returns what is not ok.
#define QS_TRY(expression)                                            \
    do {                                                              \
        if (const Status qs_status = (expression); !qs_status.ok()) { \
            return qs_status;                                         \
        }                                                             \
    } while (false)
