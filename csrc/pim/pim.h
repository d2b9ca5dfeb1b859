#pragma once

#include <cstddef>
#include <cstdint>

#include "common/status.h"
#include "common/view.h"

// Bit-serial macros: ones of weights, toggles of cell products, and the product itself.
// README.md has the maths.
//
// Axes: o outputs (one bank each), i inputs (one row line each), v vectors, t cycles, r tiles of
// rows, b tiles of banks.
namespace quernstone::pim {

inline constexpr int kMaxBits = 16;
inline constexpr std::int64_t kMaxRows = std::int64_t{1} << 16;
inline constexpr std::int64_t kMaxBanks = std::int64_t{1} << 16;
inline constexpr std::int64_t kBlock = 64;  // banks that are computed together, rows of a mask
inline constexpr std::int64_t kAlign = 64;  // bytes, of a Programmed's memory

// What carries out a count. All give the same integers.
enum class Formulation : std::uint8_t {
    kAuto,   // the fastest of the level
    kTable,  // sums of the patterns of four rows, looked up
    kDot,    // products of bytes in vector registers, avx512_bf16_vnni and above
    kTiles,  // products of bytes in AMX tiles, where the processor has them
};
[[nodiscard]] bool available(Formulation formulation) noexcept;

// Integers of 8 or 16 bits, signed or not, [n, i] with a contiguous last axis.
struct Integers {
    const std::byte* data = nullptr;
    std::int64_t count = 0, width = 0;
    std::int64_t stride = 0;  // elements
    bool wide = false;        // 16 bits
};

// How the row lines are driven: see quernstone.pim.Macro.
struct Lines {
    int bits = 8;
    int idle = 0;  // cycles at 0 after each vector
    bool msb_first = false;
    bool input_signed = true;
    bool cross_vector = true;
    bool zero_gating = false;

    [[nodiscard]] constexpr std::int64_t cycles() const noexcept { return bits + idle; }
};

// What the columns of a layer add up, as digits of a byte each.
enum class Content : std::uint8_t {
    kOnes,     // column o: the ones of a weight, one digit
    kWeights,  // column o: a weight, plus 2^(bits-1) where signed, in digits of 4 bits
    kRowOnes,  // column b: the ones of a row's weights in that tile of banks, in digits of 6 bits
};

// A layer as it lies in the macros. `data` belongs to the caller and is written by program().
struct Programmed {
    std::int64_t outputs = 0, inputs = 0;
    std::int64_t rows = 512, banks = 64;  // of a macro
    int weight_bits = 8;
    bool weight_signed = true;
    Content content = Content::kOnes;
    const std::byte* data = nullptr;

    [[nodiscard]] std::int64_t columns() const noexcept;
    [[nodiscard]] std::int64_t row_tiles() const noexcept;
    [[nodiscard]] std::int64_t padded_rows() const noexcept;  // of a tile
    [[nodiscard]] int digits() const noexcept;                // of a column, side by side
    [[nodiscard]] int digit_bits() const noexcept;
    [[nodiscard]] int peak() const noexcept;  // the largest digit
    [[nodiscard]] std::int64_t columns_per_block()
        const noexcept;  // whole columns in kBlock digits
    [[nodiscard]] std::int64_t blocks() const noexcept;
    [[nodiscard]] std::int64_t block_bytes() const noexcept;
    [[nodiscard]] std::int64_t bytes() const noexcept;
};

[[nodiscard]] Status check(const Programmed& layer) noexcept;
[[nodiscard]] Status check(const Lines& lines) noexcept;

// Writes layer.bytes() of `to`, which is aligned to kAlign. Weights [o, i] are within their bits.
[[nodiscard]] Status program(const Programmed& layer, const Integers& weights,
                             std::byte* to) noexcept;

struct ToggleArgs {
    Integers inputs;  // [v, i], within lines.bits
    Lines lines;
    View<std::int32_t, 3> out;  // [r, t, columns], last axis contiguous
    Formulation formulation = Formulation::kAuto;
};

// Products that toggle in each cycle, in each bank (kOnes) or macro (kRowOnes). No result depends
// on the number of threads or the formulation.
[[nodiscard]] Status toggles(const Programmed& layer, const ToggleArgs& args, int threads) noexcept;

struct MvmArgs {
    Integers inputs;  // [v, i]
    Lines lines;
    View<std::int64_t, 2> out;  // [v, o], last axis contiguous
    Formulation formulation = Formulation::kAuto;
};

// Weights (kWeights) times each vector, one input bit a cycle, shifted and added.
[[nodiscard]] Status mvm(const Programmed& layer, const MvmArgs& args, int threads) noexcept;

// Lines that change: out [v, bits + idle, i] of 0 and 1.
struct LineArgs {
    Integers inputs;
    Lines lines;
    View<std::uint8_t, 3> out;  // last axis contiguous
};
[[nodiscard]] Status line_toggles(const LineArgs& args, int threads) noexcept;

struct Ones {
    std::uint64_t ones = 0;
    bool in_range = true;  // false: an integer is not one of `bits` bits
};

// Ones of a run of integers in two's complement of `bits` bits, read once.
[[nodiscard]] Status count_ones(const Integers& run, int bits, bool is_signed, int threads,
                                Ones& out) noexcept;

// A limit for benchmarks: every thread loads `bytes`, a multiple of 512, from `at`, 64 at a time.
void load_repeatedly(const std::byte* at, std::int64_t bytes, std::int64_t repeats,
                     int threads) noexcept;

}  // namespace quernstone::pim
