// Both matrix products of a block in fp32, included by the ISA files after
// block_kernel.inl.

// acc[r] += sum over i < n of a[r * a_row + i * a_step] b[i * b_step]
template <int R, int NV>
inline void dot(vf (&acc)[R][NV], const float* a, std::int64_t a_row, std::int64_t a_step,
                const float* b, std::int64_t b_step, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i, a += a_step, b += b_step) {
        vf right[NV];
#pragma GCC unroll 4
        for (int c = 0; c < NV; ++c) {
            right[c] = vload(b + c * kWidth);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vf left = vbroadcast(a + r * a_row);
#pragma GCC unroll 4
            for (int c = 0; c < NV; ++c) {
                acc[r][c] = vfma(left, right[c], acc[r][c]);
            }
        }
    }
}

// A sum of n terms loses digits in proportion to the square root of its chain:
// logits of fp32 inputs are added up in chunks. Those of bf16 inputs need not be.
template <class T>
constexpr std::int64_t chunk(std::int64_t d) {
    if (sizeof(T) < sizeof(float)) {
        return d;
    }
    return d <= 64 ? 32 : 64;
}

// s[r] = k[r] . q for R keys; top: the largest of them so far
template <int R, int NV>
inline void logit_tile(const float* k, std::int64_t row, std::int64_t d, std::int64_t chunk,
                       const float* q, float* s, vf* top) {
    for (std::int64_t i = 0; i < d; i += chunk) {
        vf acc[R][NV] = {};
        dot(acc, k + i, row, 1, q + i * NV * kWidth, NV * kWidth, d - i < chunk ? d - i : chunk);
        const bool last = i + chunk >= d;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) {
                float* at = s + (r * NV + n) * kWidth;
                const vf x = i == 0 ? acc[r][n] : vadd(vload(at), acc[r][n]);
                vstore(at, x);
                top[n] = last ? vmax(top[n], x) : top[n];
            }
        }
    }
}

// o[r] = alpha o[r] + sum over keys of v[key][r] p[key] for R channels. The sum
// starts from zero: one chain through all blocks would be a long one.
template <int R, int NV>
inline void value_tile(const float* v, std::int64_t row, std::int64_t keys, const float* p,
                       float* o, const vf* alpha) {
    vf acc[R][NV] = {};
    dot(acc, v, 1, row, p, NV * kWidth, keys);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) {
            float* at = o + (r * NV + n) * kWidth;
            vstore(at, vfma(alpha[n], vload(at), acc[r][n]));
        }
    }
}

template <class T>
inline void copy_rows(const T* from, std::int64_t row, std::int64_t col, std::int64_t rows,
                      std::int64_t d, float* to) {
    for (std::int64_t j = 0; j < rows; ++j, from += row, to += d) {
        std::int64_t i = 0;
        if (col == 1) {
            for (; i + kWidth <= d; i += kWidth) {
                vstore(to + i, Stored<T>::load(from + i));
            }
        }
        for (; i < d; ++i) {
            to[i] = Stored<T>::get(from[i * col]);
        }
    }
}

// Rows a multiple of 1 KiB apart crowd into a few cache sets; those are copied,
// and so is what is not fp32.
inline bool lies_well(std::int64_t row, std::int64_t col, std::int64_t d) {
    return col == 1 && (row == d || row % 256 != 0);
}

template <class T>
inline const T* query(const Row& row) {
    return static_cast<const T*>(row.q);
}

template <class Input>  // float or bf16, as it lies in memory
struct Fp32Dot {
    struct Keys {
        const float* k;             // [key][d]
        const float* v;             // [key][d]
        std::int64_t k_row, v_row;  // from key to key
        float* spare;               // [key][d]
        std::int64_t begin, end;    // keys
    };

    static std::int64_t copy_floats(std::int64_t d) { return 3 * kMaxBlockKeys * d; }

    template <class T>
    static Keys load_keys(const Block& block, std::int64_t begin, std::int64_t end, float* copies) {
        const std::int64_t d = block.width;
        const std::int64_t n = end - begin;
        const auto* k = static_cast<const T*>(block.k) + begin * block.k_row;
        const auto* v = static_cast<const T*>(block.v) + begin * block.v_row;
        Keys keys{copies, copies + n * d, d, d, copies + 2 * n * d, begin, end};
        if constexpr (sizeof(T) == sizeof(float)) {
            if (lies_well(block.k_row, block.k_col, d) && lies_well(block.v_row, block.v_col, d)) {
                keys.k = k;
                keys.v = v;
                keys.k_row = block.k_row;
                keys.v_row = block.v_row;
                return keys;
            }
        }
        copy_rows(k, block.k_row, block.k_col, n, d, copies);
        copy_rows(v, block.v_row, block.v_col, n, d, copies + n * d);
        return keys;
    }

