// The body of a level: its file includes this inside its own namespace, after the types `Real` and
// `Code` of kLanes numbers, operations on them, and
//     uncommon(a, limit, x, y)  whether for any lane a >= limit, or x != y, or one is NaN
//     Bytes                     what to_bytes makes of four `Real`, and from_bytes takes apart
//     Ones<kNibbles>            of a code: of(code), its ones; at(code, step), and what the next adds

// Far enough to be in the next page, where the hardware's own prefetching ends.
constexpr std::int64_t kAhead = 1024;

// Calls f(at, n, 1 / scale) for the pieces of a range that share a scale, in order.
template <class F>
inline void each_run(const Problem& p, Range range, F f) noexcept {
    std::int64_t row = range.begin / p.width;
    std::int64_t column = range.begin - row * p.width;
    for (std::int64_t at = range.begin; at < range.end;) {
        const std::int64_t g = column / p.group;
        const std::int64_t stop = (g + 1) * p.group < p.width ? (g + 1) * p.group : p.width;
        const std::int64_t n = stop - column < range.end - at ? stop - column : range.end - at;
        f(at, n, 1.0F / p.scales[row * p.scale_stride + g]);
        at += n;
        column += n;
        if (column == p.width) {
            column = 0;
            ++row;
        }
    }
}

template <int kNibbles>
struct Layer {
    explicit Layer(const Problem& p) noexcept
        : low(set(p.low)),
          high(set(p.high)),
          shift(set(p.shift)),
          margin(set(p.margin)),
          one(set(1.0F)),
          three(set(3.0F)),
          half(set(0.5F)),
          inside(set(0.5F - p.margin)),
          ones(p) {}

    // Limits come first: the second operand of min and max passes where it is NaN.
    Real clip(Real x) const noexcept { return max(low, min(high, x)); }

    // The interpolated Hamming weight, and twice its slope where that is asked for.
    template <bool kSlope>
    Real value(Real w, Real inverse, [[maybe_unused]] Real& slope) const noexcept {
        const Real x = add(multiply(w, inverse), shift);
        const Real clipped = clip(x);
        const Code below = floor_code(clipped);
        const Real part = subtract(clipped, to_real(below));
        Real step;
        const Real at = ones.at(below, step);
        if constexpr (kSlope) {
            if (uncommon(absolute(subtract(part, half)), inside, x, clipped)) [[unlikely]] {
                slope = slope_anywhere(x);
            } else {
                slope = add(step, step);
            }
        }
        return add(at, multiply(part, step));
    }

    // Twice the slope. Within the margin of an integer the neighbours on both sides are taken, two
    // codes apart: the mean of both slopes. Clipping them makes the slope 0 beyond the codes.
    Real slope_anywhere(Real x) const noexcept {
        x = max(subtract(low, one), min(add(high, one), x));  // infinities too
        const Real below = floor(subtract(x, margin));
        const Real above = add(floor(add(x, margin)), one);
        const Real apart = subtract(above, below);
        const Real change =
            subtract(ones.of(floor_code(clip(above))), ones.of(floor_code(clip(below))));
        return multiply(change, subtract(three, apart));
    }

    Real low, high, shift, margin, one, three, half, inside;
    Ones<kNibbles> ones;
};

