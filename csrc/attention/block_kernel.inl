// Text shared by the ISA files. Each includes it inside its own anonymous
// namespace, after the vector type vf, its width and its primitives, so that
// every instruction set owns a private copy.
//
// Vector lanes are query rows. A panel of them is packed once as [d][lane];
// keys and values are then read by broadcast, as they lie in memory. Softmax
// needs no horizontal operation, and a row never depends on its neighbours.
// README.md derives the arithmetic.

constexpr float kLog2e = 1.44269504088896340736F;
constexpr float kLog2eLow = 1.92596303350089e-8F;  // log2(e) minus its fp32
constexpr float kLn2 = 0.693147180559945309417F;
constexpr float kNegInf = -__builtin_inff();
constexpr std::int64_t kMaxBlockKeys = kWindowBlockKeys;

template <class T>
struct Stored;
template <>
struct Stored<float> {
    static vf load(const float* p) { return vload(p); }
    static void store(float* p, vf x) { vstore(p, x); }
    static float get(float x) { return x; }
    static float put(float x) { return x; }
};
template <>
struct Stored<std::uint16_t> {  // bf16
    static vf load(const std::uint16_t* p) { return vload_bf16(p); }
    static void store(std::uint16_t* p, vf x) { vstore_bf16(p, x); }
    static float get(std::uint16_t x) {
        const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
        float f = 0.0F;
        std::memcpy(&f, &bits, sizeof f);
        return f;
    }
    static std::uint16_t put(float x) {
        std::uint32_t bits = 0;
        std::memcpy(&bits, &x, sizeof bits);
        const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
        return static_cast<std::uint16_t>(x != x ? 0x7fc0U : rounded);
    }
};

// 2^x for x <= 127; 0 below -126.5. Exact at 0. Relative error at most 1.7e-7.
// Any NaN stays one.
inline vf vexp2(vf x) {
    // 1.5 * 2^23 rounds to an integer; 127 makes that integer the exponent field.
    const vf shift = vset(12582912.0F + 127.0F);
    x = vmax(vset(-127.0F), x);
    const vf t = vadd(x, shift);
    const vf f = vsub(x, vsub(t, shift));
    vf p = vset(0x1.5bba14p-10F);
    p = vfma(p, f, vset(0x1.3cea88p-7F));
    p = vfma(p, f, vset(0x1.c6b752p-5F));
    p = vfma(p, f, vset(0x1.ebf9bcp-3F));
    p = vfma(p, f, vset(0x1.62e42ap-1F));
    p = vfma(p, f, vset(1.0F));
    return vmul(p, vpower(t));
}

// 2^(x - y + low), low being small, with the digits that x - y loses (Knuth's two-sum)
inline vf vexp2_of_difference(vf x, vf y, vf low) {
    const vf d = vsub(x, y);
    const vf part = vsub(d, x);
    const vf lost = vadd(low, vsub(vsub(x, vsub(d, part)), vadd(y, part)));
    const vf p = vexp2(d);
    // Below, p is 0 and what was lost may be no number.
    return vfma(p, vmul(vset(kLn2), vzero_unless_above(d, -127.0F, lost)), p);
}

// Tile heights that end without a tile of one or two rows where possible:
// those run at the latency of the multiply-add.
template <int kMax>
constexpr std::int64_t tile_height(std::int64_t left) {
    if (left <= kMax) {
        return left;
    }
    return left >= 2 * kMax || left - kMax >= kMax / 2 ? kMax : (left + 1) / 2;
}

template <int NV>
constexpr int kTileRows = NV == 1 ? kNarrowRows : kWideRows;

// Calls f with the compile-time height that equals n.
template <int R, class F>
inline void with_height(std::int64_t n, F&& f) {
    if (n == R) {
        f.template operator()<R>();
    } else if constexpr (R > 1) {
        with_height<R - 1>(n, f);
    }
}

template <int NV>
struct Panel {
    static constexpr int kLanes = NV * kWidth;
    float* q;          // [d][lane] scaled, so that logits are powers of two
    float* o;          // [d][lane] unnormalised output
    float* m;          // [lane] running maximum of the logits
    float* l;          // [lane] running sum of 2^(logit - m)
    std::int32_t* lo;  // [lane]
    std::int32_t* hi;  // [lane]
    const Row* rows;
    int row_count;
    std::int32_t first, last;          // keys that some row sees
    std::int32_t all_first, all_last;  // keys that every row sees
};