    // The scale is folded into q, in powers of two.
    template <class T, int NV>
    static void load_queries(const Block& block, const Row* rows, int n, float* q) {
        constexpr int kLanes = NV * kWidth;
        const float scale = block.scale * kLog2e;
        for (int lane = 0; lane < n; ++lane) {
            for (std::int64_t i = 0; i < block.width; i += 64 / std::int64_t{sizeof(T)}) {
                __builtin_prefetch(query<T>(rows[lane]) + i * block.q_col);
            }
        }
        for (int base = 0; base < kLanes; base += kWidth) {
            std::int64_t i = 0;
            for (; block.q_col == 1 && i + kWidth <= block.width; i += kWidth) {
                vf tile[kWidth];
                for (int lane = 0; lane < kWidth; ++lane) {
                    tile[lane] = base + lane < n ? Stored<T>::load(query<T>(rows[base + lane]) + i)
                                                 : vset(0.0F);
                }
                vtranspose(tile);
                for (int c = 0; c < kWidth; ++c) {
                    vstore(q + (i + c) * kLanes + base, vmul(vset(scale), tile[c]));
                }
            }
            for (; i < block.width; ++i) {
                for (int lane = base; lane < base + kWidth; ++lane) {
                    q[i * kLanes + lane] =
                        lane < n ? Stored<T>::get(query<T>(rows[lane])[i * block.q_col]) * scale
                                 : 0.0F;
                }
            }
        }
    }

    static float value(const Keys& keys, std::int64_t j, std::int64_t /*d*/, std::int64_t i) {
        return keys.v[(j - keys.begin) * keys.v_row + i];
    }

    // The same keys with zeros for values that are no numbers.
    static Keys cleaned(const Keys& keys, std::int64_t d) {
        for (std::int64_t j = keys.begin; j < keys.end; ++j) {
            for (std::int64_t i = 0; i < d; ++i) {
                const float x = value(keys, j, d, i);
                keys.spare[(j - keys.begin) * d + i] = finite(x) ? x : 0.0F;
            }
        }
        Keys clean = keys;
        clean.v = keys.spare;
        clean.v_row = d;
        return clean;
    }

    // 0, or NaN in some lane where a value of the key is no number.
    static vf poison(const Keys& keys, std::int64_t j, std::int64_t d) {
        const float* v = keys.v + (j - keys.begin) * keys.v_row;
        vf sum = vset(0.0F);
        std::int64_t i = 0;
        for (; i + kWidth <= d; i += kWidth) {
            const vf x = vload(v + i);
            sum = vadd(sum, vsub(x, x));
        }
        for (; i < d; ++i) {
            sum = vadd(sum, vset(v[i] - v[i]));
        }
        return sum;
    }

    // values() reads no key beside [from, to)
    static bool ends_clean(const Keys&, std::int64_t, std::int64_t, std::int64_t) { return true; }

    template <int NV>
    static void logits(const Keys& keys, std::int64_t from, std::int64_t to, std::int64_t d,
                       float /*scale*/, const float* q, float* s, vf* top) {
        const float* k = keys.k + (from - keys.begin) * keys.k_row;
        for (std::int64_t left = to - from; left > 0;) {
            const std::int64_t n = tile_height<kTileRows<NV>>(left);
            with_height<kTileRows<NV>>(n, [&]<int R>() {
                logit_tile<R, NV>(k, keys.k_row, d, chunk<Input>(d), q, s, top);
            });
            k += n * keys.k_row;
            s += n * NV * kWidth;
            left -= n;
        }
    }

    template <int NV>
    static void values(const Keys& keys, std::int64_t from, std::int64_t to, std::int64_t d,
                       const float* p, float* o, const vf* alpha) {
        const float* v = keys.v + (from - keys.begin) * keys.v_row;
        for (std::int64_t left = d; left > 0;) {
            const std::int64_t n = tile_height<kTileRows<NV>>(left);
            with_height<kTileRows<NV>>(
                n, [&]<int R>() { value_tile<R, NV>(v, keys.v_row, to - from, p, o, alpha); });
            v += n;
            o += n * NV * kWidth;
            left -= n;
        }
    }
};
