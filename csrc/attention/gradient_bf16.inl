// The products of the gradient by VDPBF16PS, included after gradient.inl. Every
// product sums over pairs: of channels for the logits and dP, of keys for dQ, of
// rows for dK and dV. P and dS are rounded to bf16 for the last three.

struct Bf16Gradient {
    using T = std::uint16_t;
    static constexpr int NV = kGradVectors;
    static constexpr int kLanes = kGradLanes;
    static constexpr int R = kGradTileRows;
    static_assert(kGradKeys % 2 == 0 && kLanes % 2 == 0);

    struct Room {
        T* k;         // [key][even d], a zero behind an odd width
        T* v;         // [key][even d]
        T* k_pairs;   // [key pair][d][2], zeros for a key that no row sees
        T* row_q;     // [row][staged width]: one panel
        T* row_dout;  // times an element-wise gate
        std::int32_t* q_panel;
        std::int32_t* dout_panel;  // [channel pair][lane]
        std::int32_t* q_pairs;     // [panel][row pair][padded]
        std::int32_t* dout_pairs;
        float* s;                // [key][lane], one panel
        float* dp;               // [key][lane]
        T* p;                    // [panel][key][lane], times the weight
        T* ds;                   // [panel][key][lane]
        std::int32_t* ds_pairs;  // [key pair][lane], one panel
        float* dq;               // [d][lane]
        float* staged;           // [lane][d]
    };

    static constexpr std::int64_t even(std::int64_t n) { return (n + 1) & ~std::int64_t{1}; }

    // Channels in whole blocks of a transposition
    static constexpr std::int64_t staged_width(std::int64_t d) {
        return (d + 2 * kWidth - 1) / (2 * kWidth) * (2 * kWidth);
    }

    // The room in 4-byte words, each array a multiple of 16 of them.
    template <class F>
    static void lay_out(std::int64_t d, F&& f) {
        const std::int64_t keys = kGradKeys * even(d) / 2;
        const std::int64_t panel = kLanes * staged_width(d) / 2;
        const std::int64_t rows = kGradRows / 2 * padded_width(d);
        const std::int64_t scores = kGradPanels * kGradKeys * kLanes / 2;
        f(&Room::k, keys);
        f(&Room::v, keys);
        f(&Room::k_pairs, kGradKeys / 2 * d);
        f(&Room::row_q, panel);
        f(&Room::row_dout, panel);
        f(&Room::q_panel, panel);
        f(&Room::dout_panel, panel);
        f(&Room::q_pairs, rows);
        f(&Room::dout_pairs, rows);
        f(&Room::s, kGradKeys * kLanes);
        f(&Room::dp, kGradKeys * kLanes);
        f(&Room::p, scores);
        f(&Room::ds, scores);
        f(&Room::ds_pairs, kGradKeys / 2 * kLanes);
        f(&Room::dq, d * kLanes);
        f(&Room::staged, d * kLanes);
    }

    static std::size_t scratch_bytes(std::int64_t d) {
        std::int64_t words = 64;
        lay_out(d, [&](auto, std::int64_t n) { words += (n + 15) / 16 * 16; });
        return static_cast<std::size_t>(words) * sizeof(float);
    }

    static Room& room(std::byte* scratch) { return *reinterpret_cast<Room*>(scratch); }

    static void load(const GradBlock& block, std::byte* scratch) {
        static_assert(sizeof(Room) <= 256);
        const std::int64_t d = block.width;
        Room& r = room(scratch);
        std::byte* next = scratch + 256;
        lay_out(d, [&]<class Word>(Word* Room::* member, std::int64_t n) {
            r.*member = reinterpret_cast<Word*>(next);
            next += (n + 15) / 16 * 64;
        });
        const auto* k = static_cast<const T*>(block.k) + block.begin * block.k_row;
        const auto* v = static_cast<const T*>(block.v) + block.begin * block.v_row;
        const std::int64_t n = block.end - block.begin;
        const auto seen = [&](std::int64_t j) {
            const std::int64_t key = block.begin + j;
            return j < n && block.seen_begin <= key && key < block.seen_end;
        };
        for (std::int64_t j = 0; j < n; ++j) {
            T* to_k = r.k + j * even(d);
            T* to_v = r.v + j * even(d);
            to_k[even(d) - 1] = to_v[even(d) - 1] = 0;
            copy_channels(k + j * block.k_row, block.k_col, d, to_k);
            copy_channels(v + j * block.v_row, block.v_col, d, to_v);
        }
        for (std::int64_t j = 0; j < n; j += 2) {
            interleave(seen(j) ? r.k + j * even(d) : nullptr,
                       seen(j + 1) ? r.k + (j + 1) * even(d) : nullptr, 1, d, r.k_pairs + j * d);
        }
    }