template <int NV>
inline void exp_rows(float* s, std::int64_t n, const vf* top, vf* sum) {
    for (std::int64_t j = 0; j < n; ++j, s += NV * kWidth) {
#pragma GCC unroll 4
        for (int i = 0; i < NV; ++i) {
            const vf p = vexp2(vsub(vload(s + i * kWidth), top[i]));
            vstore(s + i * kWidth, p);
            sum[i] = vadd(sum[i], p);
        }
    }
}

// Calls f(j) for the keys of [from, to) that not every row of the panel sees.
template <int NV, class F>
inline void for_each_edge(const Panel<NV>& panel, std::int64_t from, std::int64_t to, F&& f) {
    const std::int64_t head = panel.all_first < to ? panel.all_first : to;
    std::int64_t tail = panel.all_last > from ? panel.all_last : from;
    tail = tail > head ? tail : head;
    for (std::int64_t j = from; j < head; ++j) {
        f(j);
    }
    for (std::int64_t j = tail; j < to; ++j) {
        f(j);
    }
}

// s[j] = -inf where a row does not see key j
template <int NV>
inline void hide(const Panel<NV>& panel, std::int64_t from, std::int64_t to, float* s) {
    for_each_edge(panel, from, to, [&](std::int64_t j) {
        for (int n = 0; n < NV; ++n) {
            float* at = s + ((j - from) * NV + n) * kWidth;
            vstore(at, vwhere_visible(vload(panel.lo + n * kWidth), vload(panel.hi + n * kWidth),
                                      static_cast<std::int32_t>(j), vload(at), vset(kNegInf)));
        }
    });
}

inline bool finite(float x) { return x - x == 0.0F; }

// Dot::values where a key that some row may not see holds a NaN or an infinity:
// 0 times that would not be 0. It goes to the rows that see it, afterwards.
template <class Dot, int NV>
inline void spoilt_values(const Panel<NV>& panel, const typename Dot::Keys& keys, std::int64_t from,
                          std::int64_t to, std::int64_t d, const float* p, const vf* alpha) {
    constexpr int kLanes = NV * kWidth;
    Dot::template values<NV>(Dot::cleaned(keys, d), from, to, d, p, panel.o, alpha);
    for (std::int64_t j = from; j < to; ++j) {
        for (std::int64_t i = 0; i < d; ++i) {
            const float x = Dot::value(keys, j, d, i);
            for (int lane = 0; !finite(x) && lane < kLanes; ++lane) {
                if (panel.lo[lane] <= j && j < panel.hi[lane]) {
                    panel.o[i * kLanes + lane] += p[(j - from) * kLanes + lane] * x;
                }
            }
        }
    }
}

// One step of the online softmax: keys [from, to) for every row of the panel.
template <class Dot, int NV>
inline void attend(const Panel<NV>& panel, const typename Dot::Keys& keys, std::int64_t from,
                   std::int64_t to, std::int64_t d, float scale, float* s) {
    const bool masked = from < panel.all_first || to > panel.all_last;
    vf top[NV];
    for (int n = 0; n < NV; ++n) {
        top[n] = vset(kNegInf);
    }
    Dot::template logits<NV>(keys, from, to, d, scale, panel.q, s, top);
    if (masked) {
        hide(panel, from, to, s);
        for (int n = 0; n < NV; ++n) {
            top[n] = vset(kNegInf);
            for (std::int64_t j = 0; j < to - from; ++j) {
                top[n] = vmax(top[n], vload(s + (j * NV + n) * kWidth));
            }
        }
    }
    vf alpha[NV];
    vf sum[NV];
    for (int n = 0; n < NV; ++n) {
        const vf before = vload(panel.m + n * kWidth);
        const vf now = vmax(before, top[n]);
        vstore(panel.m + n * kWidth, now);
        top[n] = vzero_if_equal(now, kNegInf);
        alpha[n] = vexp2(vsub(before, top[n]));
        sum[n] = vset(0.0F);
    }
    exp_rows<NV>(s, to - from, top, sum);
    for (int n = 0; n < NV; ++n) {
        vstore(panel.l + n * kWidth, vfma(alpha[n], vload(panel.l + n * kWidth), sum[n]));
    }
    vf poison = vset(0.0F);
    if (masked) {
        for_each_edge(panel, from, to,
                      [&](std::int64_t j) { poison = vadd(poison, Dot::poison(keys, j, d)); });
    }
    if (vall_finite(poison) && Dot::ends_clean(keys, from, to, d)) {
        Dot::template values<NV>(keys, from, to, d, s, panel.o, alpha);
    } else {
        spoilt_values<Dot, NV>(panel, keys, from, to, d, s, alpha);
    }
}

