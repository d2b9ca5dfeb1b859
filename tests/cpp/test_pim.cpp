#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "common/cpu.h"
#include "levels.h"
#include "pim/pim.h"

using namespace quernstone;
using namespace quernstone::pim;

namespace {

constexpr Formulation kAll[] = {Formulation::kAuto, Formulation::kTable, Formulation::kDot,
                                Formulation::kTiles};

// Exactly as large as the contract says, so that a sanitizer sees a read or write beyond.
template <class T>
std::vector<T> drawn(std::int64_t n, std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<T> out(static_cast<std::size_t>(n));
    std::generate(out.begin(), out.end(), [&] { return static_cast<T>(random()); });
    return out;
}

template <class T>
Integers of(const std::vector<T>& data, std::int64_t count, std::int64_t width) {
    return {reinterpret_cast<const std::byte*>(data.data()), count, width, width, sizeof(T) == 2};
}

struct Free {
    void operator()(std::byte* p) const { std::free(p); }
};
using Memory = std::unique_ptr<std::byte, Free>;

Memory programmed(Programmed& layer, const Integers& weights) {
    const std::int64_t bytes = (layer.bytes() + kAlign - 1) / kAlign * kAlign;
    Memory memory(static_cast<std::byte*>(
        std::aligned_alloc(static_cast<std::size_t>(kAlign), static_cast<std::size_t>(bytes))));
    CHECK(program(layer, weights, memory.get()).ok());
    layer.data = memory.get();
    return memory;
}

// Lowest bit first, lines held between vectors.
template <class T>
std::int64_t toggled(const std::vector<T>& w, const std::vector<T>& x, const Programmed& layer,
                     const Lines& lines, std::int64_t r, std::int64_t t, std::int64_t o) {
    const std::int64_t n = layer.inputs;
    std::int64_t count = 0;
    const auto level = [&](std::int64_t cycle, std::int64_t i) {
        const std::int64_t v = cycle / lines.bits;
        return cycle < 0 ? 0 : (x[static_cast<std::size_t>(v * n + i)] >> (cycle % lines.bits)) & 1;
    };
    for (std::int64_t i = r * layer.rows; i < std::min(n, (r + 1) * layer.rows); ++i) {
        if (level(t, i) != level(t - 1, i)) {
            const auto cells = static_cast<std::uint32_t>(w[static_cast<std::size_t>(o * n + i)]);
            count += std::popcount(cells & ((1U << static_cast<unsigned>(layer.weight_bits)) - 1U));
        }
    }
    return count;
}

template <class T>
void toggles_are_those_of_each_cell() {
    constexpr int kBits = 8 * sizeof(T);
    for (const auto& [outputs, inputs, vectors] :
         {std::array{1, 1, 1}, std::array{65, 130, 5}, std::array{64, 64, 9}}) {
        const auto w = drawn<T>(outputs * inputs, 1);
        const auto x = drawn<T>(vectors * inputs, 2);
        Programmed layer{outputs, inputs, 100, 64, kBits, true, Content::kOnes, nullptr};
        const Memory memory = programmed(layer, of(w, outputs, inputs));
        Lines lines;
        lines.bits = kBits;
        const std::int64_t cycles = vectors * lines.cycles();
        for (const Formulation formulation : kAll) {
            if (!available(formulation)) {
                continue;
            }
            const std::int64_t size = layer.row_tiles() * cycles * outputs;
            std::vector<std::int32_t> out(static_cast<std::size_t>(size), -1);
            const View<std::int32_t, 3> view{
                out.data(), {layer.row_tiles(), cycles, outputs}, {cycles * outputs, outputs, 1}};
            CHECK(toggles(layer, {of(x, vectors, inputs), lines, view, formulation}, 2).ok());
            for (std::int64_t at = 0; at < size; ++at) {
                const std::int64_t o = at % outputs;
                const std::int64_t t = at / outputs % cycles;
                const std::int64_t r = at / outputs / cycles;
                CHECK_EQ(out[static_cast<std::size_t>(at)], toggled(w, x, layer, lines, r, t, o));
            }
        }
    }
}

template <class T>
void products_are_those_of_integers() {
    constexpr int kBits = 8 * sizeof(T);
    constexpr std::int64_t kOutputs = 35;
    constexpr std::int64_t kInputs = 203;
    constexpr std::int64_t kVectors = 7;
    const auto w = drawn<T>(kOutputs * kInputs, 3);
    const auto x = drawn<T>(kVectors * kInputs, 4);
    Programmed layer{kOutputs, kInputs, 64, 64, kBits, true, Content::kWeights, nullptr};
    const Memory memory = programmed(layer, of(w, kOutputs, kInputs));
    Lines lines;
    lines.bits = kBits;
    for (const Formulation formulation : kAll) {
        if (!available(formulation)) {
            continue;
        }
        std::vector<std::int64_t> out(kOutputs * kVectors, -1);
        const View<std::int64_t, 2> view{out.data(), {kVectors, kOutputs}, {kOutputs, 1}};
        CHECK(mvm(layer, {of(x, kVectors, kInputs), lines, view, formulation}, 2).ok());
        for (std::int64_t v = 0; v < kVectors; ++v) {
            for (std::int64_t o = 0; o < kOutputs; ++o) {
                std::int64_t want = 0;
                for (std::int64_t i = 0; i < kInputs; ++i) {
                    want += std::int64_t{w[static_cast<std::size_t>(o * kInputs + i)]} *
                            x[static_cast<std::size_t>(v * kInputs + i)];
                }
                CHECK_EQ(out[static_cast<std::size_t>(v * kOutputs + o)], want);
            }
        }
    }
}

template <class T>
void ones_are_those_of_each_integer() {
    for (const std::int64_t n : {0, 1, 31, 64, 65, 4001}) {
        const auto x = drawn<T>(n, 5);
        std::uint64_t want = 0;
        for (const T value : x) {
            want += static_cast<std::uint64_t>(
                std::popcount(static_cast<std::uint32_t>(value) & ((1ULL << 8 * sizeof(T)) - 1)));
        }
        Ones ones;
        CHECK(count_ones(of(x, n, 1), 8 * sizeof(T), true, 2, ones).ok());
        CHECK_EQ(ones.ones, want);
        CHECK(ones.in_range);
        if (n > 64) {
            CHECK(count_ones(of(x, n, 1), 3, true, 2, ones).ok());
            CHECK(!ones.in_range);
        }
    }
}

}  // namespace

