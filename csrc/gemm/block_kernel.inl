// Blocks of 16 rows times tokens, in the primitives of one instruction-set level.

constexpr int kVectors = static_cast<int>(kRows) / kLanes;
constexpr std::int64_t kGroupSteps = 8;  // of 4 inputs
// A stream longer than a page outruns the hardware's prefetcher at each page's end.
constexpr std::int64_t kAhead = 2048;

inline void fetch(const std::byte* line) {
    _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T0);
}

// One token is limited by memory, which gives more to a core that reads several streams: it is
// multiplied by so many neighbouring blocks at once.
constexpr int kStreams = 4;

inline Block block_of(const Block& w, std::int64_t b) {
    const std::int64_t at = b * w.bytes;
    return {w.codes + at, w.scales + at, w.zeros == nullptr ? nullptr : w.zeros + at,
            w.bytes,      w.group_shift, 1};
}

// From byte `at` of a block's codes to those that a core reads kAhead later: behind the last ones
// come those of `streams` blocks further on.
inline std::int64_t ahead_of(const Block& w, std::int64_t at, int streams) {
    const std::int64_t codes = w.scales - w.codes;
    return at + kAhead < codes ? kAhead : kAhead + streams * w.bytes - codes;
}

inline vi broadcast_codes(const std::int8_t* x) {
    std::int32_t four = 0;
    std::memcpy(&four, x, sizeof four);
    return iset(four);
}

// Of int4, [group][kRows]; `group` counts activations' groups.
inline vf int4_scale(const Block& w, std::int64_t group, int vector) {
    const std::int64_t at = (group >> w.group_shift) * kRows + vector * kLanes;
    return vfrom_bits(ishift_left<16>(iwiden_16(w.scales + 2 * at)));
}
inline vf int4_zero(const Block& w, std::int64_t group, int vector) {
    const std::int64_t at = (group >> w.group_shift) * kRows + vector * kLanes;
    return vfrom_int(iwiden_8(w.zeros + at));
}

template <int T, int V>
inline void clear(vf (&sums)[T][V]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            sums[t][v] = vzero();
        }
    }
}

template <int T, int V>
inline void clear(vi (&sums)[T][V]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            sums[t][v] = izero();
        }
    }
}

template <int T, int V>
inline void store(float* out, int first, const vf (&sums)[T][V]) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            vstore(out + t * kRows + (first + v) * kLanes, sums[t][v]);
        }
    }
}

// int8 has one scale a row.
template <int T, int V>
inline void store_scaled(float* out, int first, const vf (&sums)[T][V], const std::byte* scales) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        const int row = (first + v) * kLanes;
        const vf scale = vfrom_bits(iload(scales + 4 * row));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            vstore(out + t * kRows + row, vmul(sums[t][v], scale));
        }
    }
}

template <int S, int T, int V, bool kZeros>
inline void int4_int8_tile(const Block& w, int first, const Tokens& x, std::int64_t t0,
                           float* out) {
    static_assert(S == 1 || T == 1);
    const vi nibble = iset(0x0f0f0f0f);
    const std::byte* line = w.codes + first * kLanes * 4;
    vf total[S][T][V];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        clear(total[s]);
    }
    const std::int8_t* codes = x.codes + t0 * x.padded;
    const std::int64_t groups = x.padded / kScaleGroup;
    const float* scales = x.scales + t0 * groups;
    const std::int32_t* eights = x.sums + t0 * groups;
    for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t ahead = ahead_of(w, g * (kGroupSteps / 2 * kLine), S);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            const Block block = block_of(w, s);
            const std::byte* part = line + s * w.bytes;
            vi sum[T][V];
            clear(sum);
            // Beside the codes run the scales, and each block's would begin with a wait.
            fetch(block.scales + (g >> w.group_shift) * kRows * 2 + S * w.bytes);
#pragma GCC unroll 4
            for (int step = 0; step < kGroupSteps; step += 2) {
                vi low[V], high[V];
                fetch(part + ahead);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    const vi both = iload(part + v * kLanes * 4);
                    low[v] = iand(both, nibble);
                    high[v] = iand(ishift_right<4>(both), nibble);
                }
                part += kLine;
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    const std::int8_t* at = codes + t * x.padded + g * kScaleGroup + 4 * step;
                    const vi x_low = broadcast_codes(at);
                    const vi x_high = broadcast_codes(at + 4);