    // P, dS and dQ of one panel.
    static void panel(const GradBlock& block, const Room& r, const GradRow* rows, std::int64_t n,
                      std::int64_t index, const Span& span) {
        const std::int64_t d = block.width;
        const Lanes lanes(rows, n, span);
        stage(block, r, rows, lanes);
        const std::int64_t padded = padded_width(d);
        transpose_pairs(r.row_q, d, r.q_panel);
        transpose_pairs(r.row_dout, d, r.dout_panel);
        pair_rows(r.row_q, d, r.q_pairs + index * kLanes / 2 * padded);
        pair_rows(r.row_dout, d, r.dout_pairs + index * kLanes / 2 * padded);

        const std::int64_t from = span.begin - block.begin;
        const std::int64_t to = span.end - block.begin;
        dot_keys(r.k, from, to, d, block.scale * kLog2e, r.q_panel, r.s);
        dot_keys(r.v, from, to, d, 1.0F, r.dout_panel, r.dp);
        T* p = r.p + index * kGradKeys * kLanes;
        T* ds = r.ds + index * kGradKeys * kLanes;
        // Tiles of the key gradients may begin and end up to R - 1 keys outside.
        const std::int64_t low = from > R ? from - R : 0;
        const std::int64_t high = to + R < kGradKeys ? to + R : kGradKeys;
        std::memset(p + low * kLanes, 0, static_cast<std::size_t>((high - low) * kLanes * 2));
        std::memset(ds + low * kLanes, 0, static_cast<std::size_t>((high - low) * kLanes * 2));
        for (std::int64_t j = from; j < to; ++j) {
            const std::int64_t key = block.begin + j;
            const float* shift = key == block.first_key ? lanes.first_shift : lanes.shift;
            for (int i = 0; i < NV; ++i) {
                const std::int64_t at = j * kLanes + i * kWidth;
                vf x = vexp2(vsub(vload(r.s + at), vload(lanes.lse + i * kWidth)));
                const vf weight = vload(lanes.weight + i * kWidth);
                vf y = vfma(vload(r.dp + at), weight, vload(shift + i * kWidth));
                y = vmul(x, y);
                x = vmul(x, weight);
                if (lanes.masked) {
                    const vi lo = vload(lanes.lo + i * kWidth);
                    const vi hi = vload(lanes.hi + i * kWidth);
                    x = vwhere_visible(lo, hi, static_cast<std::int32_t>(key), x, vset(0.0F));
                    y = vwhere_visible(lo, hi, static_cast<std::int32_t>(key), y, vset(0.0F));
                }
                store_bf16(p + at, x);
                store_bf16(ds + at, y);
            }
        }
        for (std::int64_t j = from & ~std::int64_t{1}; j < to; j += 2) {
            interleave(ds + j * kLanes, ds + (j + 1) * kLanes, 1, kLanes,
                       reinterpret_cast<T*>(r.ds_pairs + j / 2 * kLanes));
        }
        into_queries(block, r, rows, n, from / 2, even(to) / 2);
    }

    // dq += scale K dS for the rows of a panel, keys in pairs
    static void into_queries(const GradBlock& block, const Room& r, const GradRow* rows,
                             std::int64_t n, std::int64_t from, std::int64_t to) {
        const std::int64_t d = block.width;
        const T* k = r.k_pairs + from * 2 * d;
        float* sums = r.dq;
        for (std::int64_t left = d; left > 0;) {
            const std::int64_t height = tile_height<R>(left);
            with_height<R>(height, [&]<int H>() {
                vf acc[H][NV] = {};
                dot_pairs(acc, k, 2, 2 * d, r.ds_pairs + from * kLanes, kLanes, to - from);
                store_tile(acc, sums);
            });
            k += 2 * height;
            sums += height * kLanes;
            left -= height;
        }
        add_to_queries(block, rows, n, r.dq, r.staged);
    }

    template <int H>
    static void key_tile(const GradBlock& block, const Room& r, const Span* spans,
                         std::int64_t panels, std::int64_t j, std::int64_t i) {
        const std::int64_t at = j * padded_width(block.width) + i;
        sum_rows<H>(block, r.p, r.dout_pairs + i, spans, panels, j, 1.0F, block.dv + at);
        sum_rows<H>(block, r.ds, r.q_pairs + i, spans, panels, j, block.scale, block.dk + at);
    }

