// Written in: reg, kParts of which are 64 bytes; load, store, zero, add8, add16, high16 (the upper
// byte of each 16 bits), mask64, dot (u8 times s8 of at most 127, four to 32 bits), sum32.

constexpr std::int64_t kRowsOfTable = 4;
constexpr std::int64_t kPatterns = 16;
constexpr std::int64_t kTableBytes = kPatterns * kBlock;
constexpr std::int64_t kGroups = 16;      // of a mask
constexpr std::int64_t kMasksOfPass = 2;  // their tables, 32 KiB, stay in the L1 cache

struct Bytes {
    reg part[kParts];
};
inline Bytes load64(const void* p) {
    Bytes x;
    for (int i = 0; i < kParts; ++i) {
        x.part[i] = load(static_cast<const std::uint8_t*>(p) + i * kRegBytes);
    }
    return x;
}
inline void store64(void* p, const Bytes& x) {
    for (int i = 0; i < kParts; ++i) {
        store(static_cast<std::uint8_t*>(p) + i * kRegBytes, x.part[i]);
    }
}
inline Bytes zero64() {
    Bytes x;
    for (int i = 0; i < kParts; ++i) {
        x.part[i] = zero();
    }
    return x;
}
inline void add8(Bytes& to, const Bytes& x) {
    for (int i = 0; i < kParts; ++i) {
        to.part[i] = add8(to.part[i], x.part[i]);
    }
}
inline void add16(Bytes& to, const Bytes& x) {
    for (int i = 0; i < kParts; ++i) {
        to.part[i] = add16(to.part[i], x.part[i]);
    }
}
inline void add_high(Bytes& to, const Bytes& x) {
    for (int i = 0; i < kParts; ++i) {
        to.part[i] = add16(to.part[i], high16(x.part[i]));
    }
}

void masks(const Patterns& patterns, const CycleOrder& order, std::uint64_t* out) {
    const std::int64_t words = patterns.padded_rows / kBlock;
    const std::int64_t bytes = patterns.planes * patterns.padded_rows;
    for (std::int64_t v = 0; v < patterns.vectors; ++v) {
        const std::uint8_t* vector = patterns.data + v * bytes;
        for (int c = 0; c < order.cycles(); ++c, out += words) {
            const int bit = order.bit(c);
            if (bit < 0) {
                std::fill_n(out, words, 0);
                continue;
            }
            const std::uint8_t* plane = vector + bit / 8 * patterns.padded_rows;
            for (std::int64_t w = 0; w < words; ++w) {
                out[w] = mask64(plane + w * kBlock, bit % 8);
            }
        }
    }
}

// Sums of every subset of four rows of digits.
void build_tables(const std::uint8_t* rows, std::int64_t groups, std::uint8_t* tables) {
    for (std::int64_t g = 0; g < groups; ++g, tables += kTableBytes) {
        store64(tables, zero64());
        for (std::int64_t row = 0; row < kRowsOfTable; ++row, rows += kBlock) {
            const Bytes digits = load64(rows);
            const std::int64_t half = std::int64_t{1} << row;
            for (std::int64_t pattern = 0; pattern < half; ++pattern) {
                Bytes sum = load64(tables + pattern * kBlock);
                add8(sum, digits);
                store64(tables + (half + pattern) * kBlock, sum);
            }
        }
    }
}

// Sums of bytes at even places modulo 2^16 with those at odd places above them, and of the latter
// alone: the difference is exact below 2^16.
struct Sums {
    Bytes both, odd;
};

// One mask, 16 tables. kRun sums of four digits fit a byte.
template <int kRun>
inline void look_up(const std::uint8_t* tables, std::uint64_t mask, Sums& sums) {
    for (int g = 0; g < kGroups; g += kRun) {
        Bytes run = load64(tables + g * kTableBytes + ((mask >> (4 * g)) & 15U) * kBlock);
        const int end = g + kRun < kGroups ? g + kRun : static_cast<int>(kGroups);
        for (int h = g + 1; h < end; ++h) {
            add8(run, load64(tables + h * kTableBytes + ((mask >> (4 * h)) & 15U) * kBlock));
        }
        add16(sums.both, run);
        add_high(sums.odd, run);
    }
}

// Adds a pass of one or two masks to the sums in memory.
template <int kRun, int kMasks, bool kFirst>
void pass(const std::uint8_t* tables, const std::uint64_t* masks, std::int64_t words,
          std::int64_t cycles, std::uint8_t* sums) {
    for (std::int64_t t = 0; t < cycles; ++t, masks += words, sums += 2 * kBlock) {
        Sums now{zero64(), zero64()};
        if constexpr (!kFirst) {
            now = {load64(sums), load64(sums + kBlock)};
        }
        look_up<kRun>(tables, masks[0], now);
        if constexpr (kMasks == 2) {
            look_up<kRun>(tables + kGroups * kTableBytes, masks[1], now);
        }
        store64(sums, now.both);
        store64(sums + kBlock, now.odd);
    }
}