#pragma GCC unroll 2
                    for (int v = 0; v < V; ++v) {
                        sum[t][v] = dot4(dot4(sum[t][v], low[v], x_low), high[v], x_high);
                    }
                }
            }
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                const vf w_scale = int4_scale(block, g, first + v);
#pragma GCC unroll 8
                for (int t = 0; t < T; ++t) {
                    const vf scale = vmul(w_scale, vset(scales[t * groups + g]));
                    const std::int32_t eight = eights[t * groups + g];
                    vf product;
                    if constexpr (kZeros) {
                        const vf shift = vmul(int4_zero(block, g, first + v),
                                              vset(0.125F * static_cast<float>(eight)));
                        product = vsub(vfrom_int(finish4(sum[t][v])), shift);
                    } else {
                        product = vfrom_int(isub(finish4(sum[t][v]), iset(eight)));
                    }
                    total[s][t][v] = vfma(product, scale, total[s][t][v]);
                }
            }
        }
        line += kGroupSteps / 2 * kLine;
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        store(out + s * kRows + t0 * kRows, first, total[s]);
    }
}

template <int S, int T, int V>
inline void int8_int8_tile(const Block& w, int first, const Tokens& x, std::int64_t t0,
                           float* out) {
    static_assert(S == 1 || T == 1);
    const std::byte* line = w.codes + first * kLanes * 4;
    vf total[S][T][V];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        clear(total[s]);
    }
    const std::int8_t* codes = x.codes + t0 * x.padded;
    const std::int64_t groups = x.padded / kScaleGroup;
    const float* scales = x.scales + t0 * groups;
    const std::int32_t* eights = x.sums + t0 * groups;
    for (std::int64_t g = 0; g < groups; ++g) {
        const std::int64_t ahead = ahead_of(w, g * (kGroupSteps * kLine), S);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            const std::byte* part = line + s * w.bytes;
            vi sum[T][V];
            clear(sum);
#pragma GCC unroll 8
            for (int step = 0; step < kGroupSteps; ++step) {
                fetch(part + ahead);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    const auto code = prepare8(iload(part + v * kLanes * 4));
#pragma GCC unroll 8
                    for (int t = 0; t < T; ++t) {
                        const std::int8_t* at = codes + t * x.padded + g * kScaleGroup + 4 * step;
                        sum[t][v] = dot8(sum[t][v], code, broadcast_codes(at));
                    }
                }
                part += kLine;
            }
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                const vf scale = vset(scales[t * groups + g]);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    const vi product = finish8(sum[t][v], iset(eights[t * groups + g]));
                    total[s][t][v] = vfma(vfrom_int(product), scale, total[s][t][v]);
                }
            }
        }
        line += kGroupSteps * kLine;
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        store_scaled(out + s * kRows + t0 * kRows, first, total[s], w.scales + s * w.bytes);
    }
}

// acc[t] += w * x[t][input] for the weights w of one input
template <int T, int V>
inline void add_input(vf (&acc)[T][V], const vf (&w)[V], const float* x, std::int64_t stride) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
        const vf value = vset(x[t * stride]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            acc[t][v] = vfma(w[v], value, acc[t][v]);
        }
    }
}

// Adds the four inputs in the bytes of `words`: of each byte what `kMask` leaves from bit `kFirst` on.
template <int kFirst, int kMask, int T, int V>
inline void add_bytes(vf (&acc)[T][V], const vi (&words)[V], const vf (&zero)[V], const float* x,
                      std::int64_t stride) {
    const vi mask = iset(kMask);
    vf w[V];
    const auto input = [&]<int byte>(std::integral_constant<int, byte>) {
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            w[v] = vsub(vfrom_int(iand(ishift_right<8 * byte + kFirst>(words[v]), mask)), zero[v]);
        }
        add_input(acc, w, x + byte, stride);
    };
    input(std::integral_constant<int, 0>{});
    input(std::integral_constant<int, 1>{});
    input(std::integral_constant<int, 2>{});
    input(std::integral_constant<int, 3>{});
}

template <int T, int V>
inline void int4_float_tile(const Block& w, int first, const Tokens& x, std::int64_t t0,
                            float* out) {
    const std::byte* line = w.codes + first * kLanes * 4;
    const float* values = x.values + t0 * x.padded;
    vf total[T][V];
    const std::int64_t groups = x.padded / kScaleGroup;
    clear(total);
    for (std::int64_t g = 0; g < groups; ++g) {
        vf sum[T][V];
        vf zero[V];
        clear(sum);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            zero[v] = w.zeros != nullptr ? int4_zero(w, g, first + v) : vset(8.0F);
        }
        for (int step = 0; step < kGroupSteps; step += 2) {
            vi both[V];
            fetch(line + kAhead);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                both[v] = iload(line + v * kLanes * 4);
            }
            line += kLine;
            add_bytes<0, 15>(sum, both, zero, values, x.padded);
            add_bytes<4, 15>(sum, both, zero, values + 4, x.padded);
            values += 8;
        }
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            const vf scale = int4_scale(w, g, first + v);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                total[t][v] = vfma(sum[t][v], scale, total[t][v]);
            }
        }
    }
    store(out + t0 * kRows, first, total);
}

