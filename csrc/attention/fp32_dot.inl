// Both matrix products of a block in fp32, included by the ISA files after
// block_kernel.inl. Keys and values are copied: a block is read by every panel,
// and the copy costs less than rows that fall into the same cache sets.

// acc[r] += sum over i < n of a[r * a_row + i * a_step] b[i]
template <int R, int NV>
inline void dot(vf (&acc)[R][NV], const float* a, std::int64_t a_row, std::int64_t a_step,
                const float* b, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i, a += a_step, b += NV * kWidth) {
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
inline void logit_tile(const float* k, std::int64_t d, std::int64_t chunk, const float* q, float* s,
                       vf* top) {
    for (std::int64_t i = 0; i < d; i += chunk) {
        vf acc[R][NV] = {};
        dot(acc, k + i, d, 1, q + i * NV * kWidth, d - i < chunk ? d - i : chunk);
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
inline void value_tile(const float* v, std::int64_t d, std::int64_t keys, const float* p, float* o,
                       const vf* alpha) {
    vf acc[R][NV] = {};
    dot(acc, v, 1, d, p, keys);
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

template <class T>
inline const T* query(const Row& row) {
    return static_cast<const T*>(row.q);
}

template <class Input>  // float or bf16, as it lies in memory
struct Fp32Dot {
    using Element = float;
    struct Keys {
        const float* k;           // [key][d]
        float* v;                 // [key][d]
        float* spare;             // as large as v
        std::int64_t begin, end;  // keys
    };

    static std::int64_t copy_floats(std::int64_t d) { return 3 * kBlockKeys * d; }

    template <class T>
    static Keys load_keys(const Block& block, std::int64_t begin, std::int64_t end, float* copies) {
        float* k = copies;
        float* v = copies + (end - begin) * block.width;
        copy_rows(static_cast<const T*>(block.k) + begin * block.k_row, block.k_row, block.k_col,
                  end - begin, block.width, k);
        copy_rows(static_cast<const T*>(block.v) + begin * block.v_row, block.v_row, block.v_col,
                  end - begin, block.width, v);
        return {k, v, v + (end - begin) * block.width, begin, end};
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

    static float value(const Keys& keys, std::int64_t j, std::int64_t d, std::int64_t i) {
        return keys.v[(j - keys.begin) * d + i];
    }

    static std::int64_t value_count(const Keys& keys, std::int64_t d) {
        return (keys.end - keys.begin) * d;
    }

    static bool values_finite(const Keys& keys, std::int64_t j, std::int64_t d) {
        const float* v = keys.v + (j - keys.begin) * d;
        vf poison = vset(0.0F);  // x - x is 0, or NaN for NaN and infinities
        std::int64_t i = 0;
        for (; i + kWidth <= d; i += kWidth) {
            const vf x = vload(v + i);
            poison = vadd(poison, vsub(x, x));
        }
        bool all = vall_finite(poison);
        for (; i < d; ++i) {
            all = all && finite(v[i]);
        }
        return all;
    }

    // values() reads no key beside [from, to)
    static bool ends_clean(const Keys&, std::int64_t, std::int64_t, std::int64_t) { return true; }

    template <int NV>
    static void logits(const Keys& keys, std::int64_t from, std::int64_t to, std::int64_t d,
                       float /*scale*/, const float* q, float* s, vf* top) {
        const float* k = keys.k + (from - keys.begin) * d;
        for (std::int64_t left = to - from; left > 0;) {
            const std::int64_t n = tile_height<kTileRows<NV>>(left);
            with_height<kTileRows<NV>>(
                n, [&]<int R>() { logit_tile<R, NV>(k, d, chunk<Input>(d), q, s, top); });
            k += n * d;
            s += n * NV * kWidth;
            left -= n;
        }
    }

    template <int NV>
    static void values(const Keys& keys, std::int64_t from, std::int64_t to, std::int64_t d,
                       const float* p, float* o, const vf* alpha) {
        const float* v = keys.v + (from - keys.begin) * d;
        for (std::int64_t left = d; left > 0;) {
            const std::int64_t n = tile_height<kTileRows<NV>>(left);
            with_height<kTileRows<NV>>(
                n, [&]<int R>() { value_tile<R, NV>(v, d, to - from, p, o, alpha); });
            v += n;
            o += n * NV * kWidth;
            left -= n;
        }
    }
};