// Panel of rows [0, n) of `rows`; lanes past n repeat the last row's range and
// compute on zeros.
template <class Dot, class T, int NV>
inline void load_panel(Panel<NV>& panel, const Block& block, const Row* rows, int n) {
    constexpr int kLanes = NV * kWidth;
    panel.rows = rows;
    panel.row_count = n;
    for (int lane = 0; lane < kLanes; ++lane) {
        const Row& row = rows[lane < n ? lane : n - 1];
        panel.lo[lane] = row.lo;
        panel.hi[lane] = row.hi;
        panel.m[lane] = kNegInf;
        panel.l[lane] = 0.0F;
    }
    Dot::template load_queries<T, NV>(block, rows, n, panel.q);
    std::memset(panel.o, 0, static_cast<std::size_t>(block.width * kLanes) * sizeof(float));
    panel.first = rows[0].lo;
    panel.last = rows[n - 1].hi;
    panel.all_first = rows[n - 1].lo;
    panel.all_last = rows[0].hi;
}

// 1 / (l + 2^(sink - m)) without overflow, and the gate l / (l + 2^(sink - m)).
struct Normaliser {
    vf factor, gate;
};

// `low` is what rounding has taken from the sink. The digits that the difference
// loses where a sink is far above the logits would all be seen in the gate.
inline Normaliser normalise(vf m, vf l, vf sink, vf low) {
    const vf top = vzero_if_equal(vmax(m, sink), kNegInf);
    const vf key_share = vexp2_of_difference(m, top, vset(0.0F));
    const vf sink_share = vexp2_of_difference(sink, top, low);
    const vf factor = vdiv(key_share, vfma(l, key_share, sink_share));
    return {factor, vmul(l, factor)};
}

// log of l 2^m / 2^sink, in nats: infinite where there is no sink or no key
inline float gate_logit(float m, float l, float sink) {
    return sink == kNegInf ? -kNegInf
           : m == kNegInf  ? kNegInf
                           : (m - sink) * kLn2 + __builtin_logf(l);
}

inline float sigmoid(float x) { return 1.0F / (1.0F + __builtin_expf(-x)); }

inline vf vsigmoid(vf x) {
    const vf e = vexp2(vmin(vset(126.0F), vmul(x, vset(-kLog2e))));
    return vreciprocal(vadd(vset(1.0F), e));
}

// Writes one row: out = factor * o (* sigmoid(gate) element by element), o
// being `staged`. Returns the sum of the element-wise gates.
template <class T>
inline float store_row(const Row& row, const Block& block, const float* staged, float factor) {
    T* out = static_cast<T*>(row.out);
    const T* gate = static_cast<const T*>(row.gate);
    const vf f = vset(factor);
    float sum = 0.0F;
    std::int64_t i = 0;
    if (block.gate != GateShape::kPerElement) {
        for (; i + kWidth <= block.width; i += kWidth) {
            Stored<T>::store(out + i, vmul(f, vload(staged + i)));
        }
        for (; i < block.width; ++i) {
            out[i] = Stored<T>::put(factor * staged[i]);
        }
        return sum;
    }
    if (block.gate_col == 1) {
        vf sums = vset(0.0F);
        for (; i + kWidth <= block.width; i += kWidth) {
            const vf g = vsigmoid(Stored<T>::load(gate + i));
            sums = vadd(sums, g);
            Stored<T>::store(out + i, vmul(vmul(f, g), vload(staged + i)));
        }
        alignas(64) float lanes[kWidth];
        vstore(lanes, sums);
        for (const float x : lanes) {
            sum += x;
        }
    }
    for (; i < block.width; ++i) {
        const float g = sigmoid(Stored<T>::get(gate[i * block.gate_col]));
        sum += g;
        out[i] = Stored<T>::put(factor * g * staged[i]);
    }
    return sum;
}

// [d][lane] to [lane][d]
template <int NV>
inline void unpack_rows(const float* from, std::int64_t d, float* to) {
    constexpr int kLanes = NV * kWidth;
    for (int base = 0; base < kLanes; base += kWidth) {
        std::int64_t i = 0;
        for (; i + kWidth <= d; i += kWidth) {
            vf tile[kWidth];
            for (int c = 0; c < kWidth; ++c) {
                tile[c] = vload(from + (i + c) * kLanes + base);
            }
            vtranspose(tile);
            for (int lane = 0; lane < kWidth; ++lane) {
                vstore(to + (base + lane) * d + i, tile[lane]);
            }
        }
        for (; i < d; ++i) {
            for (int lane = base; lane < base + kWidth; ++lane) {
                to[lane * d + i] = from[i * kLanes + lane];
            }
        }
    }
}