template <int T, int V>
inline void int8_float_tile(const Block& w, int first, const Tokens& x, std::int64_t t0,
                            float* out) {
    const std::byte* line = w.codes + first * kLanes * 4;
    const float* values = x.values + t0 * x.padded;
    vf sum[T][V];
    vf zero[V];
    clear(sum);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
        zero[v] = vset(128.0F);
    }
    for (std::int64_t k = 0; k < x.padded; k += 4) {
        vi words[V];
        fetch(line + kAhead);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
            words[v] = iload(line + v * kLanes * 4);
        }
        line += kLine;
        add_bytes<0, 255>(sum, words, zero, values + k, x.padded);
    }
    store_scaled(out + t0 * kRows, first, sum, w.scales);
}

template <int S, int T, int V>
inline void bf16_float_tile(const Block& w, int first, const Tokens& x, std::int64_t t0,
                            float* out) {
    static_assert(S == 1 || T == 1);
    const std::byte* line = w.codes + first * kLanes * 4;
    const float* values = x.values + t0 * x.padded;
    const vi upper = iset(static_cast<std::int32_t>(0xffff0000U));
    vf even[S][T][V], odd[S][T][V];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
        clear(even[s]);
        clear(odd[s]);
    }
    for (std::int64_t k = 0; k < x.padded; k += kScaleGroup) {
        const std::int64_t ahead = ahead_of(w, k / 2 * kLine, S);
#pragma GCC unroll 4
        for (int s = 0; s < S; ++s) {
            const std::byte* part = line + s * w.bytes;
#pragma GCC unroll 4
            for (int step = 0; step < kScaleGroup; step += 2) {
                vf first_input[V], second_input[V];
                fetch(part + ahead);
#pragma GCC unroll 2
                for (int v = 0; v < V; ++v) {
                    const vi pair = iload(part + v * kLanes * 4);
                    first_input[v] = vfrom_bits(ishift_left<16>(pair));
                    second_input[v] = vfrom_bits(iand(pair, upper));
                }
                part += kLine;
                add_input(even[s], first_input, values + k + step, x.padded);
                add_input(odd[s], second_input, values + k + step + 1, x.padded);
            }
        }
        line += kScaleGroup / 2 * kLine;
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s) {
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
                even[s][t][v] = vadd(even[s][t][v], odd[s][t][v]);
            }
        }
        store(out + s * kRows + t0 * kRows, first, even[s]);
    }
}

// Covers blocks and tokens with tiles: one token by several blocks; or tall ones, one vector of rows
// at a time, then what is left.
template <int S, class Tile>
inline void cover(const Block& blocks, const Tokens& x, float* out, const Tile& tile) {
    std::int64_t b = 0;
    for (; x.count == 1 && b + S <= blocks.count; b += S) {
        tile.template operator()<S, 1, kVectors>(block_of(blocks, b), 0, 0, out + b * kRows);
    }
    for (; b < blocks.count; ++b) {
        const Block w = block_of(blocks, b);
        float* to = out + b * x.count * kRows;
        std::int64_t t = 0;
        for (; t + kTall <= x.count; t += kTall) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                tile.template operator()<1, kTall, 1>(w, v, t, to);
            }
        }
        for (; t + kWide <= x.count; t += kWide) {
            tile.template operator()<1, kWide, kVectors>(w, 0, t, to);
        }
        for (; t < x.count; ++t) {
            tile.template operator()<1, 1, kVectors>(w, 0, t, to);
        }
    }
}

void int4_int8(const Block& blocks, const Tokens& x, float* out) {
    const auto with = [&]<bool kZeros>(std::bool_constant<kZeros>) {
        cover<kStreams>(blocks, x, out,
                        [&]<int S, int T, int V>(const Block& w, int v, std::int64_t t, float* to) {
                            int4_int8_tile<S, T, V, kZeros>(w, v, x, t, to);
                        });
    };
    if (blocks.zeros != nullptr) {
        with(std::true_type{});
    } else {
        with(std::false_type{});
    }
}

void int8_int8(const Block& blocks, const Tokens& x, float* out) {
    cover<kStreams>(blocks, x, out,
                    [&]<int S, int T, int V>(const Block& w, int v, std::int64_t t, float* to) {
                        int8_int8_tile<S, T, V>(w, v, x, t, to);
                    });
}

void int4_float(const Block& blocks, const Tokens& x, float* out) {
    cover<1>(blocks, x, out,
             [&]<int S, int T, int V>(const Block& w, int v, std::int64_t t, float* to) {
                 int4_float_tile<T, V>(w, v, x, t, to);
             });
}

void int8_float(const Block& blocks, const Tokens& x, float* out) {
    cover<1>(blocks, x, out,
             [&]<int S, int T, int V>(const Block& w, int v, std::int64_t t, float* to) {
                 int8_float_tile<T, V>(w, v, x, t, to);
             });
}

void bf16_float(const Block& blocks, const Tokens& x, float* out) {
    cover<2>(blocks, x, out,
             [&]<int S, int T, int V>(const Block& w, int v, std::int64_t t, float* to) {
                 bf16_float_tile<S, T, V>(w, v, x, t, to);
             });
}
