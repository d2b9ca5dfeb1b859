// Written in: reg, load, zero, set8, and_, dot (u8 times s8 of at most 127, four to 32 bits), shift32,
// eight_sums.

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
                reg s0 = zero(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
                for (std::int64_t d = each - 1; d >= 0; --d) {
                    s0 = shift32(s0), s1 = shift32(s1), s2 = shift32(s2), s3 = shift32(s3);
                    s4 = shift32(s4), s5 = shift32(s5), s6 = shift32(s6), s7 = shift32(s7);
                    const std::uint8_t* digits =
                        args.block.columns + (n * each + d) * p.padded_rows;
                    for (std::int64_t i = 0; i < p.padded_rows; i += kRegBytes) {
                        const reg x = load(pattern + i);
                        const reg y = load(digits + i);
                        s0 = dot(s0, and_(x, set8(1)), y);
                        s1 = dot(s1, and_(x, set8(2)), y);
                        s2 = dot(s2, and_(x, set8(4)), y);
                        s3 = dot(s3, and_(x, set8(8)), y);
                        s4 = dot(s4, and_(x, set8(16)), y);
                        s5 = dot(s5, and_(x, set8(32)), y);
                        s6 = dot(s6, and_(x, set8(64)), y);
                        s7 = dot(s7, and_(x, set8(128)), y);
                    }
                }
                alignas(32) std::int32_t sums[8];
                eight_sums(s0, s1, s2, s3, s4, s5, s6, s7, sums);
                for (int k = 8 * plane; k < used && k < 8 * plane + 8; ++k) {
                    // The inverse of order.bit().
                    const int c = k < order.bits && order.msb_first ? order.bits - 1 - k : k;
                    out[c * args.out_stride + n] = sums[k % 8];
                }
            }
        }
    }
}