template <class Dot, class T, int NV>
inline void finish(const Panel<NV>& panel, const Block& block, float* gates, float* s,
                   float* copies, float* staged) {
    constexpr int kLanes = NV * kWidth;
    const std::int64_t d = block.width;
    const float scale = block.scale * kLog2e;
    if (block.gate == GateShape::kPerElement) {
        for (int lane = 0; lane < panel.row_count; ++lane) {
            const T* gate = static_cast<const T*>(panel.rows[lane].gate);
            for (std::int64_t i = 0; i < d; i += 64 / std::int64_t{sizeof(T)}) {
                __builtin_prefetch(gate + i * block.gate_col);
            }
        }
    }
    for (int lane = 0; lane < panel.row_count; ++lane) {
        const T* out = static_cast<const T*>(panel.rows[lane].out);
        for (std::int64_t i = 0; i < d; i += 64 / std::int64_t{sizeof(T)}) {
            __builtin_prefetch(out + i, 1);
        }
    }
    alignas(64) float sink[kLanes];
    alignas(64) float low[kLanes];  // what rounding takes from the sink
    alignas(64) float factor[kLanes];
    alignas(64) float gate[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int r = lane < panel.row_count ? lane : panel.row_count - 1;
        const float nats = panel.rows[r].sink;
        const float x = nats * kLog2e;
        sink[lane] = x > __FLT_MAX__ ? __FLT_MAX__ : x;  // infinity minus itself is no number
        low[lane] = finite(x) ? __builtin_fmaf(nats, kLog2e, -x) + nats * kLog2eLow : 0.0F;
    }
    if (block.first_key >= 0) {
        const std::int64_t first = block.first_key;
        const typename Dot::Keys key = Dot::template load_keys<T>(block, first, first + 1, copies);
        vf top[NV];
        Dot::template logits<NV>(key, first, first + 1, d, scale, panel.q, sink, top);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int r = lane < panel.row_count ? lane : panel.row_count - 1;
            const bool sees = panel.rows[r].sees_first;
            sink[lane] = sees ? sink[lane] : kNegInf;
            low[lane] = 0.0F;
            panel.lo[lane] = block.first_key;
            panel.hi[lane] = sees ? block.first_key + 1 : block.first_key;
        }
        for (int lane = 0; lane < panel.row_count; ++lane) {
            if (panel.rows[lane].gate_logit != nullptr) {
                *panel.rows[lane].gate_logit = gate_logit(panel.m[lane], panel.l[lane], sink[lane]);
            }
        }
        for (int n = 0; n < NV; ++n) {
            vstore(gate + n * kWidth,
                   normalise(vload(panel.m + n * kWidth), vload(panel.l + n * kWidth),
                             vload(sink + n * kWidth), vload(low + n * kWidth))
                       .gate);
        }
        Panel<NV> only = panel;
        only.all_first = only.all_last = 0;  // masks every row
        attend<Dot, NV>(only, key, first, first + 1, d, scale, s);
        for (int lane = 0; lane < kLanes; ++lane) {
            sink[lane] = kNegInf;
        }
    }
    for (int n = 0; n < NV; ++n) {
        const Normaliser x = normalise(vload(panel.m + n * kWidth), vload(panel.l + n * kWidth),
                                       vload(sink + n * kWidth), vload(low + n * kWidth));
        vstore(factor + n * kWidth, x.factor);
        if (block.first_key < 0) {
            vstore(gate + n * kWidth, x.gate);
        }
    }
    unpack_rows<NV>(panel.o, d, staged);
    for (int lane = 0; lane < panel.row_count; ++lane) {
        const Row& row = panel.rows[lane];
        const bool blind = panel.m[lane] == kNegInf && panel.l[lane] == panel.l[lane];
        float f = blind ? 0.0F : factor[lane];
        float g = blind ? 0.0F : gate[lane];
        if (block.gate == GateShape::kPerRow) {
            g = blind ? 0.0F : sigmoid(Stored<T>::get(*static_cast<const T*>(row.gate)));
            f *= g;
        }
        if (blind) {
            std::memset(row.out, 0, static_cast<std::size_t>(d) * sizeof(T));
        }
        const float sum = blind ? 0.0F : store_row<T>(row, block, staged + lane * d, f);
        if (block.gate == GateShape::kPerElement) {
            g = blind ? 0.0F : sum / static_cast<float>(d);
        }
        if (gates != nullptr) {
            gates[lane] = g;
        }
        if (row.lse != nullptr) {
            *row.lse = blind ? kNegInf : panel.m[lane] * kLn2 + __builtin_logf(panel.l[lane]);
        }
    }
}

