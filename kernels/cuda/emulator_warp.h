// Synchronization, shuffles, votes and reductions: functions that CUDA has built in.
#pragma once

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