    // out += scale times the sum over rows of p[key][row] rows[row]
    template <int H>
    static void sum_rows(const GradBlock& block, const T* p, const std::int32_t* rows,
                         const Span* spans, std::int64_t panels, std::int64_t j, float scale,
                         float* out) {
        const std::int64_t padded = padded_width(block.width);
        const std::int64_t key = block.begin + j;
        vf acc[H][NV] = {};
        for (std::int64_t i = 0; i < panels; ++i) {
            if (key < spans[i].end && spans[i].begin < key + H) {
                dot_pairs(acc, p + (i * kGradKeys + j) * kLanes, kLanes, 2,
                          rows + i * kLanes / 2 * padded, padded, kLanes / 2);
            }
        }
        add_tile(acc, scale, padded, out);
    }

   private:
    static void store_bf16(T* to, vf x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    }

    // The panel's rows side by side; zeros where a lane sees nothing.
    static void stage(const GradBlock& block, const Room& r, const GradRow* rows,
                      const Lanes& lanes) {
        const std::int64_t d = block.width;
        const std::int64_t width = staged_width(d);
        for (int lane = 0; lane < kLanes; ++lane) {
            T* q = r.row_q + lane * width;
            T* dout = r.row_dout + lane * width;
            const std::int64_t used = lanes.seen[lane] ? d : 0;
            if (used != 0) {
                copy_channels(static_cast<const T*>(rows[lane].q), block.q_col, d, q);
                copy_channels(static_cast<const T*>(rows[lane].dout), block.dout_col, d, dout);
                if (rows[lane].gate != nullptr) {
                    weigh(static_cast<const T*>(rows[lane].gate), block.gate_col, d, dout);
                }
            }
            for (std::int64_t i = used; i < width; ++i) {
                q[i] = dout[i] = 0;
            }
        }
    }

    static void weigh(const T* gate, std::int64_t col, std::int64_t d, T* dout) {
        std::int64_t i = 0;
        for (; col == 1 && i + kWidth <= d; i += kWidth) {
            const vf g = vsigmoid(Stored<T>::load(gate + i));
            Stored<T>::store(dout + i, vmul(g, Stored<T>::load(dout + i)));
        }
        for (; i < d; ++i) {
            const float g = sigmoid(Stored<T>::get(gate[i * col]));
            dout[i] = Stored<T>::put(g * Stored<T>::get(dout[i]));
        }
    }

    // [lane][channel] to [channel pair][lane]
    static void transpose_pairs(const T* from, std::int64_t d, std::int32_t* to) {
        const std::int64_t width = staged_width(d);
        for (int base = 0; base < kLanes; base += kWidth) {
            for (std::int64_t pair = 0; pair < width / 2; pair += kWidth) {
                vf tile[kWidth];
                for (int lane = 0; lane < kWidth; ++lane) {
                    tile[lane] = _mm512_loadu_ps(from + (base + lane) * width + 2 * pair);
                }
                vtranspose(tile);
                for (int c = 0; c < kWidth; ++c) {
                    _mm512_storeu_ps(to + (pair + c) * kLanes + base, tile[c]);
                }
            }
        }
    }

    // [row][channel] to [row pair][padded channel]
    static void pair_rows(const T* from, std::int64_t d, std::int32_t* to) {
        const std::int64_t width = staged_width(d);
        const std::int64_t padded = padded_width(d);
        for (int row = 0; row < kLanes; row += 2, from += 2 * width, to += padded) {
            interleave(from, from + width, 1, width, reinterpret_cast<T*>(to));
            for (std::int64_t i = width; i < padded; ++i) {
                to[i] = 0;
            }
        }
    }

    // s[key][lane] = scale keys[key] . panel for keys [from, to)
    static void dot_keys(const T* keys, std::int64_t from, std::int64_t to, std::int64_t d,
                         float scale, const std::int32_t* panel, float* s) {
        keys += from * even(d);
        s += from * kLanes;
        for (std::int64_t left = to - from; left > 0;) {
            const std::int64_t n = tile_height<R>(left);
            with_height<R>(n, [&]<int H>() {
                vf acc[H][NV] = {};
                dot_pairs(acc, keys, even(d), 2, panel, kLanes, even(d) / 2);
#pragma GCC unroll 16
                for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
                    for (int i = 0; i < NV; ++i) {
                        acc[h][i] = vmul(vset(scale), acc[h][i]);
                    }
                }
                store_tile(acc, s);
            });
            keys += n * even(d);
            s += n * kLanes;
            left -= n;
        }
    }
};
