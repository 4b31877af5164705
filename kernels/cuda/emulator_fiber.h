// The threads of a block as fibers, and what they wait for: barriers, operations of a warp, asynchronous
// copies.
//
// A fiber runs until it reaches a barrier or an operation of its warp. These check that all threads that
// must take part do.
#pragma once

namespace emulator {

// Equal literals mostly have the same address, and under AddressSanitizer strcmp is slow.
inline bool same(const char *a, const char *b) { return a == b || std::strcmp(a, b) == 0; }

struct Site {
    const char *file = "";
    int line = 0;
    bool operator!=(const Site &o) const { return line != o.line || !same(file, o.file); }
};

enum class State { ready, warp, barrier, done };

// A copy that was issued and may not have arrived.
struct Copy {
    u8 *to;
    std::vector<u8> bytes;
};

struct Fiber {
#if defined(__x86_64__)
    void *stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    void *fake = nullptr; // AddressSanitizer's.
    u8 *stack = nullptr;
    uint3 index{};
    u32 number = 0;
    State state = State::ready;
    Site site;
    const char *what = "";
    // The warp operation that it waits for.
    u32 mask = 0;
    void *data = nullptr;
    // The barrier that it waits for.
    int barrier = 0;
    // cp.async: groups of copies, of which the last is open.
    std::vector<std::vector<Copy>> copies{1};
};

struct Barrier {
    u32 arrived = 0, expected = 0;
    u32 any = 0, all = 1, count = 0;
    u32 last_any = 0, last_all = 0, last_count = 0;
};

constexpr std::size_t stack_bytes = 192 << 10;

inline std::vector<Fiber> fibers;
inline std::vector<u32> ready;
inline Fiber *current = nullptr;
inline Fiber scheduler;
inline Barrier barriers[16];
inline u32 alive = 0;
inline u8 *dynamic_shared = nullptr;
inline std::size_t dynamic_shared_bytes = 0;
inline u64 seed = 0;
inline const char *kernel_name = "";
inline void (*entry)() = nullptr;

inline u64 random() {
    u64 z = (seed += 0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}
inline bool random_order = false;

[[noreturn]] inline void fail(const char *format, ...) {
    std::fflush(stdout);
    std::fprintf(stderr, "emulator: %s, block (%u, %u, %u)", kernel_name, blockIdx.x, blockIdx.y,
                 blockIdx.z);
    if (current)
        std::fprintf(stderr, ", thread %u", current->number);
    std::fprintf(stderr, ": ");
    va_list list;
    va_start(list, format);
    std::vfprintf(stderr, format, list);
    va_end(list);
    std::fprintf(stderr, "\n");
    std::fflush(stderr);
    std::_Exit(3);
}

#if defined(__x86_64__)
extern "C" void stb_emulator_switch(void **from, void *to);
asm(R"(
.text
.globl stb_emulator_switch
.type stb_emulator_switch, @function
stb_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#endif

inline void *main_stack = nullptr;
inline std::size_t main_stack_bytes = 0;

inline void switch_to(Fiber &from, Fiber &to, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom = &to == &scheduler ? main_stack : to.stack;
    std::size_t size = &to == &scheduler ? main_stack_bytes : stack_bytes;
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake, bottom, size);
#else
    (void)last;
#endif
#if defined(__x86_64__)
    stb_emulator_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void *old = nullptr;
    std::size_t old_size = 0;
    __sanitizer_finish_switch_fiber(from.fake, &old, &old_size);
    if (&from == &scheduler)
        return;
    main_stack = const_cast<void *>(old);
    main_stack_bytes = old_size;
#endif
}

inline void to_scheduler() { switch_to(*current, scheduler); }

inline void wake(Fiber &f) {
    f.state = State::ready;
    ready.push_back(f.number);
}

inline void release_if_complete(int id) {
    Barrier &b = barriers[id];
    u32 expected = id == 0 && b.expected == 0 ? alive : b.expected;
    if (b.arrived == 0 || b.arrived != expected)
        return;
    b.last_any = b.any, b.last_all = b.all, b.last_count = b.count;
    b.arrived = 0, b.any = 0, b.all = 1, b.count = 0, b.expected = 0;
    const Fiber *first = nullptr;
    for (auto &f : fibers) {
        if (f.state != State::barrier || f.barrier != id)
            continue;
        if (first && first->number / 32 == f.number / 32 && first->site != f.site)
            fail("threads %u and %u of one warp are at different barriers: %s:%d and %s:%d",
                 first->number, f.number, first->site.file, first->site.line, f.site.file,
                 f.site.line);
        first = &f;
    }
    for (auto &f : fibers)
        if (f.state == State::barrier && f.barrier == id)
            wake(f);
}

// Waits until `count` threads (0: all that have not ended) are at barrier `id`.
inline Barrier &barrier(int id, u32 count, bool predicate, bool wait, Site site) {
    if (id < 0 || id > 15 || count % 32 != 0)
        fail("no such barrier: %d of %u threads, %s:%d", id, count, site.file, site.line);
    Barrier &b = barriers[id];
    if (b.arrived != 0 && b.expected != count)
        fail("barrier %d expects %u threads elsewhere, %u at %s:%d", id, b.expected, count,
             site.file, site.line);
    b.expected = count;
    b.arrived += 1;
    b.any |= predicate, b.all &= predicate, b.count += predicate;
    if (wait) {
        current->state = State::barrier;
        current->barrier = id;
        current->site = site;
        current->what = "barrier";
    }
    release_if_complete(id);
    if (wait)
        to_scheduler();
    return b;
}

inline u32 lane() { return current->number % 32; }

// An operation of the lanes of `mask`. `apply` runs once, with the data of all lanes. `warps` is the number of warps of a
// warpgroup that take part (1 for operations of a warp).
template <class Data>
inline void collective(const char *what, u32 mask, Data &data, void (*apply)(Data **, u32), Site site,
                       u32 warps = 1) {
    Fiber &me = *current;
    if (!(mask >> lane() & 1))
        fail("%s at %s:%d: the lane is not in its own mask %08x", what, site.file, site.line, mask);
    me.state = State::warp;
    me.site = site, me.what = what, me.mask = mask, me.data = &data;
    const u32 first = me.number / (32 * warps) * (32 * warps);
    // The last lane to arrive checks all lanes; the others stop at the first that is missing.
    bool complete = true;
    for (u32 i = 0; i < 32 * warps; ++i) {
        if (!(mask >> i % 32 & 1))
            continue;
        if (first + i >= fibers.size())
            fail("%s at %s:%d: lane %u of mask %08x does not exist", what, site.file, site.line, i,
                 mask);
        Fiber &f = fibers[first + i];
        if (f.state == State::done)
            fail("%s at %s:%d: lane %u of mask %08x has ended", what, site.file, site.line, i, mask);
        if (f.state != State::warp) {
            complete = false;
            break;
        }
        if (f.mask != mask || !same(f.what, what) || f.site != site)
            fail("divergent: lane %u is at %s (mask %08x, %s:%d), lane %u at %s (mask %08x, %s:%d)",
                 lane(), what, mask, site.file, site.line, i, f.what, f.mask, f.site.file,
                 f.site.line);
    }
    if (complete) {
        static Data *all[128];
        for (u32 i = 0; i < 32 * warps; ++i)
            all[i] = mask >> i % 32 & 1 ? static_cast<Data *>(fibers[first + i].data) : nullptr;
        apply(all, mask);
        for (u32 i = 0; i < 32 * warps; ++i)
            if (mask >> i % 32 & 1)
                wake(fibers[first + i]);
    }
    to_scheduler();
}

inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    const void *old = nullptr;
    std::size_t size = 0;
    __sanitizer_finish_switch_fiber(nullptr, &old, &size);
    main_stack = const_cast<void *>(old);
    main_stack_bytes = size;
#endif
    entry();
    for (auto &group : current->copies)
        if (!group.empty())
            fail("ends with asynchronous copies that nobody waited for");
    current->state = State::done;
    alive -= 1;
    for (u32 i = 0, first = current->number / 32 * 32; i < 32 && first + i < fibers.size(); ++i) {
        const Fiber &f = fibers[first + i];
        if (f.state == State::warp && f.mask >> lane() & 1)
            fail("has ended, lane %u waits for it: %s, %s:%d", i, f.what, f.site.file, f.site.line);
    }
    release_if_complete(0);
    switch_to(*current, scheduler, true);
    std::abort();
}

inline void prepare(Fiber &f) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack, stack_bytes);
#endif
#if defined(__x86_64__)
    // At the entry of a function the stack pointer is 8 past a multiple of 16.
    void **top = reinterpret_cast<void **>(f.stack + stack_bytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(run_fiber);
    for (int i = 0; i < 6; ++i)
        *--top = nullptr;
    f.stack_pointer = top;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
#endif
}

