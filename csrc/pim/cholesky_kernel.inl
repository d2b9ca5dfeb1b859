// One instruction-set level of the sparse Cholesky solver, included within the namespace of that
// level, which says kLanes, the doubles of a vector, and kTileRows.

using Vector = double __attribute__((vector_size(kLanes * 8), aligned(8), may_alias));

inline Vector load(const double* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(double* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
inline double sum(Vector v) {
    double s = 0.0;
    for (int i = 0; i < kLanes; ++i) {
        s += v[i];
    }
    return s;
}

// front[i, j] -= sum over k of l[i, k] l[j, k] for C columns from j and all rows from j on.
template <int C>
inline void update_columns(double* front, const double* l, std::int64_t stride, std::int64_t j,
                           std::int64_t size, std::int64_t depth) {
    constexpr std::int64_t kRows = 2 * kLanes;
    for (std::int64_t i = j / kRows * kRows; i < size; i += kRows) {
        Vector sums[C][2];
        for (int c = 0; c < C; ++c) {
            sums[c][0] = load(front + (j + c) * stride + i);
            sums[c][1] = load(front + (j + c) * stride + i + kLanes);
        }
        for (std::int64_t k = 0; k < depth; ++k) {
            const double* column = l + k * stride;
            const Vector low = load(column + i);
            const Vector high = load(column + i + kLanes);
            for (int c = 0; c < C; ++c) {
                sums[c][0] -= low * column[j + c];
                sums[c][1] -= high * column[j + c];
            }
        }
        for (int c = 0; c < C; ++c) {
            store(front + (j + c) * stride + i, sums[c][0]);
            store(front + (j + c) * stride + i + kLanes, sums[c][1]);
        }
    }
}

std::int64_t eliminate(double* front, std::int64_t stride, std::int64_t size,
                       std::int64_t columns) {
    constexpr std::int64_t kBlock = 8;
    for (std::int64_t begin = 0; begin < columns; begin += kBlock) {
        const std::int64_t end = begin + kBlock < columns ? begin + kBlock : columns;
        for (std::int64_t j = begin; j < end; ++j) {
            double* column = front + j * stride;
            const double pivot = column[j];
            if (!(pivot > 0.0)) {
                return j;
            }
            const double scale = 1.0 / __builtin_sqrt(pivot);
            const std::int64_t from = (j + 1) / kLanes * kLanes;
            for (std::int64_t i = from; i < size; i += kLanes) {
                store(column + i, load(column + i) * scale);
            }
            column[j] = scale;
            for (std::int64_t k = j + 1; k < end; ++k) {
                const double factor = column[k];
                double* other = front + k * stride;
                for (std::int64_t i = k / kLanes * kLanes; i < size; i += kLanes) {
                    store(other + i, load(other + i) - load(column + i) * factor);
                }
            }
        }
        const double* l = front + begin * stride;
        std::int64_t j = end;
        for (; j + 4 <= size; j += 4) {
            update_columns<4>(front, l, stride, j, size, end - begin);
        }
        for (; j < size; ++j) {
            update_columns<1>(front, l, stride, j, size, end - begin);
        }
    }
    return -1;
}

// Columns [c, c + C) of a panel: room[0, rows) += their values times x[c ...].
template <int C>
inline void add_columns(const double* panel, std::int64_t stride, std::int64_t rows,
                        const double* x, double* room) {
    std::int64_t i = 0;
    for (; i + kLanes <= rows; i += kLanes) {
        Vector s = load(room + i);
        for (int c = 0; c < C; ++c) {
            s += load(panel + c * stride + i) * x[c];
        }
        store(room + i, s);
    }
    for (; i < rows; ++i) {
        for (int c = 0; c < C; ++c) {
            room[i] += panel[c * stride + i] * x[c];
        }
    }
}

// x[c] -= the product of column c with room, for C columns.
template <int C>
inline void take_columns(const double* panel, std::int64_t stride, std::int64_t rows,
                         const double* room, double* x) {
    Vector s[C];
    for (int c = 0; c < C; ++c) {
        s[c] = Vector{};
    }
    std::int64_t i = 0;
    for (; i + kLanes <= rows; i += kLanes) {
        const Vector t = load(room + i);
        for (int c = 0; c < C; ++c) {
            s[c] += load(panel + c * stride + i) * t;
        }
    }
    for (int c = 0; c < C; ++c) {
        double rest = 0.0;
        for (std::int64_t k = i; k < rows; ++k) {
            rest += panel[c * stride + k] * room[k];
        }
        x[c] -= sum(s[c]) + rest;
    }
}

void solve_one(const Panels& f, double* x, double* room) {
    for (std::int64_t s = 0; s < f.supernodes; ++s) {
        const std::int64_t columns = f.first[s + 1] - f.first[s];
        const std::int64_t rows = f.rows_begin[s + 1] - f.rows_begin[s];
        const std::int64_t stride = columns + rows;
        const double* panel = f.values + f.panel_begin[s];
        const std::int32_t* below = f.rows + f.rows_begin[s];
        double* own = x + f.first[s];
        for (std::int64_t j = 0; j < columns; ++j) {
            const double value = own[j] *= panel[j * stride + j];
            for (std::int64_t i = j + 1; i < columns; ++i) {
                own[i] -= panel[j * stride + i] * value;
            }
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            room[i] = 0.0;
        }
        std::int64_t j = 0;
        for (; j + 4 <= columns; j += 4) {
            add_columns<4>(panel + j * stride + columns, stride, rows, own + j, room);
        }
        for (; j < columns; ++j) {
            add_columns<1>(panel + j * stride + columns, stride, rows, own + j, room);
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            x[below[i]] -= room[i];
        }
    }
    for (std::int64_t s = f.supernodes - 1; s >= 0; --s) {
        const std::int64_t columns = f.first[s + 1] - f.first[s];
        const std::int64_t rows = f.rows_begin[s + 1] - f.rows_begin[s];
        const std::int64_t stride = columns + rows;
        const double* panel = f.values + f.panel_begin[s];
        const std::int32_t* below = f.rows + f.rows_begin[s];
        double* own = x + f.first[s];
        for (std::int64_t i = 0; i < rows; ++i) {
            room[i] = x[below[i]];
        }
        std::int64_t j = 0;
        for (; j + 4 <= columns; j += 4) {
            take_columns<4>(panel + j * stride + columns, stride, rows, room, own + j);
        }
        for (; j < columns; ++j) {
            take_columns<1>(panel + j * stride + columns, stride, rows, room, own + j);
        }
        for (j = columns - 1; j >= 0; --j) {
            double value = own[j];
            for (std::int64_t i = j + 1; i < columns; ++i) {
                value -= panel[j * stride + i] * own[i];
            }
            own[j] = value * panel[j * stride + j];
        }
    }
}

constexpr int kWide = static_cast<int>(kTogether) / kLanes;

struct Row {
    Vector part[kWide];
};

inline Row load_row(const double* p) {
    Row r;
    for (int v = 0; v < kWide; ++v) {
        r.part[v] = load(p + v * kLanes);
    }
    return r;
}

// For R rows i: x[to(i)] -= sum over j of panel[i, j] own[j].
template <int R>
inline void scatter_rows(const double* panel, std::int64_t stride, std::int64_t columns,
                         const double* own, const std::int32_t* below, double* x) {
    Row sums[R]{};
    for (std::int64_t j = 0; j < columns; ++j) {
        const Row value = load_row(own + j * kTogether);
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < kWide; ++v) {
                sums[r].part[v] += value.part[v] * panel[j * stride + r];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        double* to = x + below[r] * kTogether;
        for (int v = 0; v < kWide; ++v) {
            store(to + v * kLanes, load(to + v * kLanes) - sums[r].part[v]);
        }
    }
}

// For R columns j: own[j] -= sum over i of panel[i, j] x[from(i)].
template <int R>
inline void gather_rows(const double* panel, std::int64_t stride, std::int64_t rows,
                        const std::int32_t* below, const double* x, double* own) {
    Row sums[R]{};
    for (std::int64_t i = 0; i < rows; ++i) {
        const Row value = load_row(x + below[i] * kTogether);
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < kWide; ++v) {
                sums[r].part[v] += value.part[v] * panel[r * stride + i];
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        double* to = own + r * kTogether;
        for (int v = 0; v < kWide; ++v) {
            store(to + v * kLanes, load(to + v * kLanes) - sums[r].part[v]);
        }
    }
}

void solve_together(const Panels& f, double* x) {
    for (std::int64_t s = 0; s < f.supernodes; ++s) {
        const std::int64_t columns = f.first[s + 1] - f.first[s];
        const std::int64_t rows = f.rows_begin[s + 1] - f.rows_begin[s];
        const std::int64_t stride = columns + rows;
        const double* panel = f.values + f.panel_begin[s];
        const std::int32_t* below = f.rows + f.rows_begin[s];
        double* own = x + f.first[s] * kTogether;
        for (std::int64_t j = 0; j < columns; ++j) {
            Row value = load_row(own + j * kTogether);
            for (int v = 0; v < kWide; ++v) {
                value.part[v] *= panel[j * stride + j];
                store(own + j * kTogether + v * kLanes, value.part[v]);
            }
            for (std::int64_t i = j + 1; i < columns; ++i) {
                double* to = own + i * kTogether;
                for (int v = 0; v < kWide; ++v) {
                    store(to + v * kLanes,
                          load(to + v * kLanes) - value.part[v] * panel[j * stride + i]);
                }
            }
        }
        std::int64_t i = 0;
        for (; i + kTileRows <= rows; i += kTileRows) {
            scatter_rows<kTileRows>(panel + columns + i, stride, columns, own, below + i, x);
        }
        for (; i < rows; ++i) {
            scatter_rows<1>(panel + columns + i, stride, columns, own, below + i, x);
        }
    }
    for (std::int64_t s = f.supernodes - 1; s >= 0; --s) {
        const std::int64_t columns = f.first[s + 1] - f.first[s];
        const std::int64_t rows = f.rows_begin[s + 1] - f.rows_begin[s];
        const std::int64_t stride = columns + rows;
        const double* panel = f.values + f.panel_begin[s];
        const std::int32_t* below = f.rows + f.rows_begin[s];
        double* own = x + f.first[s] * kTogether;
        std::int64_t j = 0;
        for (; j + kTileRows <= columns; j += kTileRows) {
            gather_rows<kTileRows>(panel + j * stride + columns, stride, rows, below, x,
                                   own + j * kTogether);
        }
        for (; j < columns; ++j) {
            gather_rows<1>(panel + j * stride + columns, stride, rows, below, x,
                           own + j * kTogether);
        }
        for (j = columns - 1; j >= 0; --j) {
            Row value = load_row(own + j * kTogether);
            for (std::int64_t i = j + 1; i < columns; ++i) {
                const Row other = load_row(own + i * kTogether);
                for (int v = 0; v < kWide; ++v) {
                    value.part[v] -= other.part[v] * panel[j * stride + i];
                }
            }
            for (int v = 0; v < kWide; ++v) {
                store(own + j * kTogether + v * kLanes, value.part[v] * panel[j * stride + j]);
            }
        }
    }
}
