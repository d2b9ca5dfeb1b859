// Written in: reg, load, zero, set8, and_, dot (u8 times s8 of at most 127, four to 32 bits), shift32,
// add32, eight_sums.

// Of the eight bits of a byte: named, which gcc keeps in registers.
struct BitSums {
    reg s0 = zero(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;

    // For the next lower digit to be added.
    [[nodiscard]] BitSums shifted() const {
        return {shift32(s0), shift32(s1), shift32(s2), shift32(s3),
                shift32(s4), shift32(s5), shift32(s6), shift32(s7)};
    }
};

inline BitSums one_digit(BitSums s, const std::uint8_t* pattern, const std::uint8_t* digits,
                         std::int64_t rows) {
    for (std::int64_t i = 0; i < rows; i += kRegBytes) {
        const reg x = load(pattern + i);
        const reg y = load(digits + i);
        s.s0 = dot(s.s0, and_(x, set8(1)), y);
        s.s1 = dot(s.s1, and_(x, set8(2)), y);
        s.s2 = dot(s.s2, and_(x, set8(4)), y);
        s.s3 = dot(s.s3, and_(x, set8(8)), y);
        s.s4 = dot(s.s4, and_(x, set8(16)), y);
        s.s5 = dot(s.s5, and_(x, set8(32)), y);
        s.s6 = dot(s.s6, and_(x, set8(64)), y);
        s.s7 = dot(s.s7, and_(x, set8(128)), y);
    }
    return s;
}

// Both digits of a column at once: each bit is singled out once.
inline BitSums two_digits(const std::uint8_t* pattern, const std::uint8_t* digits,
                          std::int64_t rows) {
    BitSums low, high;
    for (std::int64_t i = 0; i < rows; i += kRegBytes) {
        const reg x = load(pattern + i);
        const reg y = load(digits + i);
        const reg z = load(digits + rows + i);
#define QS_BIT(k)                                  \
    {                                              \
        const reg bits = and_(x, set8(1U << (k))); \
        low.s##k = dot(low.s##k, bits, y);         \
        high.s##k = dot(high.s##k, bits, z);       \
    }
        QS_BIT(0) QS_BIT(1) QS_BIT(2) QS_BIT(3) QS_BIT(4) QS_BIT(5) QS_BIT(6) QS_BIT(7)
#undef QS_BIT
    }
    const BitSums s = high.shifted();
    return {add32(s.s0, low.s0), add32(s.s1, low.s1), add32(s.s2, low.s2), add32(s.s3, low.s3),
            add32(s.s4, low.s4), add32(s.s5, low.s5), add32(s.s6, low.s6), add32(s.s7, low.s7)};
}

// Whole columns, digit by digit from the highest; the digits of a row stay where its pattern is. A
// bit counts with the weight that it has in its byte, taken away at the end.
void few(const CountArgs& args) {
    const Patterns& p = args.patterns;
    const CycleOrder& order = args.order;
    const std::int64_t each = args.block.digits_of_column;
    const std::int64_t columns = args.block.digits / each;
    const std::int64_t bytes = p.planes * p.padded_rows;
    const int used = order.bits + (order.idle > 0 ? 1 : 0);
    for (std::int64_t v = 0; v < p.vectors; ++v) {
        std::int32_t* out = args.out + v * order.cycles() * args.out_stride;
        for (int c = used; c < order.cycles(); ++c) {
            std::fill_n(out + c * args.out_stride, columns, 0);
        }
        for (int plane = 0; plane < p.planes; ++plane) {
            const std::uint8_t* pattern = p.data + v * bytes + plane * p.padded_rows;
            for (std::int64_t n = 0; n < columns; ++n) {
                const std::uint8_t* digits = args.block.columns + n * each * p.padded_rows;
                BitSums s;
                if (kRegBytes == 64 && each == 2) {  // sixteen sums fit its registers
                    s = two_digits(pattern, digits, p.padded_rows);
                } else {
                    for (std::int64_t d = each - 1; d >= 0; --d) {
                        s = one_digit(s.shifted(), pattern, digits + d * p.padded_rows,
                                      p.padded_rows);
                    }
                }
                alignas(32) std::int32_t sums[8];
                eight_sums(s.s0, s.s1, s.s2, s.s3, s.s4, s.s5, s.s6, s.s7, sums);
                for (int k = 8 * plane; k < used && k < 8 * plane + 8; ++k) {
                    // The inverse of order.bit().
                    const int c = k < order.bits && order.msb_first ? order.bits - 1 - k : k;
                    out[c * args.out_stride + n] = sums[k % 8];
                }
            }
        }
    }
}