void write_sums(const std::uint8_t* sums, std::int64_t cycles, std::int64_t digits, bool first,
                std::int32_t* out, std::int64_t stride) {
    for (std::int64_t t = 0; t < cycles; ++t, sums += 2 * kBlock, out += stride) {
        std::uint16_t words[kBlock];
        std::memcpy(words, sums, sizeof words);
        std::int32_t values[kBlock];
        for (std::int64_t i = 0; i < kBlock / 2; ++i) {
            values[i] = static_cast<std::uint16_t>(words[i] - (words[kBlock / 2 + i] << 8));
            values[kBlock / 2 + i] = words[kBlock / 2 + i];
        }
        if (first && digits == kBlock) {
            std::memcpy(out, values, sizeof values);
        } else {
            for (std::int64_t n = 0; n < digits; ++n) {
                out[n] = (first ? 0 : out[n]) + values[n];
            }
        }
    }
}

template <int kRun>
void table_of(const CountArgs& args) {
    const std::int64_t words = args.block.padded_rows / kBlock;
    const std::int64_t cycles = args.patterns.vectors * args.order.cycles();
    // Masks whose sums stay below 2^16, an even number of them.
    const std::int64_t span = 65535 / (kBlock * args.block.peak) / kMasksOfPass * kMasksOfPass;
    auto* tables = reinterpret_cast<std::uint8_t*>(args.scratch);
    std::uint8_t* sums = tables + kMasksOfPass * kGroups * kTableBytes;
    for (std::int64_t w = 0; w < words; w += kMasksOfPass) {
        const bool two = w + 1 < words;
        const bool first = w % span == 0;
        build_tables(args.block.rows + w * kBlock * kBlock, (two ? 2 : 1) * kGroups, tables);
        const auto run = two ? (first ? pass<kRun, 2, true> : pass<kRun, 2, false>)
                             : (first ? pass<kRun, 1, true> : pass<kRun, 1, false>);
        run(tables, args.masks + w, words, cycles, sums);
        if ((w + kMasksOfPass) % span == 0 || w + kMasksOfPass >= words) {
            write_sums(sums, cycles, args.block.digits, w < span, args.out, args.out_stride);
        }
    }
}

void table(const CountArgs& args) {
    const int peak = args.block.peak;
    if (peak <= 3) {
        table_of<16>(args);
    } else if (peak <= 7) {
        table_of<8>(args);
    } else if (peak <= 10) {
        table_of<6>(args);
    } else if (peak <= 16) {
        table_of<3>(args);
    } else {
        table_of<1>(args);
    }
}

// The digits of a row stay where its pattern is: bits of eight cycles at once, each with the weight
// that it has in its byte.
void few(const CountArgs& args) {
    const Patterns& p = args.patterns;
    const std::int64_t bytes = p.planes * p.padded_rows;
    std::int32_t* out = args.out;
    for (std::int64_t v = 0; v < p.vectors; ++v) {
        for (int c = 0; c < args.order.cycles(); ++c, out += args.out_stride) {
            const int bit = args.order.bit(c);
            if (bit < 0) {
                std::fill_n(out, args.block.digits, 0);
                continue;
            }
            const std::uint8_t* plane = p.data + v * bytes + bit / 8 * p.padded_rows;
            const reg chosen = set8(static_cast<std::uint8_t>(1U << (bit % 8)));
            for (std::int64_t n = 0; n < args.block.digits; ++n) {
                const std::uint8_t* digits = args.block.columns + n * p.padded_rows;
                reg sum = zero();
                for (std::int64_t i = 0; i < p.padded_rows; i += kRegBytes) {
                    sum = dot(sum, and_(load(plane + i), chosen), load(digits + i));
                }
                out[n] = sum32(sum) >> (bit % 8);
            }
        }
    }
}

