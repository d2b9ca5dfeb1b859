// A fortified longjmp takes a switch to another stack for an error.
#undef _FORTIFY_SOURCE

#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace {
constexpr std::size_t kMaxShared = 99 * 1024;  // sm_86, sm_89 and sm_120; others have more
}

// The dynamic shared memory of every kernel, under the name that they all give it.
alignas(128) unsigned char qs_shared_memory[kMaxShared];

namespace emulation {

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr std::size_t kSharedWithoutAsking = 48 * 1024;
constexpr std::size_t kStackBytes = 256 * 1024;
constexpr unsigned kWarp = 32;

struct Copy {
    void* to;
    const void* from;
    std::size_t bytes, zeros;
};

struct Fiber {
    enum State : std::uint8_t { kReady, kWaiting, kEnded } state = kReady;
    dim3 index;
    unsigned number = 0;
    Wait wait{};
    std::source_location where;
    std::uint64_t answer = 0;
    const char* error = nullptr;
    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> copies;
    char* stack = nullptr;
    bool started = false;
    jmp_buf at;
    void* fake_stack = nullptr;
};

Schedule schedule;
std::string error_text;
std::map<const void*, std::size_t>& allowed_shared() {
    static std::map<const void*, std::size_t> bytes;
    return bytes;
}

jmp_buf scheduler;
Fiber* running = nullptr;
const std::function<void()>* kernel_body = nullptr;

// AddressSanitizer follows a thread from stack to stack only if it is told.
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
void* scheduler_fake_stack = nullptr;

void before_fiber(const void* stack) {
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack, kStackBytes);
}
void after_fiber() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
void on_entry(void* fake) {
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_bytes);
}
void before_leaving(void** fake) {
    __sanitizer_start_switch_fiber(fake, scheduler_stack, scheduler_stack_bytes);
}
void open(const void* at, std::size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
void close(const void* at, std::size_t bytes) { __asan_poison_memory_region(at, bytes); }
#else
void before_fiber(const void*) {}
void after_fiber() {}
void on_entry(void*) {}
void before_leaving(void**) {}
void open(const void*, std::size_t) {}
void close(const void*, std::size_t) {}
#endif

void run_fiber() {
    on_entry(nullptr);
    (*kernel_body)();
    running->state = Fiber::kEnded;
    before_leaving(nullptr);
    _longjmp(scheduler, 1);
}

// ucontext makes the stack; the jumps between stacks need no system call.
void enter(Fiber& fiber) {
    before_fiber(fiber.stack);
    if (_setjmp(scheduler) == 0) {
        if (fiber.started) {
            _longjmp(fiber.at, 1);
        }
        fiber.started = true;
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack;
        context.uc_stack.ss_size = kStackBytes;
        makecontext(&context, run_fiber, 0);
        setcontext(&context);
    }
    after_fiber();
}

void leave() {
    before_leaving(&running->fake_stack);
    if (_setjmp(running->at) == 0) {
        _longjmp(scheduler, 1);
    }
    on_entry(running->fake_stack);
}

// Ends the launch from inside a fiber, which does not come back.
void fail(const char* text) {
    running->error = text;
    leave();
}

std::ostream& operator<<(std::ostream& to, const dim3& i) {
    return to << "(" << i.x << ", " << i.y << ", " << i.z << ")";
}

std::string name(const Fiber& fiber) {
    std::ostringstream text;
    text << "thread " << fiber.index << " of block " << blockIdx;
    return text.str();
}

std::string doing(const Fiber& fiber) {
    std::ostringstream text;
    text << name(fiber);
    if (fiber.state == Fiber::kEnded) {
        text << " has ended";
    } else {
        const std::string file = fiber.where.file_name();
        text << (fiber.wait.kind == Wait::kBlock ? " waits for its block at "
                                                 : " waits for its warp at ")
             << file.substr(file.rfind('/') + 1) << ":" << fiber.where.line();
    }
    return text.str();
}

bool same_place(const Fiber& a, const Fiber& b) {
    return a.wait.kind == b.wait.kind && a.wait.mask == b.wait.mask &&
           a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
           std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

class Block {
   public:
    Block(const Shape& shape, std::mt19937_64& random)
        : fibers_(std::size_t{shape.block.x} * shape.block.y * shape.block.z),
          order_(fibers_.size()),
          random_(random) {
        for (unsigned i = 0; i < fibers_.size(); ++i) {
            Fiber& fiber = fibers_[i];
            fiber.number = i;
            fiber.index = dim3(i % shape.block.x, i / shape.block.x % shape.block.y,
                               i / shape.block.x / shape.block.y);
            fiber.stack = stack(i);
            order_[i] = schedule.order == Order::kDescending
                            ? static_cast<unsigned>(fibers_.size()) - 1 - i
                            : i;
        }
    }

    void run() {
        for (;;) {
            if (schedule.order == Order::kShuffled) {
                std::shuffle(order_.begin(), order_.end(), random_);
            }
            for (const unsigned i : order_) {
                if (fibers_[i].state == Fiber::kReady) {
                    resume(fibers_[i]);
                }
            }
            if (!release_warps() && !release_block()) {
                break;
            }
        }
        for (const Fiber& fiber : fibers_) {
            if (!fiber.uncommitted.empty() || !fiber.copies.empty()) {
                throw std::runtime_error(name(fiber) + " has ended before its copies");
            }
        }
    }

   private:
    // Kept from launch to launch: fresh pages cost more than a short kernel.
    static char* stack(std::size_t i) {
        static std::vector<std::unique_ptr<char[]>> stacks;
        while (stacks.size() <= i) {
            stacks.push_back(std::make_unique_for_overwrite<char[]>(kStackBytes));
        }
        open(stacks[i].get(), kStackBytes);
        return stacks[i].get();
    }

    static void resume(Fiber& fiber) {
        running = &fiber;
        threadIdx = fiber.index;
        enter(fiber);
        if (fiber.error != nullptr) {
            throw std::runtime_error(name(fiber) + " " + fiber.error);
        }
    }

    bool release_warps() {
        bool released = false;
        for (Fiber& fiber : fibers_) {
            if (fiber.state == Fiber::kWaiting && fiber.wait.kind == Wait::kWarp) {
                released = release_lanes(fiber) || released;
            }
        }
        return released;
    }

    // Lets the lanes of a fiber's mask go on if all of them have come.
    bool release_lanes(const Fiber& fiber) {
        const std::size_t first = fiber.number / kWarp * kWarp;
        std::vector<Fiber*> lanes;
        for (std::size_t i = 0; i < kWarp; ++i) {
            if ((fiber.wait.mask >> i & 1U) == 0) {
                continue;
            }
            if (first + i >= fibers_.size()) {
                throw std::runtime_error(name(fiber) +
                                         " names a lane that its block does not have");
            }
            Fiber& other = fibers_[first + i];
            if (other.state != Fiber::kWaiting || !same_place(fiber, other)) {
                return false;
            }
            lanes.push_back(&other);
        }
        for (Fiber* lane : lanes) {
            const unsigned source = lane->wait.source;
            if (source >= kWarp || (lane->wait.mask >> source & 1U) == 0) {
                throw std::runtime_error(name(*lane) +
                                         " asks for the value of a lane outside its mask");
            }
            lane->answer = fibers_[first + source].wait.bits;
        }
        for (Fiber* lane : lanes) {
            lane->state = Fiber::kReady;
        }
        return true;
    }

    // False when the block is done.
    bool release_block() {
        const Fiber& first = fibers_.front();
        for (const Fiber& fiber : fibers_) {
            const bool alike = fiber.state == first.state &&
                               (fiber.state == Fiber::kEnded || same_place(fiber, first));
            if (!alike) {
                throw std::runtime_error(doing(first) + ", " + doing(fiber));
            }
        }
        if (first.state == Fiber::kEnded) {
            return false;
        }
        if (first.wait.kind == Wait::kWarp) {
            throw std::runtime_error(doing(first) + " for a lane that never comes");
        }
        for (Fiber& fiber : fibers_) {
            fiber.state = Fiber::kReady;
        }
        return true;
    }

    std::vector<Fiber> fibers_;
    std::vector<unsigned> order_;
    std::mt19937_64& random_;
};

void check(const Shape& shape, const void* kernel) {
    const dim3 &g = shape.grid, &b = shape.block;
    constexpr unsigned kMaxX = std::numeric_limits<std::int32_t>::max();
    if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > kMaxX || g.y > 65535 || g.z > 65535) {
        throw std::runtime_error("a grid that no GPU takes");
    }
    if (b.x == 0 || b.y == 0 || b.z == 0 || b.z > 64 || std::size_t{b.x} * b.y * b.z > 1024) {
        throw std::runtime_error("a block that no GPU takes");
    }
    const auto found = allowed_shared().find(kernel);
    const std::size_t most = found == allowed_shared().end() ? kSharedWithoutAsking
                                                             : std::min(found->second, kMaxShared);
    if (shape.shared_bytes > most) {
        std::ostringstream text;
        text << "shared memory: got " << shape.shared_bytes << " bytes, expected at most " << most;
        throw std::runtime_error(text.str());
    }
}

void run_grid(const Shape& shape) {
    std::mt19937_64 random(schedule.seed);
    const std::uint64_t count = std::uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z;
    std::vector<std::uint64_t> order(count);
    for (std::uint64_t i = 0; i < count; ++i) {
        order[i] = schedule.order == Order::kDescending ? count - 1 - i : i;
    }
    if (schedule.order == Order::kShuffled) {
        std::shuffle(order.begin(), order.end(), random);
    }
    gridDim = shape.grid;
    blockDim = shape.block;
    for (const std::uint64_t i : order) {
        blockIdx = dim3(static_cast<unsigned>(i % shape.grid.x),
                        static_cast<unsigned>(i / shape.grid.x % shape.grid.y),
                        static_cast<unsigned>(i / shape.grid.x / shape.grid.y));
        open(qs_shared_memory, kMaxShared);
        std::memset(qs_shared_memory, schedule.poison, kMaxShared);
        close(qs_shared_memory + shape.shared_bytes, kMaxShared - shape.shared_bytes);
        Block(shape, random).run();
    }
}

}  // namespace