TEST(pim_toggles_are_those_of_each_cell) {
    at_every_level([] {
        toggles_are_those_of_each_cell<std::int8_t>();
        toggles_are_those_of_each_cell<std::int16_t>();
    });
}

TEST(pim_products_are_those_of_integers) {
    at_every_level([] {
        products_are_those_of_integers<std::int8_t>();
        products_are_those_of_integers<std::int16_t>();
    });
}

TEST(pim_ones_are_those_of_each_integer) {
    at_every_level([] {
        ones_are_those_of_each_integer<std::int8_t>();
        ones_are_those_of_each_integer<std::int16_t>();
    });
}

TEST(pim_refuses_what_does_not_fit_before_it_reads) {
    Programmed layer{4, 8, 0, 64, 8, true, Content::kOnes, nullptr};
    CHECK_EQ(pim::check(layer).what, std::string("rows"));
    layer.rows = 8;
    layer.weight_bits = 17;
    CHECK_EQ(pim::check(layer).what, std::string("weight_bits"));
    layer.weight_bits = 8;
    CHECK(pim::check(layer).ok());
    Lines lines;
    lines.bits = 0;
    CHECK_EQ(pim::check(lines).what, std::string("input_bits"));
    lines.bits = 9;
    const Integers narrow{nullptr, 2, 8, 8, false};
    const View<std::int32_t, 3> out{nullptr, {1, 18, 4}, {72, 4, 1}};
    CHECK(!toggles(layer, {narrow, lines, out, Formulation::kAuto}, 1).ok());
    lines.bits = 8;
    const Integers thin{nullptr, 2, 7, 8, false};
    CHECK_EQ(toggles(layer, {thin, lines, out, Formulation::kAuto}, 1).what,
             std::string("inputs.shape[1]"));
    CHECK_EQ(toggles(layer, {narrow, lines, out, Formulation::kAuto}, 1).what,
             std::string("out.shape[1]"));
    Ones ones;
    CHECK(!count_ones(narrow, 9, true, 1, ones).ok());
}