inline void run_block() {
    const u32 threads = blockDim.x * blockDim.y * blockDim.z;
    while (fibers.size() < threads) {
        fibers.emplace_back();
        fibers.back().stack = static_cast<u8 *>(std::malloc(stack_bytes));
    }
    alive = threads;
    ready.clear();
    for (auto &b : barriers)
        b = Barrier();
    // Shared memory is not initialized: it holds NaN or random bits.
    void *shared = nullptr;
    if (posix_memalign(&shared, 1024, dynamic_shared_bytes ? dynamic_shared_bytes : 1) != 0)
        fail("no memory for %zu bytes of dynamic shared memory", dynamic_shared_bytes);
    dynamic_shared = static_cast<u8 *>(shared);
    for (std::size_t i = 0; i < dynamic_shared_bytes; ++i)
        dynamic_shared[i] = random_order ? u8(random()) : 0xff;
    for (u32 i = 0; i < threads; ++i) {
        Fiber &f = fibers[i];
        f.number = i;
        f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        f.copies.assign(1, {});
        f.state = State::ready;
        f.fake = nullptr;
        prepare(f);
        ready.push_back(i);
    }
    std::size_t next = 0;
    while (alive != 0) {
        if (next == ready.size()) {
            current = nullptr;
            std::string where;
            for (auto &f : fibers)
                if (f.number < threads && f.state != State::done && where.size() < 2000)
                    where += "\n  thread " + std::to_string(f.number) + " at " + f.what + " " +
                             f.site.file + ":" + std::to_string(f.site.line);
            fail("nobody can go on:%s", where.c_str());
        }
        if (random_order)
            std::swap(ready[next], ready[next + random() % (ready.size() - next)]);
        current = &fibers[ready[next++]];
        if (next > 4096) {
            ready.erase(ready.begin(), ready.begin() + long(next));
            next = 0;
        }
        threadIdx = current->index;
        switch_to(scheduler, *current);
    }
    current = nullptr;
    std::free(dynamic_shared);
    dynamic_shared = nullptr;
}

