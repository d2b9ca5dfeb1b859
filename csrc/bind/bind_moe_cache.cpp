#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "bind/bind.h"
#include "bind/moe_names.h"
#include "moe/cache.h"

namespace py = pybind11;

namespace quernstone::bind {

moe::cache::Policy parse_cache_policy(const std::string& name) {
    static constexpr std::pair<const char*, moe::cache::Policy> kNames[] = {
        {"lru", moe::cache::Policy::kLru},     {"lfu", moe::cache::Policy::kLfu},
        {"lfru", moe::cache::Policy::kLfru},   {"s3fifo", moe::cache::Policy::kS3Fifo},
        {"arc", moe::cache::Policy::kArc},     {"mrs", moe::cache::Policy::kMrs},
        {"reuse", moe::cache::Policy::kReuse}, {"belady", moe::cache::Policy::kBelady},
    };
    for (const auto& [known, policy] : kNames) {
        if (name == known) {
            return policy;
        }
    }
    raise(invalid("policy", name.c_str(), "a policy of quernstone.moe.cache"));
    return moe::cache::Policy::kLru;
}
namespace {

using moe::cache::Policy;
using Ints = py::array_t<std::int64_t, py::array::c_style>;
using Floats = py::array_t<double, py::array::c_style>;

std::span<const std::int64_t> row(const Ints& x, const char* ndim) {
    if (x.ndim() != 1) {
        raise(invalid(ndim, x.ndim(), "", 1));
    }
    return {x.data(), static_cast<std::size_t>(x.size())};
}

py::array_t<std::uint8_t> replay_cache(const std::string& policy, std::int64_t slots,
                                       std::int64_t keys, const Ints& needed, const Ints& offsets,
                                       const Ints& first, const std::optional<Floats>& scores,
                                       const std::optional<Ints>& next, bool remember,
                                       std::int64_t halve_every, double alpha) {
    moe::cache::ReplayArgs args;
    args.policy = parse_cache_policy(policy);
    args.slots = slots;
    args.keys = keys;
    args.needed = row(needed, "needed.ndim");
    args.offsets = row(offsets, "offsets.ndim");
    args.first = row(first, "first.ndim");
    if (scores) {
        if (scores->ndim() != 2) {
            raise(invalid("scores.ndim", scores->ndim(), "", 2));
        }
        args.scores = {scores->data(),
                       {scores->shape(0), scores->shape(1)},
                       {scores->shape(1), std::int64_t{1}}};
    }
    if (next) {
        args.next = row(*next, "next.ndim");
    }
    args.remember = remember;
    args.halve_every = halve_every;
    args.alpha = alpha;
    py::array_t<std::uint8_t> hit(needed.size());
    args.hit = {hit.mutable_data(), static_cast<std::size_t>(hit.size())};
    Status status;
    {
        const py::gil_scoped_release release;
        status = moe::cache::replay(args);
    }
    raise(status);
    return hit;
}

}  // namespace

void register_moe_cache(py::module_& moe) {
    moe.def("replay_cache", &replay_cache, py::arg("policy"), py::arg("slots"), py::arg("keys"),
            py::arg("needed").noconvert(), py::arg("offsets").noconvert(),
            py::arg("first").noconvert(), py::arg("scores").noconvert() = py::none(),
            py::arg("next").noconvert() = py::none(), py::arg("remember") = true,
            py::arg("halve_every") = 0, py::arg("alpha") = 0.5,
            "1 for each request of a trace that would have hit, else 0.");
}

}  // namespace quernstone::bind
