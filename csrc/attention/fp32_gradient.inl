// The backward pass in fp32, included by the ISA files after fp32_dot.inl.
//
// Rows come in chunks of a few panels. Lane by lane, as in the forward pass:
// P = 2^(S - lse), dP = V dO, dS = P (dP + shift), dQ = K dS. Then, with the
// chunk's rows as the summed axis and channels in the lanes: dV += P dO, dK +=
// dS Q. Five products in all, each at the tile size of the forward pass.

template <class T>
struct Fp32Gradient {
    static constexpr int NV = kWideVectors;
    static constexpr int kLanes = NV * kWidth;
    static constexpr std::int64_t kPanels = kGradRows / kLanes;
    static constexpr int R = kTileRows<NV>;
    static_assert(kGradRows % kLanes == 0 && kGradKeys % R == 0);
    using Dot = Fp32Dot<T>;

    // Whole tiles of channels, and rows that do not crowd into a few cache sets.
    static std::int64_t padded(std::int64_t d) {
        return (d + kLanes - 1) / kLanes * kLanes + (kLanes < 16 ? 16 : kLanes);
    }

    struct Room {
        typename Dot::Keys keys;
        float* copies;  // of the keys
        float* q;       // [row][padded]
        float* dout;    // [row][padded], times the weight
        float* q_panel;
        float* dout_panel;  // [d][lane]
        float* p;           // [panel][key][lane]
        float* ds;
        float* dq;      // [d][lane]
        float* staged;  // [lane][d]
    };

    static std::int64_t room_floats(std::int64_t d) {
        return Dot::copy_floats(d) + 2 * kGradRows * padded(d) + 4 * d * kLanes +
               2 * kPanels * kGradKeys * kLanes;
    }

    static std::size_t scratch_bytes(std::int64_t d) {
        return 256 + static_cast<std::size_t>(room_floats(d)) * sizeof(float);
    }

    static Room& room(std::byte* scratch) { return *reinterpret_cast<Room*>(scratch); }

    static void load(const GradBlock& block, std::byte* scratch) {
        static_assert(sizeof(Room) <= 256);
        const std::int64_t d = block.width;
        auto* next = reinterpret_cast<float*>(scratch + 256);
        const auto take = [&next](std::int64_t n) {
            float* p = next;
            next += n;
            return p;
        };
        Room& r = room(scratch);
        r.copies = take(Dot::copy_floats(d));
        r.q = take(kGradRows * padded(d));
        r.dout = take(kGradRows * padded(d));
        r.q_panel = take(d * kLanes);
        r.dout_panel = take(d * kLanes);
        r.p = take(kPanels * kGradKeys * kLanes);
        r.ds = take(kPanels * kGradKeys * kLanes);
        r.dq = take(d * kLanes);
        r.staged = take(d * kLanes);
        Block keys{};
        keys.k = block.k;
        keys.v = block.v;
        keys.k_row = block.k_row;
        keys.k_col = block.k_col;
        keys.v_row = block.v_row;
        keys.v_col = block.v_col;
        keys.width = d;
        r.keys = Dot::template load_keys<T>(keys, block.begin, block.end, r.copies);
    }

    // Keys of the block that some row of a panel sees.
    struct Span {
        std::int64_t begin, end;
    };

    static void rows(const GradBlock& block, const GradRow* rows, std::int64_t count,
                     std::byte* scratch) {
        const Room& r = room(scratch);
        Span span[kPanels];
        std::int64_t panels = 0;
        Span all{block.end, block.begin};
        for (std::int64_t first = 0; first < count; first += kLanes, ++panels) {
            const std::int64_t n = count - first < kLanes ? count - first : kLanes;
            Span& s = span[panels];
            s.begin = rows[first].lo > block.begin ? rows[first].lo : block.begin;
            s.end = rows[first + n - 1].hi < block.end ? rows[first + n - 1].hi : block.end;
            if (s.begin >= s.end) {
                s = {block.end, block.begin};
                continue;
            }
            all.begin = s.begin < all.begin ? s.begin : all.begin;
            all.end = s.end > all.end ? s.end : all.end;
            panel(block, r, rows + first, n, panels, s);
        }
        if (all.begin < all.end) {
            into_keys(block, r, span, panels, all);
        }
    }

