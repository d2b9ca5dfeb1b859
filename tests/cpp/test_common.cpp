#include <array>
#include <atomic>
#include <cstdint>
#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "common/cpu.h"
#include "common/parallel.h"
#include "common/status.h"
#include "common/view.h"
#include "thread_pool.h"

using namespace quernstone;

TEST(parallel_for_takes_each_index_exactly_once) {
    for (const int threads : {1, 2, 3, 8}) {
        const ThreadPool pool(threads);
        for (const std::int64_t n : {0, 1, 2, 7, 64, 1000}) {
            std::vector<std::atomic<int>> visits(static_cast<std::size_t>(n));
            parallel_for(n, threads, [&](std::int64_t i) noexcept {
                visits[static_cast<std::size_t>(i)].fetch_add(1);
            });
            for (const std::atomic<int>& count : visits) {
                CHECK_EQ(count.load(), 1);
            }
        }
    }
}

TEST(without_a_pool_work_stays_on_the_calling_thread_and_in_order) {
    CHECK_EQ(num_threads(), 1);
    std::vector<std::int64_t> order;
    order.reserve(5);
    const auto caller = std::this_thread::get_id();
    bool stayed = true;
    parallel_for(5, 4, [&](std::int64_t i) noexcept {
        stayed = stayed && std::this_thread::get_id() == caller;
        order.push_back(i);
    });
    CHECK(stayed);
    CHECK((order == std::vector<std::int64_t>{0, 1, 2, 3, 4}));
}

TEST(the_number_of_threads_is_the_pools) {
    const ThreadPool pool(3);
    CHECK_EQ(num_threads(), 3);
}

TEST(levels_are_named_and_ascend_from_baseline) {
    const auto isas = available_isas();
    CHECK_EQ(isa_name(isas.front()), "baseline");
    for (std::size_t i = 1; i < isas.size(); ++i) {
        CHECK(isas[i - 1] < isas[i]);
    }
    std::set<std::string> names;
    for (const Isa isa : isas) {
        names.emplace(isa_name(isa));
    }
    CHECK_EQ(names.size(), isas.size());
}

TEST(every_available_level_can_be_set_and_nothing_else) {
    const Isa before = active_isa();
    for (const Isa isa : available_isas()) {
        CHECK(set_isa(isa_name(isa)));
        CHECK_EQ(isa_name(active_isa()), isa_name(isa));
    }
    for (const char* unknown : {"", "sse9", "AVX2", "avx2 "}) {
        CHECK(!set_isa(unknown));
        CHECK_EQ(isa_name(active_isa()), isa_name(available_isas().back()));
    }
    CHECK(set_isa(isa_name(before)));
}

#if defined(__x86_64__) && !defined(QS_EMULATE_AVX512)
// The kernel lists a flag only where the processor has it and the system saves its registers.
TEST(the_probe_agrees_with_the_operating_system) {
    std::ifstream cpuinfo("/proc/cpuinfo");
    std::set<std::string> flags;
    for (std::string line; std::getline(cpuinfo, line) && flags.empty();) {
        if (line.starts_with("flags")) {
            std::istringstream words(line);
            for (std::string word; words >> word;) {
                flags.insert(word);
            }
        }
    }
    const auto all_of = [&](std::initializer_list<const char*> wanted) {
        for (const char* flag : wanted) {
            if (!flags.contains(flag)) {
                return false;
            }
        }
        return true;
    };
    const bool avx2 = all_of({"avx2", "fma", "f16c"});
    const bool avx512 = avx2 && all_of({"avx512f", "avx512dq", "avx512bw", "avx512vl"});
    const bool bf16_vnni = avx512 && all_of({"avx512_bf16", "avx512_vnni"});
    const bool amx = bf16_vnni && all_of({"amx_tile", "amx_int8"});
    const char* want = "baseline";
    if (amx) {
        want = "avx512_amx";
    } else if (bf16_vnni) {
        want = "avx512_bf16_vnni";
    } else if (avx512) {
        want = "avx512";
    } else if (avx2) {
        want = "avx2";
    }
    CHECK_EQ(isa_name(available_isas().back()), want);
}
#endif

TEST(a_view_takes_broadcast_and_negative_strides) {
    const std::array<float, 6> data = {0, 1, 2, 3, 4, 5};
    const View<const float, 2> matrix{data.data(), {2, 3}, {3, 1}};
    CHECK_EQ(*matrix.at(1, 2), 5.0F);
    const View<const float, 2> broadcast{data.data() + 2, {4, 2}, {0, 1}};
    CHECK_EQ(*broadcast.at(3, 1), 3.0F);
    const View<const float, 1> reversed{data.data() + 5, {6}, {-1}};
    CHECK_EQ(*reversed.at(5), 0.0F);
    CHECK((!View<float, 1>{}.present()));
}

TEST(a_status_is_ok_until_something_is_wrong) {
    CHECK(Status{}.ok());
    const Status number = invalid("q width", 12, "a multiple of", 16);
    CHECK(!number.ok());
    CHECK(number.code == Code::kInvalid);
    CHECK_EQ(number.got, 12);
    CHECK(number.want_has_number);
    CHECK_EQ(number.want, 16);
    const Status text = invalid("gate", "nothing", "logits");
    CHECK_EQ(std::string(text.got_text), "nothing");
    CHECK(!text.want_has_number);
    CHECK(no_memory("scratch", 64).code == Code::kNoMemory);
}