template <int kNibbles, bool kSlopes>
double sum_of(const Problem& p, Range range, [[maybe_unused]] std::int8_t* slopes) noexcept {
    const Layer<kNibbles> layer(p);
    double total = 0.0;
    Real slope[4] = {};
    each_run(p, range, [&](std::int64_t at, std::int64_t n, float inverse_scale) noexcept {
        const Real inverse = set(inverse_scale);
        const float* w = p.weight + at;
        Real sums[2] = {set(0.0F), set(0.0F)};
        std::int64_t i = 0;
        for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
            for (int u = 0; u < 4; ++u) {
                const float* from = w + i + u * kLanes;
                __builtin_prefetch(from + kAhead);
                sums[u % 2] =
                    add(sums[u % 2], layer.template value<kSlopes>(load(from), inverse, slope[u]));
            }
            if constexpr (kSlopes) {
                stream_bytes(slopes + (at - range.begin) + i, to_bytes(slope));
            }
        }
        alignas(64) float lanes[kLanes];
        store(lanes, add(sums[0], sums[1]));
        for (const float lane : lanes) {
            total += double{lane};
        }
        for (; i < n; i += kLanes) {
            const std::int64_t some = n - i < kLanes ? n - i : kLanes;
            float in[kLanes] = {};
            std::copy_n(w + i, some, in);
            store(lanes, layer.template value<false>(load(in), inverse, slope[0]));
            for (std::int64_t j = 0; j < some; ++j) {
                total += double{lanes[j]};
            }
        }
    });
    return total;
}

template <int kNibbles, Store kStore>
void gradient_of(const Problem& p, Range range, float factor, float* grad) noexcept {
    const Layer<kNibbles> layer(p);
    each_run(p, range, [&](std::int64_t at, std::int64_t n, float inverse_scale) noexcept {
        const Real inverse = set(inverse_scale);
        const Real by = set(factor * 0.5F * inverse_scale);
        const float* w = p.weight + at;
        float* to = grad + at;
        const auto put = [&](const float* in, float* out) noexcept {
            Real slope;
            layer.template value<true>(load(in), inverse, slope);
            const Real g = multiply(slope, by);
            if constexpr (kStore == Store::kStream) {
                stream(out, g);
            } else {
                store(out, kStore == Store::kAdd ? add(load(out), g) : g);
            }
        };
        std::int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            __builtin_prefetch(w + i + kAhead);
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
void gradient_by(const Problem& p, Range range, float factor, Store how, float* grad) noexcept {
    switch (how) {
        case Store::kWrite:
            return gradient_of<kNibbles, Store::kWrite>(p, range, factor, grad);
        case Store::kStream:
            return gradient_of<kNibbles, Store::kStream>(p, range, factor, grad);
        case Store::kAdd:
            return gradient_of<kNibbles, Store::kAdd>(p, range, factor, grad);
    }
}

std::int8_t* slopes_in(float* grad, Range range) noexcept {
    const std::int64_t n = range.end - range.begin;
    return reinterpret_cast<std::int8_t*>(grad + range.begin) + 3 * n;
}

double sum(const Problem& p, Range range) noexcept {
    return p.mask < 256 ? sum_of<2, false>(p, range, nullptr) : sum_of<4, false>(p, range, nullptr);
}

double sum_and_slopes(const Problem& p, Range range, float* grad) noexcept {
    std::int8_t* slopes = slopes_in(grad, range);
    const double total =
        p.mask < 256 ? sum_of<2, true>(p, range, slopes) : sum_of<4, true>(p, range, slopes);
    fence();
    return total;
}

void gradient(const Problem& p, Range range, float factor, Store how, float* grad) noexcept {
    if (p.mask < 256) {
        gradient_by<2>(p, range, factor, how, grad);
    } else {
        gradient_by<4>(p, range, factor, how, grad);
    }
}

// From the start to the end: a strip of slopes is read before the last floats are written over it.
void expand(const Problem& p, Range range, float factor, float* grad) noexcept {
    const std::int8_t* slopes = slopes_in(grad, range);
    each_run(p, range, [&](std::int64_t at, std::int64_t n, float inverse_scale) noexcept {
        const Real by = set(factor * 0.5F * inverse_scale);
        const std::int8_t* from = slopes + (at - range.begin);
        for (std::int64_t i = 0; i < n; i += 4 * kLanes) {
            const Bytes strip = load_bytes(from + i);
            for (int u = 0; u < 4; ++u) {
                stream(grad + at + i + u * kLanes, multiply(from_bytes(strip, u), by));
            }
        }
    });
    fence();
}
