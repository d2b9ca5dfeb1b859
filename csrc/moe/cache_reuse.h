#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "moe/cache.h"
#include "moe/cache_residents.h"
#include "moe/cache_scored.h"

namespace quernstone::moe::cache {

// The arithmetic of quernstone/moe/cache/reuse.py, whose constants these are.
class Reuse {
   public:
    explicit Reuse(const ReplayArgs& args)
        : args_(args), values_(static_cast<std::size_t>(args.keys), 0.0) {
        const std::int64_t experts = args.scores.extent[1];
        layers_.resize(static_cast<std::size_t>((args.keys + experts - 1) / experts));
    }

    void begin(std::int64_t step) {
        const std::int64_t row = step - args_.base;
        const Key first = args_.first[static_cast<std::size_t>(row)];
        const std::int64_t experts = args_.scores.extent[1];
        auto& layer = layers_[static_cast<std::size_t>(first / experts)];
        if (!layer) {
            layer.emplace(experts);
        }
        for (const Key key : keys_of(args_, step)) {
            at(layer->used, key - first) = 1.0;
        }
        learn(*layer, args_.scores.at(row, std::int64_t{0}), args_.scores.stride[1],
              &at(values_, first));
        for (const Key key : keys_of(args_, step)) {
            at(layer->used, key - first) = 0.0;
        }
    }
    void touch(Key /*key*/) {}
    void admit(Key /*key*/) {}
    double operator()(Key key) const { return at(values_, key); }

   private:
    static constexpr std::array kRates{1.0, 1.0 / 4, 1.0 / 20, 1.0 / 500};
    static constexpr double kUseRate = 1.0 / 500;
    static constexpr double kDiscount = 0.9;
    static constexpr double kMemory = 0.9998;
    static constexpr double kRidge = 1e-3;
    static constexpr std::size_t kFeatures = 1 + kRates.size() + 2;
    using Row = std::array<double, kFeatures>;

    struct Layer {
        explicit Layer(std::int64_t experts)
            : used(static_cast<std::size_t>(experts), 0.0),
              age(used.size(), std::numeric_limits<double>::infinity()),
              features(used.size()) {}

        std::int64_t steps = 0;
        std::vector<double> used, age;
        std::vector<Row> features;
        std::array<Row, kFeatures> matrix{};
        Row right{}, weights{};
    };

    static void learn(Layer& layer, const double* logs, std::int64_t stride, double* values) {
        ++layer.steps;
        const double fresh = 1.0 / static_cast<double>(layer.steps);
        std::array<Row, kFeatures> products{};
        Row targets{};
        for (std::size_t i = 0; i < layer.used.size(); ++i) {
            const Row before = layer.features[i];
            Row& now = layer.features[i];
            const double log = logs[static_cast<std::int64_t>(i) * stride];
            for (std::size_t r = 0; r < kRates.size(); ++r) {
                now[1 + r] += std::max(kRates[r], fresh) * (log - now[1 + r]);
            }
            double& share = now[kFeatures - 2];
            share += std::max(kUseRate, fresh) * (layer.used[i] - share);
            layer.age[i] = layer.used[i] > 0.0 ? 0.0 : layer.age[i] + 1.0;
            now[0] = 1.0;
            now[kFeatures - 1] = 1.0 / (1.0 + layer.age[i]);
            for (std::size_t f = 0; f < kFeatures; ++f) {
                for (std::size_t g = 0; g < kFeatures; ++g) {
                    products[f][g] += before[f] * (before[g] - kDiscount * now[g]);
                }
                targets[f] += before[f] * layer.used[i];
            }
        }
        if (layer.steps > 1) {
            for (std::size_t f = 0; f < kFeatures; ++f) {
                for (std::size_t g = 0; g < kFeatures; ++g) {
                    layer.matrix[f][g] = kMemory * layer.matrix[f][g] + products[f][g];
                }
                layer.right[f] = kMemory * layer.right[f] + targets[f];
            }
            if (layer.steps <= 32 || layer.steps % 8 == 0) {
                solve(layer);
            }
        }
        for (std::size_t i = 0; i < layer.used.size(); ++i) {
            const Row& x = layer.features[i];
            double value = layer.weights[0] * x[0];
            for (std::size_t f = 1; f < kFeatures; ++f) {
                value += layer.weights[f] * x[f];
            }
            values[i] = value;
        }
    }

    static void solve(Layer& layer) {
        std::array<std::array<double, kFeatures + 1>, kFeatures> rows;
        for (std::size_t i = 0; i < kFeatures; ++i) {
            std::copy(layer.matrix[i].begin(), layer.matrix[i].end(), rows[i].begin());
            rows[i][i] += kRidge;
            rows[i][kFeatures] = layer.right[i];
        }
        for (std::size_t column = 0; column < kFeatures; ++column) {
            std::size_t pivot = column;
            for (std::size_t i = column + 1; i < kFeatures; ++i) {
                if (std::fabs(rows[i][column]) > std::fabs(rows[pivot][column])) {
                    pivot = i;
                }
            }
            std::swap(rows[column], rows[pivot]);
            if (rows[column][column] == 0.0) {
                return;  // singular: the weights stay
            }
            for (std::size_t i = column + 1; i < kFeatures; ++i) {
                const double factor = rows[i][column] / rows[column][column];
                for (std::size_t j = column; j <= kFeatures; ++j) {
                    rows[i][j] -= factor * rows[column][j];
                }
            }
        }
        for (std::size_t i = kFeatures; i-- > 0;) {
            double rest = rows[i][kFeatures];
            for (std::size_t j = i + 1; j < kFeatures; ++j) {
                rest -= rows[i][j] * layer.weights[j];
            }
            layer.weights[i] = rest / rows[i][i];
        }
    }

    const ReplayArgs& args_;
    std::vector<double> values_;
    std::vector<std::optional<Layer>> layers_;
};

}  // namespace quernstone::moe::cache
