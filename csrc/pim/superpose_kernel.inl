// One instruction-set level of the worst drops, included within the namespace of that level.
// Written in: reg, kRegFloats of which are one register; load, store, zero, multiply_add (of a
// register and one float), greater, at_least (a mask of the lanes).

constexpr std::int64_t kParts = kLanes / kRegFloats;

struct Lanes {
    reg part[kParts];
};
inline Lanes load16(const float* p) {
    Lanes x;
    for (std::int64_t i = 0; i < kParts; ++i) {
        x.part[i] = load(p + i * kRegFloats);
    }
    return x;
}
inline void store16(float* p, const Lanes& x) {
    for (std::int64_t i = 0; i < kParts; ++i) {
        store(p + i * kRegFloats, x.part[i]);
    }
}

inline Lanes greater16(const Lanes& a, const Lanes& b) {
    Lanes x;
    for (std::int64_t i = 0; i < kParts; ++i) {
        x.part[i] = greater(a.part[i], b.part[i]);
    }
    return x;
}
// Pairs of pairs: no maximum waits for more than log2 kCount others.
template <int kCount>
inline Lanes largest(const Lanes* x) {
    if constexpr (kCount == 1) {
        return x[0];
    } else {
        return greater16(largest<kCount / 2>(x), largest<kCount / 2>(x + kCount / 2));
    }
}

// out [kSums][kLanes] = sum over n of x [n][kLanes] times factors [n], `step` apart.
template <int kSums>
inline void sums(const float* x, std::int64_t n, const float* factors, std::int64_t step,
                 Lanes (&out)[kSums]) {
    for (Lanes& sum : out) {
        for (reg& part : sum.part) {
            part = zero();
        }
    }
    for (std::int64_t k = 0; k < n; ++k, x += kLanes, factors += step) {
        const Lanes lanes = load16(x);
#pragma GCC unroll 16
        for (int s = 0; s < kSums; ++s) {
            for (std::int64_t i = 0; i < kParts; ++i) {
                out[s].part[i] = multiply_add(lanes.part[i], factors[s], out[s].part[i]);
            }
        }
    }
}

inline double product(const double* x, const double* y, std::int64_t n) {
    constexpr std::int64_t kSums = 16;
    double part[kSums] = {};
    std::int64_t k = 0;
    for (; k + kSums <= n; k += kSums) {
        for (std::int64_t i = 0; i < kSums; ++i) {
            part[i] += x[k + i] * y[k + i];
        }
    }
    for (; k < n; ++k) {
        part[k % kSums] += x[k] * y[k];
    }
    for (std::int64_t half = kSums / 2; half > 0; half /= 2) {
        for (std::int64_t i = 0; i < half; ++i) {
            part[i] += part[i + half];
        }
    }
    return part[0];
}

// The largest of each lane in `tops`, less than which no score can be that of the worst node.
inline void thresholds(const Lanes& best, const float* errors, const Cycles& cycles, float* to) {
    store16(to, best);
    for (std::int64_t l = 0; l < kLanes; ++l) {
        const bool off = l >= cycles.count || ((cycles.idle >> l) & 1U) != 0;
        // What a float cannot hold is far below.
        to[l] = off ? __builtin_inff() : to[l] - 2.0F * errors[l] - 1e-30F;
    }
}

void worst(const Screen& screen, const Cycles& cycles) {
    constexpr std::int64_t kSums = kRegFloats == kLanes ? 16 : 4;  // that registers hold
    constexpr std::int64_t kTile = kNodesOfTile;
    const std::int64_t ranks = screen.columns - 1;
    const std::int64_t tiles = (screen.nodes + kTile - 1) / kTile;
    float* scores = cycles.room;
    float* nodes = scores + screen.columns * kLanes;
    float* tops = nodes + tiles * kTile * kLanes;
    constexpr std::int64_t kFew = std::min(kSums, kScoreColumns);
    for (std::int64_t column = 0; column < screen.columns; column += kFew) {
        Lanes few[kFew];
        sums(cycles.lanes, screen.macros, screen.basis + column, screen.columns, few);
        for (std::int64_t s = 0; s < kFew; ++s) {
            store16(scores + (column + s) * kLanes, few[s]);
        }
    }
    Lanes sum[kSums];
    Lanes best;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        Lanes top;
        for (std::int64_t n = 0; n < kTile; n += kSums) {
            sums(scores, ranks, screen.places + tile * ranks * kTile + n, kTile, sum);
            for (std::int64_t s = 0; s < kSums; ++s) {
                store16(nodes + (tile * kTile + n + s) * kLanes, sum[s]);
            }
            const Lanes some = largest<kSums>(sum);
            top = n == 0 ? some : greater16(top, some);
        }
        store16(tops + tile * kLanes, top);
        best = tile == 0 ? top : greater16(best, top);
    }
    alignas(64) float least[kLanes];
    thresholds(best, scores + ranks * kLanes, cycles, least);
    for (std::int64_t l = 0; l < cycles.count; ++l) {
        cycles.out[l * cycles.out_stride] = ((cycles.idle >> l) & 1U) != 0 ? 0.0 : -__builtin_inf();
    }
    const Lanes bar = load16(least);
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
        const Lanes top = load16(tops + tile * kLanes);
        for (std::int64_t i = 0; i < kParts; ++i) {
            for (std::uint32_t left = at_least(top.part[i], bar.part[i]); left != 0;
                 left &= left - 1) {
                const std::int64_t l = i * kRegFloats + __builtin_ctz(left);
                const std::int64_t end = std::min(screen.nodes, (tile + 1) * kTile);
                for (std::int64_t node = tile * kTile; node < end; ++node) {
                    if (nodes[node * kLanes + l] >= least[l]) {
                        double& out = cycles.out[l * cycles.out_stride];
                        out = std::max(
                            out, product(cycles.currents + l * cycles.stride,
                                         screen.response + node * screen.macros, screen.macros));
                    }
                }
            }
        }
    }
}