template <class Dot, int NV>
std::size_t scratch_bytes(std::int64_t rows, std::int64_t d) {
    constexpr std::int64_t kLanes = NV * kWidth;
    const std::int64_t panels = (rows + kLanes - 1) / kLanes;
    const std::int64_t floats =
        panels * (2 * d + 4) * kLanes + kMaxBlockKeys * kLanes + Dot::copy_floats(d) + kLanes * d;
    return static_cast<std::size_t>(floats) * sizeof(float) +
           static_cast<std::size_t>(panels) * sizeof(Panel<NV>);
}

// Asks for the share `part` of `parts` of keys that the next block reads.
template <class T>
inline void prefetch_rows(const Block& block, std::int64_t begin, std::int64_t end,
                          std::int64_t part, std::int64_t parts) {
    constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(T));
    const std::int64_t n = end - begin;
    for (std::int64_t j = begin + n * part / parts; j < begin + n * (part + 1) / parts; ++j) {
        for (std::int64_t i = 0; i < block.width; i += kLine) {
            __builtin_prefetch(static_cast<const T*>(block.k) + j * block.k_row + i, 0, 2);
            __builtin_prefetch(static_cast<const T*>(block.v) + j * block.v_row + i, 0, 2);
        }
    }
}

template <class Dot, class T, int NV>
void run(const Block& block, std::byte* scratch) {
    constexpr std::int64_t kLanes = NV * kWidth;
    const std::int64_t d = block.width;
    const std::int64_t count = (block.row_count + kLanes - 1) / kLanes;
    auto* next = reinterpret_cast<float*>(scratch);
    const auto take = [&next](std::int64_t n) {
        float* p = next;
        next += n;
        return p;
    };
    float* s = take(kMaxBlockKeys * kLanes);
    float* copies = take(Dot::copy_floats(d));
    float* staged = take(kLanes * d);
    float* panel_floats = take(count * (2 * d + 4) * kLanes);
    auto* panels = reinterpret_cast<Panel<NV>*>(next);
    const std::int64_t begin = block.rows[0].lo;
    const std::int64_t end = block.rows[block.row_count - 1].hi;
    const std::int64_t step = block.block_keys;
    prefetch_rows<T>(block, begin, begin + step < end ? begin + step : end, 0, 1);
    for (std::int64_t i = 0; i < count; ++i) {
        Panel<NV>& panel = panels[i];
        float* base = panel_floats + i * (2 * d + 4) * kLanes;
        panel.q = base;
        panel.o = base + d * kLanes;
        panel.m = base + 2 * d * kLanes;
        panel.l = panel.m + kLanes;
        panel.lo = reinterpret_cast<std::int32_t*>(panel.l + kLanes);
        panel.hi = panel.lo + kLanes;
        const std::int64_t left = block.row_count - i * kLanes;
        load_panel<Dot, T, NV>(panel, block, block.rows + i * kLanes,
                               static_cast<int>(left < kLanes ? left : kLanes));
    }
    const float scale = block.scale * kLog2e;
    // The grid of key blocks is the same for every row, whatever the call.
    for (std::int64_t grid = begin / step * step; grid < end; grid += step) {
        const std::int64_t from = grid < begin ? begin : grid;
        const std::int64_t to = grid + step < end ? grid + step : end;
        const typename Dot::Keys keys = Dot::template load_keys<T>(block, from, to, copies);
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t j0 = panels[i].first > from ? panels[i].first : from;
            const std::int64_t j1 = panels[i].last < to ? panels[i].last : to;
            prefetch_rows<T>(block, to, to + step < end ? to + step : end, i, count);
            if (j0 < j1) {
                attend<Dot, NV>(panels[i], keys, j0, j1, d, scale, s);
            }
        }
    }
    for (std::int64_t i = 0; i < count; ++i) {
        float* gates = block.gates == nullptr ? nullptr : block.gates + i * kLanes;
        finish<Dot, T, NV>(panels[i], block, gates, s, copies, staged);
    }
}

template <class Dot, class T>
constexpr Kernels make_kernels() {
    return {{kWideVectors * kWidth, scratch_bytes<Dot, kWideVectors>, run<Dot, T, kWideVectors>},
            {kWidth, scratch_bytes<Dot, 1>, run<Dot, T, 1>}};
}
