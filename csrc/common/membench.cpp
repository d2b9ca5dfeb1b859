#include "common/membench.h"

#include <atomic>
#include <chrono>
#include <cstring>

#include "common/parallel.h"

#if defined(QS_HAVE_X86)
#include <emmintrin.h>
#endif

namespace quernstone {
namespace {

constexpr std::int64_t kLine = 64;
constexpr std::int64_t kPiece = std::int64_t{4} << 20;

inline void prefetch_line(const std::byte* p) noexcept { __builtin_prefetch(p, 0, 0); }

// The last piece's end beyond a multiple of the streams is left out: less than a page in a gigabyte.
std::uint64_t read_piece(const std::byte* p, std::int64_t bytes, std::int64_t prefetch,
                         int streams) noexcept {
    const std::int64_t part = bytes / streams / kLine * kLine;
#if defined(QS_HAVE_X86)
    __m128i a = _mm_setzero_si128();
    __m128i b = a;
    for (std::int64_t i = 0; i < part; i += kLine) {
        for (int s = 0; s < streams; ++s) {
            const std::byte* line = p + s * part + i;
            if (prefetch > 0) {
                prefetch_line(line + prefetch);
            }
            const auto* v = reinterpret_cast<const __m128i*>(line);
            a = _mm_xor_si128(a, _mm_xor_si128(_mm_loadu_si128(v), _mm_loadu_si128(v + 1)));
            b = _mm_xor_si128(b, _mm_xor_si128(_mm_loadu_si128(v + 2), _mm_loadu_si128(v + 3)));
        }
    }
    return static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm_xor_si128(a, b)));
#else
    std::uint64_t sum = 0;
    for (std::int64_t i = 0; i < part; i += 8) {
        for (int s = 0; s < streams; ++s) {
            const std::byte* at = p + s * part + i;
            if (prefetch > 0 && i % kLine == 0) {
                prefetch_line(at + prefetch);
            }
            std::uint64_t word = 0;
            std::memcpy(&word, at, sizeof word);
            sum ^= word;
        }
    }
    return sum;
#endif
}

void copy_piece(std::byte* to, const std::byte* from, std::int64_t bytes,
                std::int64_t prefetch) noexcept {
#if defined(QS_HAVE_X86)
    for (std::int64_t i = 0; i + kLine <= bytes; i += kLine) {
        if (prefetch > 0) {
            prefetch_line(from + i + prefetch);
        }
        const auto* s = reinterpret_cast<const __m128i*>(from + i);
        auto* d = reinterpret_cast<__m128i*>(to + i);
        const __m128i w0 = _mm_loadu_si128(s);
        const __m128i w1 = _mm_loadu_si128(s + 1);
        const __m128i w2 = _mm_loadu_si128(s + 2);
        const __m128i w3 = _mm_loadu_si128(s + 3);
        _mm_stream_si128(d, w0);
        _mm_stream_si128(d + 1, w1);
        _mm_stream_si128(d + 2, w2);
        _mm_stream_si128(d + 3, w3);
    }
    _mm_sfence();
#else
    (void)prefetch;
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
#endif
}

template <class Piece>
double timed(std::int64_t bytes, Piece piece) noexcept {
    const auto start = std::chrono::steady_clock::now();
    parallel_for((bytes + kPiece - 1) / kPiece, num_threads(), [&](std::int64_t i) noexcept {
        const std::int64_t begin = i * kPiece;
        piece(begin, bytes - begin < kPiece ? bytes - begin : kPiece);
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

std::atomic<std::uint64_t> sink{0};  // keeps the reads

}  // namespace

double seconds_to_read(const std::byte* from, std::int64_t bytes, std::int64_t prefetch,
                       int streams) noexcept {
    return timed(bytes, [=](std::int64_t begin, std::int64_t n) noexcept {
        sink.fetch_xor(read_piece(from + begin, n, prefetch, streams), std::memory_order_relaxed);
    });
}

double seconds_to_copy(std::byte* to, const std::byte* from, std::int64_t bytes,
                       std::int64_t prefetch) noexcept {
    return timed(bytes, [=](std::int64_t begin, std::int64_t n) noexcept {
        copy_piece(to + begin, from + begin, n, prefetch);
    });
}

}  // namespace quernstone
