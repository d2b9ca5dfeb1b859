// Written in: reg, kParts of which are 64 bytes; load, store, zero, add8, add16, high16 (the upper
// byte of each 16 bits), twice8 (within each byte), mask64, dot (u8 times s8 of at most 127, four to
// 32 bits), sum32.

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

template <int kGroup>
inline Bytes entry(const std::uint8_t* tables, std::uint64_t mask) {
    return load64(tables + kGroup * kTableBytes + ((mask >> (4 * kGroup)) & 15U) * kBlock);
}

// Of tables kGroup to 15 the run of kRun whose sums fit a byte, and then the next: unrolled by
// templates, since gcc leaves loops of known bounds half rolled.
template <int kRun, int kGroup = 0>
inline void look_up(const std::uint8_t* tables, std::uint64_t mask, Sums& sums) {
    Bytes run = entry<kGroup>(tables, mask);
    constexpr int kEnd = kGroup + kRun < kGroups ? kGroup + kRun : static_cast<int>(kGroups);
    [&]<int... kNext>(std::integer_sequence<int, kNext...>) {
        (add8(run, entry<kGroup + 1 + kNext>(tables, mask)), ...);
    }(std::make_integer_sequence<int, kEnd - kGroup - 1>{});
    add16(sums.both, run);
    add_high(sums.odd, run);
    if constexpr (kEnd < kGroups) {
        look_up<kRun, kEnd>(tables, mask, sums);
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

// Patterns of at most eight bits of inputs of eight: bytes of `reg`, shifted in lanes of 16 bits.
// kBits is 8, or 0: that of the lines.
template <bool kMsb, bool kGated, int kBits>
void changes8(const ExtractArgs& a) {
    const int bits = kBits > 0 ? kBits : a.lines.bits;
    const unsigned mask = (1U << bits) - 1U;
    const unsigned first = kMsb ? 1U << (bits - 1) : 1U;
    const bool idle = a.lines.idle > 0;
    const reg masks = set8(static_cast<std::uint8_t>(mask));
    const reg keep = set8(static_cast<std::uint8_t>(a.lines.cross_vector ? mask : mask & ~first));
    const reg low = set8(0x7f);
    const reg one = set8(1);
    const reg hold = set8(idle ? 0 : 0xff);
    std::uint8_t* out = a.out;
    for (std::int64_t v = 0; v < a.vectors; ++v, out += a.padded_rows) {
        const auto* x = reinterpret_cast<const std::uint8_t*>(a.x) + v * a.stride;
        for (std::int64_t i = 0; i < a.rows; i += kRegBytes) {
            reg u;
            if (i + kRegBytes <= a.rows) {
                u = and_(load(x + i), masks);
            } else {
                std::uint8_t tail[kRegBytes] = {};
                std::memcpy(tail, x + i, static_cast<std::size_t>(a.rows - i));
                u = and_(load(tail), masks);
            }
            const reg level = load(a.level + i);
            const reg before = kMsb ? or_(and_(shift_right(u, 1), low), shift_left(level, bits - 1))
                                    : or_(twice8(u), level);
            reg pattern = and_(xor_(u, before), keep);
            reg end = kMsb ? and_(u, one) : and_(shift_right(u, bits - 1), one);
            if (idle) {
                pattern = or_(pattern, shift_left(end, bits));
            }
            end = and_(end, hold);
            if constexpr (kGated) {
                const reg gated = zero_bytes(u);
                pattern = andnot(gated, pattern);
                end = or_(and_(level, gated), andnot(gated, end));
            }
            store(out + i, pattern);
            store(a.level + i, end);
        }
        const std::int64_t done = (a.rows + kRegBytes - 1) / kRegBytes * kRegBytes;
        std::fill(out + done, out + a.padded_rows, std::uint8_t{0});
    }
}

// Any patterns, 64 rows at a time.
template <class In>
void extract_any(const ExtractArgs& a) {
    const int bits = a.lines.bits;
    const bool msb = a.lines.msb_first;
    const std::uint32_t mask = (1U << bits) - 1U;
    const int first = msb ? bits - 1 : 0;
    const int last = msb ? 0 : bits - 1;
    const std::uint32_t keep = a.lines.cross_vector ? mask : mask & ~(1U << first);
    const std::uint32_t returns = a.lines.idle > 0 ? 1 : 0;
    const std::uint32_t gate = a.lines.zero_gating ? ~0U : 0U;
    const auto planes = static_cast<int>((bits + static_cast<int>(returns) + 7) / 8);
    std::uint8_t* out = a.out;
    for (std::int64_t v = 0; v < a.vectors; ++v, out += planes * a.padded_rows) {
        const In* x = reinterpret_cast<const In*>(a.x) + v * a.stride;
        for (std::int64_t i0 = 0; i0 < a.padded_rows; i0 += kBlock) {
            const std::int64_t rows = std::clamp<std::int64_t>(a.rows - i0, 0, kBlock);
            std::uint32_t u[kBlock] = {};
            for (std::int64_t i = 0; i < rows; ++i) {
                u[i] = static_cast<std::uint32_t>(x[i0 + i]) & mask;
            }
            if (!a.levels && rows > 0) {
                std::uint8_t level[kBlock];
                std::memcpy(level, a.level + i0, sizeof level);
                for (std::int64_t i = 0; i < kBlock; ++i) {
                    const std::uint32_t was = level[i];
                    const std::uint32_t before = msb ? (u[i] >> 1) | was << first : u[i] << 1 | was;
                    const std::uint32_t end = (u[i] >> last) & 1U;
                    const std::uint32_t gated = u[i] == 0 ? gate : 0U;
                    level[i] =
                        static_cast<std::uint8_t>((was & gated) | (end & (returns - 1U) & ~gated));
                    u[i] = (((u[i] ^ before) & keep) | (end & returns) << bits) & ~gated;
                }
                std::memcpy(a.level + i0, level, sizeof level);
            }
            for (int plane = 0; plane < planes; ++plane) {
                std::uint8_t* to = out + plane * a.padded_rows + i0;
                for (std::int64_t i = 0; i < kBlock; ++i) {
                    to[i] = static_cast<std::uint8_t>(u[i] >> (8 * plane));
                }
            }
        }
    }
}

void levels8(const ExtractArgs& a) {
    const auto mask = static_cast<std::uint8_t>((1U << a.lines.bits) - 1U);
    // Bytes may stand for anything, the arguments too: these are read once.
    const std::int64_t rows = a.rows;
    const std::int64_t padded_rows = a.padded_rows;
    for (std::int64_t v = 0; v < a.vectors; ++v) {
        const auto* __restrict x = reinterpret_cast<const std::uint8_t*>(a.x) + v * a.stride;
        std::uint8_t* __restrict out = a.out + v * padded_rows;
        for (std::int64_t i = 0; i < rows; ++i) {
            out[i] = x[i] & mask;
        }
        std::fill(out + rows, out + padded_rows, std::uint8_t{0});
    }
}

template <bool kMsb, bool kGated>
void changes8(const ExtractArgs& a) {
    (a.lines.bits == 8 ? changes8<kMsb, kGated, 8> : changes8<kMsb, kGated, 0>)(a);
}

void extract8(const ExtractArgs& args) {
    const Lines& lines = args.lines;
    if (lines.bits + (lines.idle > 0 ? 1 : 0) > 8) {
        extract_any<std::int8_t>(args);
    } else if (args.levels) {
        levels8(args);
    } else if (lines.msb_first) {
        (lines.zero_gating ? changes8<true, true> : changes8<true, false>)(args);
    } else {
        (lines.zero_gating ? changes8<false, true> : changes8<false, false>)(args);
    }
}
void extract16(const ExtractArgs& args) { extract_any<std::int16_t>(args); }

// Integers whose ones fit the mask; `bad` gathers what lies outside the range of the bits.
template <class In>
struct OnesOf {
    using U = std::make_unsigned_t<In>;
    U mask, offset;
    reg masks, offsets;
    reg bad = zero(), total = zero();

    OnesOf(int bits, bool is_signed)
        : mask(
              static_cast<U>(bits == 8 * static_cast<int>(sizeof(In)) ? ~U{0} : (1U << bits) - 1U)),
          offset(static_cast<U>(is_signed ? 1U << (bits - 1) : 0U)),
          masks(set_word(mask)),
          offsets(set_word(offset)) {}

    // Parts of so many bytes, whole registers, one behind the other and read side by side: of one
    // stream alone a core gets less from memory.
    template <std::int64_t kStreams>
    void add(const std::byte* data, std::int64_t part) {
        // A byte holds the sum of 31 bytes of at most 8 ones.
        constexpr std::int64_t kTurns = 31 / kStreams;
        for (std::int64_t at = 0; at < part;) {
            const std::int64_t end = std::min(part, at + kTurns * kRegBytes);
            reg run = zero();
            for (; at < end; at += kRegBytes) {
                for (std::int64_t s = 0; s < kStreams; ++s) {
                    const std::byte* from = data + s * part + at;
                    prefetch(from + kFar);
                    const reg x = load(reinterpret_cast<const std::uint8_t*>(from));
                    bad = or_(bad, andnot(masks, add_word<U>(x, offsets)));
                    run = add8(run, popcount8(and_(x, masks)));
                }
            }
            total = add64(total, sum_bytes(run));
        }
    }
};

template <class In>
void ones_of(const std::byte* data, std::int64_t bytes, int bits, bool is_signed, Ones& out) {
    using U = typename OnesOf<In>::U;
    constexpr std::int64_t kStreams = 4, kLeast = 16384;
    OnesOf<In> of(bits, is_signed);
    std::int64_t at = 0;
    if (bytes >= kStreams * kLeast) {
        const std::int64_t part = bytes / (kStreams * kRegBytes) * kRegBytes;
        of.template add<kStreams>(data, part);
        at = kStreams * part;
    }
    const std::int64_t rest = (bytes - at) / kRegBytes * kRegBytes;
    of.template add<1>(data + at, rest);
    at += rest;
    std::uint64_t ones = sum64(of.total);
    bool fits = !any(of.bad);
    for (; at < bytes; at += static_cast<std::int64_t>(sizeof(In))) {
        U x = 0;
        std::memcpy(&x, data + at, sizeof x);
        fits = fits && (static_cast<U>(x + of.offset) & static_cast<U>(~of.mask)) == 0;
        ones += static_cast<std::uint64_t>(__builtin_popcount(x & of.mask));
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

// Eight sums hide the latency of the addition; `used` keeps them.
void loads(const std::byte* at, std::int64_t bytes, std::int64_t repeats) {
    Bytes a = zero64(), b = a, c = a, d = a, e = a, f = a, g = a, h = a;
    for (std::int64_t n = 0; n < repeats; ++n) {
        for (std::int64_t i = 0; i < bytes; i += 8 * kBlock) {
            add8(a, load64(at + i));
            add8(b, load64(at + i + kBlock));
            add8(c, load64(at + i + 2 * kBlock));
            add8(d, load64(at + i + 3 * kBlock));
            add8(e, load64(at + i + 4 * kBlock));
            add8(f, load64(at + i + 5 * kBlock));
            add8(g, load64(at + i + 6 * kBlock));
            add8(h, load64(at + i + 7 * kBlock));
        }
        __asm__ volatile("" ::: "memory");  // the next turn loads again
    }
    for (const Bytes* other : {&b, &c, &d, &e, &f, &g, &h}) {
        add8(a, *other);
    }
    std::uint8_t used[kBlock];
    store64(used, a);
    __asm__ volatile("" ::"r"(used) : "memory");
}