// ---- Asynchronous copies (cp.async) ----------------------------------------------------------

inline void check_shared(const void *p, std::size_t n, const char *what) {
    const u8 *at = static_cast<const u8 *>(p);
    if (at < dynamic_shared || at + n > dynamic_shared + dynamic_shared_bytes)
        fail("%s outside the dynamic shared memory", what);
    if (std::uintptr_t(p) % n != 0)
        fail("%s at an address that is no multiple of %zu", what, n);
}

inline void copy_async(void *to, const void *from, u32 bytes, u32 valid) {
    check_shared(to, bytes, "cp.async");
    if (std::uintptr_t(from) % bytes != 0 || valid > bytes)
        fail("cp.async: misaligned source or too many bytes");
    Copy copy{static_cast<u8 *>(to), std::vector<u8>(bytes)};
    std::memcpy(copy.bytes.data(), from, valid);
    if (random_order && random() % 2)
        std::memcpy(copy.to, copy.bytes.data(), bytes);
    current->copies.back().push_back(std::move(copy));
}
inline void copy_commit() { current->copies.emplace_back(); }
inline void copy_wait(u32 pending, bool all) {
    auto &groups = current->copies;
    std::size_t keep = all ? 0 : pending + 1; // The open group is not counted.
    std::size_t done = groups.size() > keep ? groups.size() - keep : 0;
    for (std::size_t i = 0; i < done; ++i)
        for (auto &copy : groups[i])
            std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    groups.erase(groups.begin(), groups.begin() + long(done));
    if (groups.empty())
        groups.emplace_back();
}

} // namespace emulator
