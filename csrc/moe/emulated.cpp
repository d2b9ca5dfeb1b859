#include "moe/emulated.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "common/pages.h"

namespace quernstone::moe {
namespace {

double seconds_of(Clock::time_point time) noexcept {
    return std::chrono::duration<double>(time.time_since_epoch()).count();
}

Clock::time_point time_of(double seconds) noexcept {
    return Clock::time_point(
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)));
}

constexpr std::size_t kPage = 4096;
constexpr std::int64_t kCopy = std::int64_t{256} << 10;  // after so many bytes it may be stopped

}  // namespace

void EmulatedDevice::Free::operator()(std::byte* p) const noexcept { std::free(p); }

Status EmulatedDevice::open(std::span<const Experts> layers, std::span<const std::int64_t> slots,
                            std::int64_t staging, gemm::Compute compute) noexcept {
    close();
    std::int64_t bytes = 0, largest = 0;
    const auto step = [](const Experts& e) { return round_up(e.expert_bytes(), kPage); };
    for (std::size_t l = 0; l < layers.size(); ++l) {
        QS_TRY(check(layers[l]));
        bytes += slots[l] * step(layers[l]);
        largest = std::max(largest, step(layers[l]));
    }
    bytes += staging * largest;
    try {
        layers_.assign(layers.begin(), layers.end());
        slots_.assign(layers.size(), {});
        staging_.assign(static_cast<std::size_t>(staging), {});
        states_ = std::make_unique<States>();
        compute_ = compute;
        memory_.reset(static_cast<std::byte*>(
            std::aligned_alloc(kPage, static_cast<std::size_t>(std::max<std::int64_t>(
                                          bytes, static_cast<std::int64_t>(kPage))))));
        if (memory_ == nullptr) {
            return no_memory("slots", bytes);
        }
        prefer_huge_pages(memory_.get(), static_cast<std::size_t>(bytes));
        std::byte* at = memory_.get();
        for (std::size_t l = 0; l < layers.size(); ++l) {
            slots_[l].resize(static_cast<std::size_t>(slots[l]));
            for (Slot& slot : slots_[l]) {
                slot.data = at;
                at += step(layers[l]);
            }
        }
        for (Slot& slot : staging_) {
            slot.data = at;
            at += largest;
        }
    } catch (const std::bad_alloc&) {
        return no_memory("slots", bytes);
    }
    QS_TRY(bus_.start());
    return gpu_.start();
}

void EmulatedDevice::close() noexcept {
    abort();
    end_step();
    layers_.clear();
    slots_.clear();
    staging_.clear();
    memory_.reset();
}

// The bus is woken when there is something to load.
void EmulatedDevice::begin_step() noexcept {
    in_step_ = true;
    gpu_.begin_step();
}

void EmulatedDevice::end_step() noexcept {
    in_step_ = false;
    bus_.end_step();
    gpu_.end_step();
}

EmulatedDevice::Slot* EmulatedDevice::find(std::int64_t layer, std::int64_t slot) noexcept {
    if (layer < 0 || layer >= static_cast<std::int64_t>(slots_.size())) {
        return nullptr;
    }
    std::vector<Slot>& some = slot < 0 ? staging_ : slots_[static_cast<std::size_t>(layer)];
    const std::int64_t index = slot < 0 ? -1 - slot : slot;
    return index < static_cast<std::int64_t>(some.size()) ? &some[static_cast<std::size_t>(index)]
                                                          : nullptr;
}

Status EmulatedDevice::load(std::int64_t layer, std::int64_t expert, std::int64_t slot,
                            double seconds) noexcept {
    Slot* to = find(layer, slot);
    if (to == nullptr) {
        return invalid("slot", slot, "one of the layer's");
    }
    if (expert < 0 || expert >= layers_[static_cast<std::size_t>(layer)].count) {
        return invalid("expert", expert, "one of the layer's");
    }
    const std::uint64_t ticket = bus_.posted() + 1;
    if (ticket > Worker::kQueue) {
        bus_.await(ticket - Worker::kQueue);  // whose state has this one's place
    }
    state(ticket).store(kQueued);
    const LoadJob job{to, layer, expert, ticket, to->computed, seconds_of(Clock::now()), seconds};
    to->loaded = ticket;
    if (in_step_) {
        bus_.begin_step();
    }
    bus_.post(Task([this, job] { return perform(job); }));
    return {};
}

bool EmulatedDevice::cancel(std::int64_t layer, std::int64_t slot) noexcept {
    const Slot* of = find(layer, slot);
    int expected = kQueued;
    return of != nullptr && of->loaded > 0 &&
           state(of->loaded).compare_exchange_strong(expected, kCancelled);
}

