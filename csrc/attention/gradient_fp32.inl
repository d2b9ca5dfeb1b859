// The products of the gradient in fp32, included by the ISA files after
// fp32_dot.inl and gradient.inl.

template <class T>
struct Fp32Gradient {
    static constexpr int NV = kGradVectors;
    static constexpr int kLanes = kGradLanes;
    static constexpr int R = kGradTileRows;
    using Dot = Fp32Dot<T>;

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
        return Dot::copy_floats(d) + 2 * kGradRows * padded_width(d) + 4 * d * kLanes +
               2 * kGradPanels * kGradKeys * kLanes;
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
        r.q = take(kGradRows * padded_width(d));
        r.dout = take(kGradRows * padded_width(d));
        r.q_panel = take(d * kLanes);
        r.dout_panel = take(d * kLanes);
        r.p = take(kGradPanels * kGradKeys * kLanes);
        r.ds = take(kGradPanels * kGradKeys * kLanes);
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

    // P, dS and dQ of one panel.
    static void panel(const GradBlock& block, const Room& r, const GradRow* rows, std::int64_t n,
                      std::int64_t index, const Span& span) {
        const std::int64_t d = block.width;
        const std::int64_t row = padded_width(d);
        const Lanes lanes(rows, n, span);
        float* q = r.q + index * kLanes * row;
        float* dout = r.dout + index * kLanes * row;
        for (int lane = 0; lane < kLanes; ++lane) {
            float* to_q = q + lane * row;
            float* to_dout = dout + lane * row;
            if (lanes.seen[lane]) {
                copy_row(static_cast<const T*>(rows[lane].q), block.q_col, d, to_q);
                copy_row(static_cast<const T*>(rows[lane].dout), block.dout_col, d, to_dout);
                weigh(block, rows[lane], to_dout);
            } else {
                std::memset(to_q, 0, static_cast<std::size_t>(d) * sizeof(float));
                std::memset(to_dout, 0, static_cast<std::size_t>(d) * sizeof(float));
            }
            for (std::int64_t i = d; i < row; ++i) {
                to_q[i] = to_dout[i] = 0.0F;
            }
        }
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
        for (int i = 0; i < NV; ++i) {
            const vf l = vload(lanes.lse + i * kWidth);
            const vf c = vload(lanes.shift + i * kWidth);
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
                const vf sum = vadd(first_product, vload(lanes.first_shift + i * kWidth));
                vstore(at_ds + first, vmul(vload(at_p + first), sum));
            }
            for (std::int64_t j = 0; lanes.masked && j < span.end - span.begin; ++j) {
                const vi l0 = vload(lanes.lo + i * kWidth);
                const vi h0 = vload(lanes.hi + i * kWidth);
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
        const float* k = r.keys.k + (span.begin - block.begin) * r.keys.k_row;
        float* to = r.dq;
        for (std::int64_t left = block.width; left > 0;) {
            const std::int64_t height = tile_height<R>(left);
            with_height<R>(height, [&]<int H>() {
                vf acc[H][NV] = {};
                dot(acc, k, 1, r.keys.k_row, ds, kLanes, span.end - span.begin);
                store_tile(acc, to);
            });
            k += height;
            to += height * kLanes;
            left -= height;
        }
        add_to_queries(block, rows, n, r.dq, r.staged);
    }

    template <int H>
    static void key_tile(const GradBlock& block, const Room& r, const Span* spans,
                         std::int64_t panels, std::int64_t j, std::int64_t i) {
        const std::int64_t at = j * padded_width(block.width) + i;
        sum_rows<H>(block, r.p, r.dout + i, spans, panels, j, 1.0F, block.dv + at);
        sum_rows<H>(block, r.ds, r.q + i, spans, panels, j, block.scale, block.dk + at);
    }

    // out += scale times the sum over rows of p[key][row] rows[row]
    template <int H>
    static void sum_rows(const GradBlock& block, const float* p, const float* rows,
                         const Span* spans, std::int64_t panels, std::int64_t j, float scale,
                         float* out) {
        const std::int64_t row = padded_width(block.width);
        const std::int64_t key = block.begin + j;
        vf acc[H][NV] = {};
        for (std::int64_t i = 0; i < panels; ++i) {
            if (key < spans[i].end && spans[i].begin < key + H) {
                dot(acc, p + (i * kGradKeys + j) * kLanes, kLanes, 1, rows + i * kLanes * row, row,
                    kLanes);
            }
        }
        add_tile(acc, scale, row, out);
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

    // [lane][padded] to [d][lane], times `scale`
    static void pack(const float* from, std::int64_t d, float scale, float* to) {
        const std::int64_t row = padded_width(d);
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
