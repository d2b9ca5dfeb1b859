// What the gradient kernels share, included by the ISA files after
// block_kernel.inl.
//
// Rows come in chunks of a few panels. Lane by lane, as in the forward pass:
// P = 2^(S - lse), dP = V dO, dS = P (dP + shift), dQ = K dS. Then, with the
// chunk's rows as the summed axis and channels in the lanes: dV += P dO, dK +=
// dS Q. Five products in all, each at the tile size of the forward pass.

constexpr int kGradVectors = kWideVectors;
constexpr int kGradLanes = kGradVectors * kWidth;
constexpr int kGradTileRows = kTileRows<kGradVectors>;
constexpr std::int64_t kGradPanels = kGradRows / kGradLanes;
static_assert(kGradRows % kGradLanes == 0 && kGradKeys % kGradTileRows == 0);

// Whole tiles of channels, and rows that do not crowd into a few cache sets.
inline std::int64_t padded_width(std::int64_t d) {
    return (d + kGradLanes - 1) / kGradLanes * kGradLanes + (kGradLanes < 16 ? 16 : kGradLanes);
}

// Keys of a block that some row of a panel sees.
struct Span {
    std::int64_t begin, end;
};

// The numbers of a panel's rows; zeros in the lanes that see no key of the span.
struct Lanes {
    Lanes(const GradRow* rows, std::int64_t n, const Span& s) {
        for (int lane = 0; lane < kGradLanes; ++lane) {
            const bool visible = lane < n && rows[lane].lo < rows[lane].hi &&
                                 rows[lane].lo < s.end && s.begin < rows[lane].hi;
            const GradRow& row = rows[visible ? lane : 0];
            seen[lane] = visible;
            lse[lane] = visible ? row.lse * kLog2e : 0.0F;
            weight[lane] = visible ? row.weight : 0.0F;
            shift[lane] = visible ? row.shift : 0.0F;
            first_shift[lane] = visible ? row.first_shift : 0.0F;
            lo[lane] = visible ? row.lo : 0;
            hi[lane] = visible ? row.hi : 0;
            masked = masked || lo[lane] > s.begin || hi[lane] < s.end;
        }
    }

    alignas(64) float lse[kGradLanes];  // in powers of two
    alignas(64) float weight[kGradLanes];
    alignas(64) float shift[kGradLanes];
    alignas(64) float first_shift[kGradLanes];
    alignas(64) std::int32_t lo[kGradLanes];
    alignas(64) std::int32_t hi[kGradLanes];
    bool seen[kGradLanes];
    bool masked = false;
};

// dq += scale times a panel's sums, [d][lane]; `staged` holds as many
inline void add_to_queries(const GradBlock& block, const GradRow* rows, std::int64_t n,
                           const float* sums, float* staged) {
    const std::int64_t d = block.width;
    unpack_rows<kGradVectors>(sums, d, staged);
    const vf scale = vset(block.scale);
    for (std::int64_t lane = 0; lane < n; ++lane) {
        if (rows[lane].lo >= rows[lane].hi) {
            continue;
        }
        float* dq = rows[lane].dq;
        const float* more = staged + lane * d;
        std::int64_t i = 0;
        for (; i + kWidth <= d; i += kWidth) {
            vstore(dq + i, vfma(scale, vload(more + i), vload(dq + i)));
        }
        for (; i < d; ++i) {
            dq[i] += block.scale * more[i];
        }
    }
}

// A tile of sums over keys or rows, [row][lane], to memory
template <int H>
inline void store_tile(const vf (&acc)[H][kGradVectors], float* to) {
#pragma GCC unroll 16
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
        for (int i = 0; i < kGradVectors; ++i) {
            vstore(to + (h * kGradVectors + i) * kWidth, acc[h][i]);
        }
    }
}

// out += scale acc, `row` floats from row to row
template <int H>
inline void add_tile(const vf (&acc)[H][kGradVectors], float scale, std::int64_t row, float* out) {
#pragma GCC unroll 16
    for (int h = 0; h < H; ++h) {
#pragma GCC unroll 4
        for (int n = 0; n < kGradVectors; ++n) {
            float* at = out + h * row + n * kWidth;
            vstore(at, vfma(vset(scale), acc[h][n], vload(at)));
        }
    }
}

// dgate = (1 - G) (dout out + G mean), G = sigmoid(gate)
template <class T>
inline void gate_gradient(const GateRow& row) {
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

// Products: how keys and rows lie, and the five products over them.
//   Room& room(scratch)                         what load() has laid out
//   panel(block, room, rows, n, index, span)    P, dS and dQ of one panel
//   key_tile<H>(block, room, spans, panels, j, i)
//                                               dK and dV of H keys from j, one
//                                               tile of channels from i
template <class Products>
struct Gradient {
    static void rows(const GradBlock& block, const GradRow* rows, std::int64_t count,
                     std::byte* scratch) {
        const auto& room = Products::room(scratch);
        Span spans[kGradPanels];
        std::int64_t panels = 0;
        Span all{block.end, block.begin};
        for (std::int64_t first = 0; first < count; first += kGradLanes, ++panels) {
            const std::int64_t n = count - first < kGradLanes ? count - first : kGradLanes;
            Span& s = spans[panels];
            s.begin = rows[first].lo > block.begin ? rows[first].lo : block.begin;
            s.end = rows[first + n - 1].hi < block.end ? rows[first + n - 1].hi : block.end;
            if (s.begin >= s.end) {
                s = {block.end, block.begin};
                continue;
            }
            all.begin = s.begin < all.begin ? s.begin : all.begin;
            all.end = s.end > all.end ? s.end : all.end;
            Products::panel(block, room, rows + first, n, panels, s);
        }
        for (std::int64_t i = 0; all.begin < all.end && i < block.width; i += kGradLanes) {
            std::int64_t j = all.begin - block.begin;
            for (std::int64_t left = all.end - all.begin; left > 0;) {
                const std::int64_t height = tile_height<kGradTileRows>(left);
                with_height<kGradTileRows>(height, [&]<int H>() {
                    Products::template key_tile<H>(block, room, spans, panels, j, i);
                });
                j += height;
                left -= height;
            }
        }
    }
};

template <class Products, class T>
constexpr GradKernel make_grad_kernel() {
    return {padded_width, Products::scratch_bytes, Products::load, Gradient<Products>::rows,
            gate_gradient<T>};
}
