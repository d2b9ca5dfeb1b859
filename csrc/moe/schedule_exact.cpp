#include <algorithm>
#include <new>
#include <vector>

#include "moe/schedule_search.h"

namespace quernstone::moe {
namespace {

constexpr std::size_t kLeastWidth = 256;
constexpr std::size_t kMostWidth = std::size_t{1} << 20;

bool run(Search& search, std::size_t width) {
    std::vector<Label> now(2 * width);
    std::vector<Label> runs(2 * width);
    std::vector<std::uint32_t> steps(4 * width);
    std::vector<std::uint32_t> order(2 * width);
    std::vector<std::uint32_t> rank(2 * width);
    std::vector<double> tree(2 * width);
    return search_labels(search, {width, false, now, runs, steps, order, rank, tree});
}

}  // namespace

Status search_exact(Search& search) noexcept {
    std::size_t width = kLeastWidth;
    try {
        while (!run(search, width)) {
            width *= 8;
            if (width > kMostWidth) {
                return invalid("policy 'exact'", "more than 2^20 partial schedules",
                               "a layer that takes fewer, or another policy");
            }
        }
        return {};
    } catch (const std::bad_alloc&) {
        return no_memory("policy 'exact'", static_cast<std::int64_t>(2 * width * sizeof(Label)));
    }
}

}  // namespace quernstone::moe