// What changes of the lines, or their levels, with W wide enough for all bits of a pattern.
template <class In, class W>
void extract_as(const ExtractArgs& a) {
    const int bits = a.lines.bits;
    const bool msb = a.lines.msb_first;
    const W mask = static_cast<W>((1U << bits) - 1U);
    const int first = msb ? bits - 1 : 0;
    const int last = msb ? 0 : bits - 1;
    const W keep = static_cast<W>(a.lines.cross_vector ? mask : mask & ~(1U << first));
    const bool idle = a.lines.idle > 0;
    const W gate = a.lines.zero_gating ? 1 : 0;
    const std::int64_t planes = (bits + (idle ? 1 : 0) + 7) / 8;
    std::uint8_t* out = a.out;
    for (std::int64_t v = 0; v < a.vectors; ++v) {
        const In* x = reinterpret_cast<const In*>(a.x) + v * a.stride;
        const auto each = [&](auto pattern_of) {
            for (std::int64_t i = 0; i < a.rows; ++i) {
                const W u = static_cast<W>(static_cast<W>(x[i]) & mask);
                const W pattern = pattern_of(u, a.level[i]);
                out[i] = static_cast<std::uint8_t>(pattern);
                if constexpr (sizeof(W) > 1) {
                    for (std::int64_t plane = 1; plane < planes; ++plane) {
                        out[plane * a.padded_rows + i] =
                            static_cast<std::uint8_t>(pattern >> (8 * plane));
                    }
                }
            }
        };
        if (a.levels) {
            each([](W u, std::uint8_t) { return u; });
        } else {
            const auto changes = [&](auto before) {
                each([&](W u, std::uint8_t& level) {
                    const bool held = (u == 0) & (gate != 0);
                    W pattern = static_cast<W>((u ^ before(u, level)) & keep);
                    const W end = static_cast<W>((u >> last) & 1U);
                    if constexpr (sizeof(W) > 1) {
                        pattern = static_cast<W>(pattern | (idle ? end << bits : 0));
                    }
                    level = static_cast<std::uint8_t>(held ? level : idle ? 0 : end);
                    return static_cast<W>(held ? 0 : pattern);
                });
            };
            if (msb) {
                changes([=](W u, std::uint8_t level) {
                    return static_cast<W>((u >> 1) | (level << first));
                });
            } else {
                changes([](W u, std::uint8_t level) { return static_cast<W>((u << 1) | level); });
            }
        }
        for (std::int64_t plane = 0; plane < planes; ++plane) {
            std::fill(out + plane * a.padded_rows + a.rows, out + (plane + 1) * a.padded_rows,
                      std::uint8_t{0});
        }
        out += planes * a.padded_rows;
    }
}

void extract8(const ExtractArgs& args) {
    if (args.lines.bits + (args.lines.idle > 0 ? 1 : 0) <= 8 && args.lines.idle == 0) {
        extract_as<std::uint8_t, std::uint8_t>(args);
    } else {
        extract_as<std::int8_t, std::uint32_t>(args);
    }
}
void extract16(const ExtractArgs& args) { extract_as<std::int16_t, std::uint32_t>(args); }

// Integers whose ones fit the mask; `bad` gathers what lies outside the range of the bits.
template <class In>
void ones_of(const std::byte* data, std::int64_t bytes, int bits, bool is_signed, Ones& out) {
    using U = std::make_unsigned_t<In>;
    const bool full = bits == 8 * static_cast<int>(sizeof(In));
    const U mask = static_cast<U>(full ? ~U{0} : (1U << bits) - 1U);
    const U offset = static_cast<U>(is_signed ? 1U << (bits - 1) : 0U);
    const reg masks = set_word(mask);
    const reg offsets = set_word(offset);
    reg bad = zero();
    reg total = zero();
    std::int64_t at = 0;
    const std::int64_t whole = bytes / kRegBytes * kRegBytes;
    while (at < whole) {
        // 31 vectors of at most 8 ones a byte
        const std::int64_t end = std::min(whole, at + 31 * kRegBytes);
        reg run = zero();
        for (; at < end; at += kRegBytes) {
            prefetch(data + at + kFar);
            const reg x = load(reinterpret_cast<const std::uint8_t*>(data + at));
            bad = or_(bad, andnot(masks, add_word<U>(x, offsets)));
            run = add8(run, popcount8(and_(x, masks)));
        }
        total = add64(total, sum_bytes(run));
    }
    std::uint64_t ones = sum64(total);
    bool fits = !any(bad);
    for (; at < bytes; at += static_cast<std::int64_t>(sizeof(In))) {
        U x = 0;
        std::memcpy(&x, data + at, sizeof x);
        fits = fits && (static_cast<U>(x + offset) & static_cast<U>(~mask)) == 0;
        ones += static_cast<std::uint64_t>(__builtin_popcount(x & mask));
    }
    out = {ones, fits};
}

void ones(const std::byte* data, std::int64_t bytes, bool wide, int bits, bool is_signed,
          Ones& out) {
    if (wide) {
        ones_of<std::int16_t>(data, bytes, bits, is_signed, out);
    } else {
        ones_of<std::int8_t>(data, bytes, bits, is_signed, out);
    }
}

void shift_add(const std::int32_t* partial, int shift, bool negative, std::int64_t* y) {
    const std::int64_t sign = negative ? -1 : 0;
    for (std::int64_t n = 0; n < kBlock; ++n) {
        const std::int64_t value = static_cast<std::int64_t>(partial[n]) << shift;
        y[n] += (value ^ sign) - sign;
    }
}