Status EmulatedDevice::compute(std::int64_t layer, std::int64_t expert, std::int64_t slot,
                               View<const float, 2> x, std::span<const std::int64_t> tokens,
                               double seconds) noexcept {
    Slot* of = find(layer, slot);
    if (of == nullptr) {
        return invalid("slot", slot, "one of the layer's");
    }
    const Experts& experts = layers_[static_cast<std::size_t>(layer)];
    QS_TRY(same("x.shape[1]", x.extent[1], "", experts.hidden));
    for (const std::int64_t token : tokens) {
        if (token < 0 || token >= x.extent[0]) {
            return invalid("tokens", token, "0 or more and below", x.extent[0]);
        }
    }
    const auto count = static_cast<std::int64_t>(tokens.size());
    try {
        if (jobs_.empty()) {
            row_count_ = 0;
            hidden_ = experts.hidden;
        }
        QS_TRY(same("x.shape[1]", hidden_, "that of this step's other experts,", experts.hidden));
        std::vector<float> rows(static_cast<std::size_t>(count * hidden_));
        jobs_.push_back({of,
                         x,
                         {tokens.begin(), tokens.end()},
                         std::move(rows),
                         layer,
                         expert,
                         of->loaded,
                         seconds_of(Clock::now()),
                         seconds});
    } catch (const std::bad_alloc&) {
        return no_memory("rows", (row_count_ + count) * hidden_);
    }
    row_count_ += count;
    ComputeJob* job = &jobs_.back();
    of->computed = gpu_.post(Task([this, job] { return perform(*job); }));
    return {};
}

Status EmulatedDevice::perform(const LoadJob& job) {
    gpu_.await(job.after);
    int expected = kQueued;
    if (!state(job.ticket).compare_exchange_strong(expected, kBegun)) {
        return {};
    }
    const double begun = seconds_of(Clock::now());
    const Experts& experts = layers_[static_cast<std::size_t>(job.layer)];
    const std::int64_t size = experts.expert_bytes();
    const std::byte* from = experts.data + job.expert * size;
    for (std::int64_t at = 0; at < size && !bus_.dropping(); at += kCopy) {
        std::memcpy(job.slot->data + at, from + at,
                    static_cast<std::size_t>(std::min(kCopy, size - at)));
    }
    const double free = std::max({bus_free_, job.issued, job.slot->left});
    bus_free_ = settle(bus_, free, job.seconds, {true, job.layer, job.expert, begun});
    job.slot->arrival = bus_free_;
    return {};
}

Status EmulatedDevice::perform(ComputeJob& job) {
    bus_.await(job.after);
    const double begun = seconds_of(Clock::now());
    Experts one = layers_[static_cast<std::size_t>(job.layer)];
    one.count = 1;
    one.data = job.slot->data;
    const auto count = static_cast<std::int64_t>(job.tokens.size());
    thread_local std::vector<float> inputs;
    inputs.resize(static_cast<std::size_t>(count * hidden_));
    for (std::int64_t i = 0; i < count; ++i) {
        const float* from = job.x.at(job.tokens[static_cast<std::size_t>(i)], 0);
        std::copy_n(from, hidden_, inputs.data() + i * hidden_);
    }
    const std::int64_t expert = 0;
    const float weight = 1.0F;
    const ForwardArgs args{{inputs.data(), {count, hidden_}, {hidden_, 1}},
                           {&expert, {count, 1}, {0, 0}},
                           {&weight, {count, 1}, {0, 0}},
                           {job.rows.data(), {count, hidden_}, {hidden_, 1}},
                           compute_};
    QS_TRY(forward(one, args, 1));
    const double free = std::max({gpu_free_, job.issued, job.slot->arrival});
    gpu_free_ = settle(gpu_, free, job.seconds, {false, job.layer, job.expert, begun});
    job.slot->left = gpu_free_;
    return {};
}

double EmulatedDevice::settle(const Worker& worker, double free, double seconds, Record record) {
    const double ready = seconds_of(Clock::now());
    double end = free + seconds;
    if (ready > end) {
        late_.fetch_add(seconds > 0.0 ? 1 : 0);
        end = ready;
    } else {
        worker.sleep_until(time_of(end));
    }
    record.end = seconds_of(Clock::now());
    const std::lock_guard lock(mutex_);
    records_.push_back(record);
    return end;
}

bool EmulatedDevice::wait(Clock::duration most) noexcept {
    return gpu_.await_for(gpu_.posted(), most);
}

Status EmulatedDevice::collect(View<const float, 2>& rows) noexcept {
    Status status = gpu_.finish();
    try {
        rows_.resize(static_cast<std::size_t>(row_count_ * hidden_));
        float* to = rows_.data();
        for (const ComputeJob& job : jobs_) {
            to = std::copy(job.rows.begin(), job.rows.end(), to);
        }
    } catch (const std::bad_alloc&) {
        status = no_memory("rows", row_count_ * hidden_);
        row_count_ = 0;
    }
    jobs_.clear();
    rows = {rows_.data(), {row_count_, hidden_}, {hidden_, 1}};
    row_count_ = 0;
    if (bus_.failed()) {
        QS_TRY(bus_.finish());
    }
    return status;
}

void EmulatedDevice::abort() noexcept {
    bus_.drop();
    gpu_.drop();
    static_cast<void>(bus_.finish());
    static_cast<void>(gpu_.finish());
    jobs_.clear();
    row_count_ = 0;
}

std::vector<Record> EmulatedDevice::take_records() noexcept {
    const std::lock_guard lock(mutex_);
    std::vector<Record> taken;
    taken.swap(records_);
    return taken;
}

}  // namespace quernstone::moe
