// The body of a level: its file includes this inside its own namespace, after `Real` and `Code` with
//     kLanes, load, store, stream, fence, set, floor, to_code, real operations, and
//     hamming<kNibbles>(Code), the number of ones of the lowest 4 kNibbles bits.

// Calls f(at, n, 1 / scale) for the pieces of a block that share a scale, in order.
template <class F>
inline void each_run(const Block& b, F f) noexcept {
    std::int64_t row = b.begin / b.width;
    std::int64_t column = b.begin - row * b.width;
    for (std::int64_t at = b.begin; at < b.end;) {
        const std::int64_t g = column / b.group;
        const std::int64_t stop = (g + 1) * b.group < b.width ? (g + 1) * b.group : b.width;
        const std::int64_t n = stop - column < b.end - at ? stop - column : b.end - at;
        f(at, n, 1.0F / b.scales[row * b.scale_stride + g]);
        at += n;
        column += n;
        if (column == b.width) {
            column = 0;
            ++row;
        }
    }
}

struct Constants {
    explicit Constants(const Block& b) noexcept
        : low(set(b.low)),
          high(set(b.high)),
          shift(set(b.shift)),
          margin(set(b.margin)),
          one(set(1.0F)),
          three(set(3.0F)),
          mask(set_code(b.mask)) {}
    Real low, high, shift, margin, one, three;
    Code mask;
};

// Limits come first: the second operand of min and max passes where it is NaN.
inline Real clip(Real x, const Constants& c) noexcept { return max(c.low, min(c.high, x)); }

template <int kNibbles>
inline Real ones(Real code, const Constants& c) noexcept {
    return hamming<kNibbles>(both(to_code(code), c.mask));
}

template <int kNibbles>
inline Real value(Real w, Real inverse, const Constants& c) noexcept {
    const Real x = clip(add(multiply(w, inverse), c.shift), c);
    const Real below = floor(x);
    const Real at = ones<kNibbles>(below, c);
    const Real next = ones<kNibbles>(add(below, c.one), c);
    return add(at, multiply(subtract(x, below), subtract(next, at)));
}

// Twice the slope. Within the margin of an integer the neighbours on both sides are taken, two
// codes apart: the mean of both slopes. Clipping them makes the slope 0 beyond the codes.
template <int kNibbles>
inline Real slope(Real w, Real inverse, const Constants& c) noexcept {
    const Real x = add(multiply(w, inverse), c.shift);
    const Real below = floor(subtract(x, c.margin));
    const Real above = add(floor(add(x, c.margin)), c.one);
    const Real apart = subtract(above, below);
    const Real change =
        subtract(ones<kNibbles>(clip(above, c), c), ones<kNibbles>(clip(below, c), c));
    return multiply(change, subtract(c.three, apart));
}

template <int kNibbles>
double sum_of(const Block& b) noexcept {
    const Constants c(b);
    double total = 0.0;
    each_run(b, [&](std::int64_t at, std::int64_t n, float inverse_scale) noexcept {
        const Real inverse = set(inverse_scale);
        const float* w = b.weight + at;
        Real sums = set(0.0F);
        Real others = sums;
        std::int64_t i = 0;
        for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
            sums = add(sums, value<kNibbles>(load(w + i), inverse, c));
            others = add(others, value<kNibbles>(load(w + i + kLanes), inverse, c));
        }
        alignas(64) float lanes[kLanes];
        store(lanes, add(sums, others));
        for (const float lane : lanes) {
            total += double{lane};
        }
        for (; i < n; i += kLanes) {
            const std::int64_t some = n - i < kLanes ? n - i : kLanes;
            float in[kLanes] = {};
            std::copy_n(w + i, some, in);
            store(lanes, value<kNibbles>(load(in), inverse, c));
            for (std::int64_t j = 0; j < some; ++j) {
                total += double{lanes[j]};
            }
        }
    });
    return total;
}

template <int kNibbles, Store kStore>
void gradient_of(const Block& b, float factor, float* grad) noexcept {
    const Constants c(b);
    each_run(b, [&](std::int64_t at, std::int64_t n, float inverse_scale) noexcept {
        const Real inverse = set(inverse_scale);
        const Real by = set(factor * 0.5F * inverse_scale);
        const float* w = b.weight + at;
        float* to = grad + at;
        const auto put = [&](const float* in, float* out) noexcept {
            const Real g = multiply(slope<kNibbles>(load(in), inverse, c), by);
            if constexpr (kStore == Store::kStream) {
                stream(out, g);
            } else {
                store(out, kStore == Store::kAdd ? add(load(out), g) : g);
            }
        };
        std::int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            put(w + i, to + i);
        }
        if (i < n) {
            alignas(64) float in[kLanes] = {};
            alignas(64) float out[kLanes] = {};
            std::copy_n(w + i, n - i, in);
            std::copy_n(to + i, n - i, out);
            put(in, out);
            std::copy_n(out, n - i, to + i);
        }
    });
    if constexpr (kStore == Store::kStream) {
        fence();
    }
}

template <int kNibbles>
void gradient_by(const Block& b, float factor, Store how, float* grad) noexcept {
    switch (how) {
        case Store::kWrite:
            return gradient_of<kNibbles, Store::kWrite>(b, factor, grad);
        case Store::kStream:
            return gradient_of<kNibbles, Store::kStream>(b, factor, grad);
        case Store::kAdd:
            return gradient_of<kNibbles, Store::kAdd>(b, factor, grad);
    }
}

double sum(const Block& b) noexcept { return b.mask < 256 ? sum_of<2>(b) : sum_of<4>(b); }

void gradient(const Block& b, float factor, Store how, float* grad) noexcept {
    if (b.mask < 256) {
        gradient_by<2>(b, factor, how, grad);
    } else {
        gradient_by<4>(b, factor, how, grad);
    }
}