void set_schedule(const Schedule& wanted) { schedule = wanted; }

void allow_shared(const void* kernel, std::size_t bytes) { allowed_shared()[kernel] = bytes; }

bool launch(const Shape& shape, const void* kernel, const std::function<void()>& body) {
    kernel_body = &body;
    bool done = true;
    try {
        check(shape, kernel);
        run_grid(shape);
    } catch (const std::runtime_error& error) {
        error_text = error.what();
        done = false;
    }
    open(qs_shared_memory, kMaxShared);
    return done;
}

const char* last_error() { return error_text.c_str(); }

unsigned lane() { return running->number % kWarp; }

std::uint64_t wait(const Wait& wait, const std::source_location& where) {
    Fiber& self = *running;
    if (wait.kind == Wait::kWarp && (wait.mask >> lane() & 1U) == 0) {
        fail("waits for a mask that it is not in");
    }
    self.wait = wait;
    self.where = where;
    self.state = Fiber::kWaiting;
    leave();
    return self.answer;
}

void copy_later(void* to, const void* from, std::size_t bytes, std::size_t zeros) {
    const bool known = bytes == 4 || bytes == 8 || bytes == 16;
    if (!known || zeros > bytes || reinterpret_cast<std::uintptr_t>(to) % bytes != 0 ||
        reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
        fail("copies what is not aligned, or not 4, 8 or 16 bytes");
    }
    auto* target = static_cast<unsigned char*>(to);
    if (target < qs_shared_memory || target + bytes > qs_shared_memory + kMaxShared) {
        fail("copies to what is not shared memory");
    }
    std::memset(target, schedule.poison, bytes);
    running->uncommitted.push_back({to, from, bytes, zeros});
}

void commit_copies() {
    running->copies.push_back(std::move(running->uncommitted));
    running->uncommitted.clear();
}

void finish_copies(std::size_t but_the_last) {
    while (running->copies.size() > but_the_last) {
        for (const Copy& copy : running->copies.front()) {
            std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
            std::memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
        }
        running->copies.pop_front();
    }
}

}  // namespace emulation

// set_schedule() for ctypes
extern "C" void emulation_set_schedule(int order, std::uint64_t seed, int poison) {
    emulation::set_schedule(
        {static_cast<emulation::Order>(order), seed, static_cast<unsigned char>(poison)});
}