    // P, dS and dQ of one panel.
    static void panel(const GradBlock& block, const Room& r, const GradRow* rows, std::int64_t n,
                      std::int64_t index, const Span& span) {
        const std::int64_t d = block.width;
        alignas(64) float lse[kLanes];
        alignas(64) float shift[kLanes];
        alignas(64) float first_shift[kLanes];
        alignas(64) std::int32_t lo[kLanes];
        alignas(64) std::int32_t hi[kLanes];
        float* q = r.q + index * kLanes * padded(d);
        float* dout = r.dout + index * kLanes * padded(d);
        for (int lane = 0; lane < kLanes; ++lane, q += padded(d), dout += padded(d)) {
            const bool seen = lane < n && rows[lane].lo < rows[lane].hi &&
                              rows[lane].lo < span.end && span.begin < rows[lane].hi;
            const GradRow& row = rows[seen ? lane : 0];
            lse[lane] = seen ? row.lse * kLog2e : 0.0F;
            shift[lane] = seen ? row.shift : 0.0F;
            first_shift[lane] = seen ? row.first_shift : 0.0F;
            lo[lane] = seen ? row.lo : 0;
            hi[lane] = seen ? row.hi : 0;
            if (seen) {
                copy_row(static_cast<const T*>(row.q), block.q_col, d, q);
                copy_row(static_cast<const T*>(row.dout), block.dout_col, d, dout);
                weigh(block, row, dout);
            } else {
                std::memset(q, 0, static_cast<std::size_t>(d) * sizeof(float));
                std::memset(dout, 0, static_cast<std::size_t>(d) * sizeof(float));
            }
            for (std::int64_t i = d; i < padded(d); ++i) {
                q[i] = dout[i] = 0.0F;
            }
        }
        q = r.q + index * kLanes * padded(d);
        dout = r.dout + index * kLanes * padded(d);
        pack(q, d, block.scale * kLog2e, r.q_panel);
        pack(dout, d, 1.0F, r.dout_panel);

        // Tiles of the key gradients may begin and end up to R - 1 keys outside.
        float* p = r.p + index * kGradKeys * kLanes;
        float* ds = r.ds + index * kGradKeys * kLanes;
        const std::int64_t from = span.begin - block.begin;
        const std::int64_t to = span.end - block.begin;
        for (std::int64_t j = from > R ? from - R : 0; j < from; ++j) {
            zero(p + j * kLanes, ds + j * kLanes);
        }
        for (std::int64_t j = to; j < to + R && j < kGradKeys; ++j) {
            zero(p + j * kLanes, ds + j * kLanes);
        }
        vf unused[NV] = {};
        p += from * kLanes;
        ds += from * kLanes;
        Dot::template logits<NV>(r.keys, span.begin, span.end, d, 0.0F, r.q_panel, p, unused);
        typename Dot::Keys values = r.keys;
        values.k = r.keys.v;
        values.k_row = r.keys.v_row;
        Dot::template logits<NV>(values, span.begin, span.end, d, 0.0F, r.dout_panel, ds, unused);
        bool masked = false;
        for (int lane = 0; lane < kLanes; ++lane) {
            masked = masked || lo[lane] > span.begin || hi[lane] < span.end;
        }
        for (int i = 0; i < NV; ++i) {
            const vf l = vload(lse + i * kWidth);
            const vf c = vload(shift + i * kWidth);
            float* at_p = p + i * kWidth;
            float* at_ds = ds + i * kWidth;
            const bool special = span.begin <= block.first_key && block.first_key < span.end;
            const std::int64_t first = special ? (block.first_key - span.begin) * kLanes : 0;
            const vf first_product = vload(at_ds + first);
            for (std::int64_t j = 0; j < span.end - span.begin; ++j) {
                const vf x = vexp2(vsub(vload(at_p + j * kLanes), l));
                vstore(at_p + j * kLanes, x);
                vstore(at_ds + j * kLanes, vmul(x, vadd(vload(at_ds + j * kLanes), c)));
            }
            if (special) {
                const vf sum = vadd(first_product, vload(first_shift + i * kWidth));
                vstore(at_ds + first, vmul(vload(at_p + first), sum));
            }
            for (std::int64_t j = 0; masked && j < span.end - span.begin; ++j) {
                const vi l0 = vload(lo + i * kWidth);
                const vi h0 = vload(hi + i * kWidth);
                const auto key = static_cast<std::int32_t>(span.begin + j);
                const vf none = vset(0.0F);
                vstore(at_p + j * kLanes,
                       vwhere_visible(l0, h0, key, vload(at_p + j * kLanes), none));
                vstore(at_ds + j * kLanes,
                       vwhere_visible(l0, h0, key, vload(at_ds + j * kLanes), none));
            }
        }
        into_queries(block, r, rows, n, ds, span);
    }

