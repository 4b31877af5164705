// Runs CUDA kernels on the host, for tests: c++ -std=c++17 -include emulator.h.
//
// Each thread of a block is a fibre with its own stack; blocks run one after another. A fibre runs
// until it comes to a barrier or to an operation of its warp; these check that everybody who must take part does.
// With a seed other than 0 the order of fibres and blocks is random, and so is the moment at which
// an asynchronous copy arrives. What a kernel may rely on is documented in README.md.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define STB_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define STB_SITE_ , const char *file = __builtin_FILE(), int line = __builtin_LINE()

// ---- Vector types ----------------------------------------------------------------------------

#define STB_VECTOR(name, type)                                                                     \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                       \
    struct name##3 { type x, y, z; };                                                              \
    struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };    \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                               \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                    \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
STB_VECTOR(char, signed char)
STB_VECTOR(uchar, unsigned char)
STB_VECTOR(short, short)
STB_VECTOR(ushort, unsigned short)
STB_VECTOR(int, int)
STB_VECTOR(uint, unsigned int)
STB_VECTOR(float, float)
STB_VECTOR(longlong, long long)
STB_VECTOR(ulonglong, unsigned long long)
#undef STB_VECTOR

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- Fibres ----------------------------------------------------------------------------------

namespace emulator {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

// Literals of equal text mostly have one address; under AddressSanitizer a comparison of text is slow.
inline bool same(const char *a, const char *b) { return a == b || std::strcmp(a, b) == 0; }

struct Site {
    const char *file = "";
    int line = 0;
    bool operator!=(const Site &o) const { return line != o.line || !same(file, o.file); }
};

enum class State { ready, warp, barrier, done };

// A copy that has been issued and may not have arrived.
struct Copy {
    u8 *to;
    std::vector<u8> bytes;
};

struct Fibre {
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
    // Warp operation waited for.
    u32 mask = 0;
    void *data = nullptr;
    // Barrier waited for.
    int barrier = 0;
    // cp.async: groups of copies, the last one open.
    std::vector<std::vector<Copy>> copies{1};
};

struct Barrier {
    u32 arrived = 0, expected = 0;
    u32 any = 0, all = 1, count = 0;
    u32 last_any = 0, last_all = 0, last_count = 0;
};

constexpr std::size_t stack_bytes = 192 << 10;

inline std::vector<Fibre> fibres;
inline std::vector<u32> ready;
inline Fibre *current = nullptr;
inline Fibre scheduler;
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

inline void switch_to(Fibre &from, Fibre &to, bool last = false) {
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

inline void wake(Fibre &f) {
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
    const Fibre *first = nullptr;
    for (auto &f : fibres) {
        if (f.state != State::barrier || f.barrier != id)
            continue;
        if (first && first->number / 32 == f.number / 32 && first->site != f.site)
            fail("threads %u and %u of one warp are at different barriers: %s:%d and %s:%d",
                 first->number, f.number, first->site.file, first->site.line, f.site.file,
                 f.site.line);
        first = &f;
    }
    for (auto &f : fibres)
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

// An operation of the lanes of `mask`: `apply` runs once, with what each lane brought. `count`
// warps of a warpgroup take part (1 for operations of a warp).
template <class Data>
inline void collective(const char *what, u32 mask, Data &data, void (*apply)(Data **, u32), Site site,
                       u32 warps = 1) {
    Fibre &me = *current;
    if (!(mask >> lane() & 1))
        fail("%s at %s:%d: the lane is not in its own mask %08x", what, site.file, site.line, mask);
    me.state = State::warp;
    me.site = site, me.what = what, me.mask = mask, me.data = &data;
    const u32 first = me.number / (32 * warps) * (32 * warps);
    // The last lane to come checks all of them; the others stop at the first that is missing.
    bool complete = true;
    for (u32 i = 0; i < 32 * warps; ++i) {
        if (!(mask >> i % 32 & 1))
            continue;
        if (first + i >= fibres.size())
            fail("%s at %s:%d: lane %u of mask %08x does not exist", what, site.file, site.line, i,
                 mask);
        Fibre &f = fibres[first + i];
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
            all[i] = mask >> i % 32 & 1 ? static_cast<Data *>(fibres[first + i].data) : nullptr;
        apply(all, mask);
        for (u32 i = 0; i < 32 * warps; ++i)
            if (mask >> i % 32 & 1)
                wake(fibres[first + i]);
    }
    to_scheduler();
}

inline void run_fibre() {
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
    for (u32 i = 0, first = current->number / 32 * 32; i < 32 && first + i < fibres.size(); ++i) {
        const Fibre &f = fibres[first + i];
        if (f.state == State::warp && f.mask >> lane() & 1)
            fail("has ended, lane %u waits for it: %s, %s:%d", i, f.what, f.site.file, f.site.line);
    }
    release_if_complete(0);
    switch_to(*current, scheduler, true);
    std::abort();
}

inline void prepare(Fibre &f) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack, stack_bytes);
#endif
#if defined(__x86_64__)
    // At the entry of a function the stack pointer is 8 past a multiple of 16.
    void **top = reinterpret_cast<void **>(f.stack + stack_bytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void *>(run_fibre);
    for (int i = 0; i < 6; ++i)
        *--top = nullptr;
    f.stack_pointer = top;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fibre, 0);
#endif
}

inline void run_block() {
    const u32 threads = blockDim.x * blockDim.y * blockDim.z;
    while (fibres.size() < threads) {
        fibres.emplace_back();
        fibres.back().stack = static_cast<u8 *>(std::malloc(stack_bytes));
    }
    alive = threads;
    ready.clear();
    for (auto &b : barriers)
        b = Barrier();
    // Shared memory holds anything at first: NaN, or random bits.
    void *shared = nullptr;
    if (posix_memalign(&shared, 1024, dynamic_shared_bytes ? dynamic_shared_bytes : 1) != 0)
        fail("no memory for %zu bytes of dynamic shared memory", dynamic_shared_bytes);
    dynamic_shared = static_cast<u8 *>(shared);
    for (std::size_t i = 0; i < dynamic_shared_bytes; ++i)
        dynamic_shared[i] = random_order ? u8(random()) : 0xff;
    for (u32 i = 0; i < threads; ++i) {
        Fibre &f = fibres[i];
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
            for (auto &f : fibres)
                if (f.number < threads && f.state != State::done && where.size() < 2000)
                    where += "\n  thread " + std::to_string(f.number) + " at " + f.what + " " +
                             f.site.file + ":" + std::to_string(f.site.line);
            fail("nobody can go on:%s", where.c_str());
        }
        if (random_order)
            std::swap(ready[next], ready[next + random() % (ready.size() - next)]);
        current = &fibres[ready[next++]];
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

// ---- Numbers ---------------------------------------------------------------------------------

// prmt: selector nibbles choose bytes of {b, a}; bit 3 repeats the sign bit of the byte. CUDA's __byte_perm, which is
// not here, ignores that bit.
inline unsigned permute(unsigned a, unsigned b, unsigned s) {
    const unsigned long long all = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned n = s >> 4 * i & 15, byte = unsigned(all >> 8 * (n & 7)) & 255;
        r |= (n & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return r;
}
inline u32 bits(float v) {
    u32 b;
    std::memcpy(&b, &v, 4);
    return b;
}
inline float from_bits(u32 b) {
    float v;
    std::memcpy(&v, &b, 4);
    return v;
}
inline float f16_to_f32(u16 h) {
    const u32 sign = u32(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31)
        return from_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent != 0)
        return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    const float v = float(mantissa) * 0x1p-24f;
    return sign ? -v : v;
}
// To nearest, ties to even.
inline u16 f32_to_f16(float v) {
    const u32 b = bits(v);
    const u16 sign = u16(b >> 16 & 0x8000);
    const u32 a = b & 0x7fffffff;
    if (a > 0x7f800000)
        return 0x7fff;
    if (a >= 0x477ff000)
        return sign | 0x7c00;
    if (a < 0x38800000) // Subnormal: the addition rounds to multiples of 2^-24.
        return sign | u16(bits(from_bits(a) + 0.5f) - bits(0.5f));
    const u32 rounded = a + 0xfff + (a >> 13 & 1);
    return sign | u16((rounded >> 13) - (112 << 10));
}
inline float bf16_to_f32(u16 h) { return from_bits(u32(h) << 16); }
inline u16 f32_to_bf16(float v) {
    const u32 b = bits(v);
    if ((b & 0x7fffffff) > 0x7f800000)
        return 0x7fff;
    return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
// An f16 product and sum, rounded once. The exact result has far fewer than 53 bits, or its last
// bits do not reach the rounding.
inline u16 f16_fma(u16 a, u16 b, u16 c) {
    const double exact = double(f16_to_f32(a)) * double(f16_to_f32(b)) + double(f16_to_f32(c));
    // Round to odd in f32 first, so that the second rounding is right.
    float f = float(exact);
    if (std::isfinite(f) && double(f) != exact) {
        if (std::fabs(double(f)) > std::fabs(exact))
            f = std::nextafter(f, 0.0f);
        f = from_bits(bits(f) | 1);
    }
    return f32_to_f16(f);
}

} // namespace emulator

// ---- Functions that CUDA has built in --------------------------------------------------------

inline void __syncthreads(const char *file = __builtin_FILE(), int line = __builtin_LINE()) {
    emulator::barrier(0, 0, false, true, {file, line});
}
inline int __syncthreads_or(int p STB_SITE_) {
    return int(emulator::barrier(0, 0, p != 0, true, {file, line}).last_any);
}
inline int __syncthreads_and(int p STB_SITE_) {
    return int(emulator::barrier(0, 0, p != 0, true, {file, line}).last_all);
}
inline int __syncthreads_count(int p STB_SITE_) {
    return int(emulator::barrier(0, 0, p != 0, true, {file, line}).last_count);
}
inline void __syncwarp(unsigned mask = 0xffffffff STB_SITE_) {
    int nothing = 0;
    emulator::collective<int>("__syncwarp", mask, nothing, [](int **, unsigned) {}, {file, line});
}

namespace emulator {
enum class Move { index, up, down, exclusive_or };
template <class T> struct Shuffle {
    T value, result;
    int by, width;
    Move move;
};
template <class T>
T shuffle(const char *what, u32 mask, T v, int by, int width, Move move, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what a shuffle can move");
    Shuffle<T> data{v, v, by, width, move};
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
        fail("%s: width %d", what, width);
    collective<Shuffle<T>>(
        what, mask, data,
        [](Shuffle<T> **all, u32 lanes) {
            for (int i = 0; i < 32; ++i) {
                if (!(lanes >> i & 1))
                    continue;
                Shuffle<T> &d = *all[i];
                const int first = i / d.width * d.width;
                int from = i;
                switch (d.move) {
                case Move::index: from = first + (d.by & (d.width - 1)); break;
                case Move::up: from = i - d.by < first ? i : i - d.by; break;
                case Move::down: from = i + d.by >= first + d.width ? i : i + d.by; break;
                case Move::exclusive_or: from = (i ^ d.by) >= first + d.width ? i : i ^ d.by; break;
                }
                if (!(lanes >> from & 1))
                    fail("shuffle: lane %d reads lane %d, which takes no part", i, from);
                d.result = all[from]->value;
            }
        },
        site);
    return data.result;
}
struct Vote {
    u32 value, result;
    u64 key;
};
inline u32 ballot(const char *what, u32 mask, bool p, Site site) {
    Vote data{p, 0, 0};
    collective<Vote>(
        what, mask, data,
        [](Vote **all, u32 lanes) {
            u32 result = 0;
            for (int i = 0; i < 32; ++i)
                if (lanes >> i & 1)
                    result |= all[i]->value << i;
            for (int i = 0; i < 32; ++i)
                if (lanes >> i & 1)
                    all[i]->result = result;
        },
        site);
    return data.result;
}
template <int Op> u32 reduce(const char *what, u32 mask, u32 v, Site site) {
    Vote data{v, 0, 0};
    collective<Vote>(
        what, mask, data,
        [](Vote **all, u32 lanes) {
            bool first = true;
            u32 r = 0;
            for (int i = 0; i < 32; ++i) {
                if (!(lanes >> i & 1))
                    continue;
                const u32 x = all[i]->value;
                if (first)
                    r = x;
                else
                    switch (Op) {
                    case 0: r += x; break;
                    case 1: r = x > r ? x : r; break;
                    case 2: r = x < r ? x : r; break;
                    case 3: r = int(x) > int(r) ? x : r; break;
                    case 4: r = int(x) < int(r) ? x : r; break;
                    case 5: r |= x; break;
                    default: r &= x;
                    }
                first = false;
            }
            for (int i = 0; i < 32; ++i)
                if (lanes >> i & 1)
                    all[i]->result = r;
        },
        site);
    return data.result;
}
} // namespace emulator

template <class T> T __shfl_sync(unsigned m, T v, int from, int width = 32 STB_SITE_) {
    return emulator::shuffle("__shfl_sync", m, v, from, width, emulator::Move::index, {file, line});
}
template <class T> T __shfl_up_sync(unsigned m, T v, unsigned by, int width = 32 STB_SITE_) {
    return emulator::shuffle("__shfl_up_sync", m, v, int(by), width, emulator::Move::up, {file, line});
}
template <class T> T __shfl_down_sync(unsigned m, T v, unsigned by, int width = 32 STB_SITE_) {
    return emulator::shuffle("__shfl_down_sync", m, v, int(by), width, emulator::Move::down,
                             {file, line});
}
template <class T> T __shfl_xor_sync(unsigned m, T v, int by, int width = 32 STB_SITE_) {
    return emulator::shuffle("__shfl_xor_sync", m, v, by, width, emulator::Move::exclusive_or,
                             {file, line});
}
inline unsigned __ballot_sync(unsigned m, int p STB_SITE_) {
    return emulator::ballot("__ballot_sync", m, p != 0, {file, line});
}
inline int __any_sync(unsigned m, int p STB_SITE_) {
    return emulator::ballot("__any_sync", m, p != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned m, int p STB_SITE_) {
    return emulator::ballot("__all_sync", m, p != 0, {file, line}) == m;
}
inline unsigned __reduce_add_sync(unsigned m, unsigned v STB_SITE_) {
    return emulator::reduce<0>("__reduce_add_sync", m, v, {file, line});
}
inline int __reduce_add_sync(unsigned m, int v STB_SITE_) {
    return int(emulator::reduce<0>("__reduce_add_sync", m, unsigned(v), {file, line}));
}
inline unsigned __reduce_max_sync(unsigned m, unsigned v STB_SITE_) {
    return emulator::reduce<1>("__reduce_max_sync", m, v, {file, line});
}
inline unsigned __reduce_min_sync(unsigned m, unsigned v STB_SITE_) {
    return emulator::reduce<2>("__reduce_min_sync", m, v, {file, line});
}
inline int __reduce_max_sync(unsigned m, int v STB_SITE_) {
    return int(emulator::reduce<3>("__reduce_max_sync", m, unsigned(v), {file, line}));
}
inline int __reduce_min_sync(unsigned m, int v STB_SITE_) {
    return int(emulator::reduce<4>("__reduce_min_sync", m, unsigned(v), {file, line}));
}
inline unsigned __reduce_or_sync(unsigned m, unsigned v STB_SITE_) {
    return emulator::reduce<5>("__reduce_or_sync", m, v, {file, line});
}
inline unsigned __reduce_and_sync(unsigned m, unsigned v STB_SITE_) {
    return emulator::reduce<6>("__reduce_and_sync", m, v, {file, line});
}

// Blocks run one after another, so every access is atomic and ordered.
template <class T> T atomicAdd(T *p, T v) { T old = *p; *p = old + v; return old; }
template <class T> T atomicSub(T *p, T v) { T old = *p; *p = old - v; return old; }
template <class T> T atomicMax(T *p, T v) { T old = *p; *p = old > v ? old : v; return old; }
template <class T> T atomicMin(T *p, T v) { T old = *p; *p = old < v ? old : v; return old; }
template <class T> T atomicOr(T *p, T v) { T old = *p; *p = old | v; return old; }
template <class T> T atomicAnd(T *p, T v) { T old = *p; *p = old & v; return old; }
template <class T> T atomicExch(T *p, T v) { T old = *p; *p = v; return old; }
template <class T> T atomicCAS(T *p, T c, T v) { T old = *p; if (old == c) *p = v; return old; }
inline unsigned atomicInc(unsigned *p, unsigned last) {
    unsigned old = *p;
    *p = old >= last ? 0 : old + 1;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __trap() { emulator::fail("__trap"); }

template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldlu(const T *p) { return *p; }
template <class T> void __stcs(T *p, T v) { *p = v; }
template <class T> void __stcg(T *p, T v) { *p = v; }

inline unsigned __float_as_uint(float v) { return emulator::bits(v); }
inline int __float_as_int(float v) { return int(emulator::bits(v)); }
inline float __uint_as_float(unsigned v) { return emulator::from_bits(v); }
inline float __int_as_float(int v) { return emulator::from_bits(unsigned(v)); }
inline long long __double_as_longlong(double v) {
    long long bits;
    std::memcpy(&bits, &v, sizeof bits);
    return bits;
}
inline double __longlong_as_double(long long bits) {
    double v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i)
        r |= (v >> i & 1) << (31 - i);
    return r;
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned by) {
    return unsigned(((unsigned long long)hi << 32 | lo) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned by) {
    return unsigned(((unsigned long long)hi << 32 | lo) << (by & 31) >> 32);
}
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i)
        c = int(unsigned(c) + unsigned(int(std::int8_t(a >> 8 * i)) * int(std::int8_t(b >> 8 * i))));
    return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 4; ++i)
        c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return unsigned((unsigned long long)a * b >> 32);
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1 / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return 1 / std::sqrt(a); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __exp2f(float a) { return std::exp2(a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float __sinf(float a) { return std::sin(a); }
inline float __cosf(float a) { return std::cos(a); }
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return int(a); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1) : 0; }
using std::max;
using std::min;

#include "emulator_mma.h"
#include "emulator_main.h"