    // dq += scale K dS for the rows of a panel
    static void into_queries(const GradBlock& block, const Room& r, const GradRow* rows,
                             std::int64_t n, const float* ds, const Span& span) {
        const std::int64_t d = block.width;
        const float* k = r.keys.k + (span.begin - block.begin) * r.keys.k_row;
        float* to = r.dq;
        for (std::int64_t left = d; left > 0;) {
            const std::int64_t height = tile_height<R>(left);
            with_height<R>(height, [&]<int H>() {
                vf acc[H][NV] = {};
                dot(acc, k, 1, r.keys.k_row, ds, kLanes, span.end - span.begin);
#pragma GCC unroll 16
                for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
                    for (int i = 0; i < NV; ++i) {
                        vstore(to + (h * NV + i) * kWidth, acc[h][i]);
                    }
                }
            });
            k += height;
            to += height * kLanes;
            left -= height;
        }
        unpack_rows<NV>(r.dq, d, r.staged);
        const vf scale = vset(block.scale);
        for (std::int64_t lane = 0; lane < n; ++lane) {
            if (rows[lane].lo >= rows[lane].hi) {
                continue;
            }
            float* dq = rows[lane].dq;
            const float* more = r.staged + lane * d;
            std::int64_t i = 0;
            for (; i + kWidth <= d; i += kWidth) {
                vstore(dq + i, vfma(scale, vload(more + i), vload(dq + i)));
            }
            for (; i < d; ++i) {
                dq[i] += block.scale * more[i];
            }
        }
    }

    // dv += P dO and dk += scale dS Q for the keys of the block, over all panels
    static void into_keys(const GradBlock& block, const Room& r, const Span* span,
                          std::int64_t panels, const Span& all) {
        const std::int64_t row = padded(block.width);
        for (std::int64_t i = 0; i < block.width; i += kLanes) {
            std::int64_t j = all.begin - block.begin;
            for (std::int64_t left = all.end - all.begin; left > 0;) {
                const std::int64_t height = tile_height<R>(left);
                with_height<R>(height, [&]<int H>() {
                    outer_tile<H>(r.p, r.dout + i, row, span, panels, block.begin, j, 1.0F,
                                  block.dv + j * row + i);
                    outer_tile<H>(r.ds, r.q + i, row, span, panels, block.begin, j, block.scale,
                                  block.dk + j * row + i);
                });
                j += height;
                left -= height;
            }
        }
    }

    template <int H>
    static void outer_tile(const float* p, const float* rows, std::int64_t row, const Span* span,
                           std::int64_t panels, std::int64_t begin, std::int64_t j, float scale,
                           float* out) {
        vf acc[H][NV] = {};
        for (std::int64_t i = 0; i < panels; ++i) {
            if (begin + j < span[i].end && span[i].begin < begin + j + H) {
                dot(acc, p + (i * kGradKeys + j) * kLanes, kLanes, 1, rows + i * kLanes * row, row,
                    kLanes);
            }
        }
#pragma GCC unroll 16
        for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
            for (int n = 0; n < NV; ++n) {
                float* at = out + h * row + n * kWidth;
                vstore(at, vfma(vset(scale), acc[h][n], vload(at)));
            }
        }
    }

    static void zero(float* a, float* b) {
        for (int n = 0; n < NV; ++n) {
            vstore(a + n * kWidth, vset(0.0F));
            vstore(b + n * kWidth, vset(0.0F));
        }
    }

    static void copy_row(const T* from, std::int64_t col, std::int64_t d, float* to) {
        copy_rows(from, 0, col, 1, d, to);
    }

    // dout *= weight, or the element-wise gate
    static void weigh(const GradBlock& block, const GradRow& row, float* dout) {
        const auto* gate = static_cast<const T*>(row.gate);
        const std::int64_t d = block.width;
        std::int64_t i = 0;
        if (gate == nullptr || block.gate_col == 1) {
            for (; i + kWidth <= d; i += kWidth) {
                const vf g =
                    gate == nullptr ? vset(row.weight) : vsigmoid(Stored<T>::load(gate + i));
                vstore(dout + i, vmul(g, vload(dout + i)));
            }
        }
        for (; i < d; ++i) {
            dout[i] *=
                gate == nullptr ? row.weight : sigmoid(Stored<T>::get(gate[i * block.gate_col]));
        }
    }

    static void gate(const GateRow& row) {
        const auto* x = static_cast<const T*>(row.gate);
        const auto* out = static_cast<const T*>(row.out);
        const auto* dout = static_cast<const T*>(row.dout);
        auto* dgate = static_cast<T*>(row.dgate);
        std::int64_t i = 0;
        if (row.gate_col == 1 && row.out_col == 1 && row.dout_col == 1) {
            const vf mean = vset(row.mean);
            for (; i + kWidth <= row.width; i += kWidth) {
                const vf logit = Stored<T>::load(x + i);
                const vf own = vmul(Stored<T>::load(dout + i), Stored<T>::load(out + i));
                const vf sum = vfma(vsigmoid(logit), mean, own);
                Stored<T>::store(dgate + i, vmul(vsigmoid(vsub(vset(0.0F), logit)), sum));
            }
        }
        for (; i < row.width; ++i) {
            const float logit = Stored<T>::get(x[i * row.gate_col]);
            const float own =
                Stored<T>::get(dout[i * row.dout_col]) * Stored<T>::get(out[i * row.out_col]);
            dgate[i] = Stored<T>::put(sigmoid(-logit) * (own + sigmoid(logit) * row.mean));
        }
    }

    // [lane][padded] to [d][lane], times `scale`
    static void pack(const float* from, std::int64_t d, float scale, float* to) {
        const std::int64_t row = padded(d);
        for (int base = 0; base < kLanes; base += kWidth) {
            std::int64_t i = 0;
            for (; i + kWidth <= d; i += kWidth) {
                vf tile[kWidth];
                for (int lane = 0; lane < kWidth; ++lane) {
                    tile[lane] = vload(from + (base + lane) * row + i);
                }
                vtranspose(tile);
                for (int c = 0; c < kWidth; ++c) {
                    vstore(to + (i + c) * kLanes + base, vmul(vset(scale), tile[c]));
                }
            }
            for (; i < d; ++i) {
                for (int lane = base; lane < base + kWidth; ++lane) {
                    to[i * kLanes + lane] = from[lane * row + i] * scale;
                }
            }
        }
    }
};

template <class T>
constexpr GradKernel make_grad_kernel() {
    using G = Fp32Gradient<T>;
    return {G::padded, G::scratch_bytes, G::load, G::rows, G::gate};
}
