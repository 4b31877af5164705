// Top-k: selects the most likely tokens of a step for the sampler, so that only a few numbers cross the bus.
//
// A logit and its token form one key of 64 bits. Keys sort by logit, the highest first, and by token among equal
// logits, the lowest first. A block sorts its slice, 1024 keys at a time, and keeps the first ones. The last block
// to arrive sorts the keys that all blocks have kept. 32 000 logits are 32 blocks that sort once, in 55 steps of
// 512 comparisons, and then 2 rounds of the last block.
#include "common.cuh"

// Fields as `TopKParams` of top_k.rs.
struct TopKParams {
    // [n].
    const float *x;
    // Tokens whose logits the penalty changes, then tokens that are excluded.
    const u32 *changed;
    // The keys of each block, [blocks][count].
    u64 *partial;
    u32 *arrived;
    // Tokens and logits, [count][2].
    u32 *out;
    u32 n, count, penalized, banned;
    // Logits of a block.
    u32 slice;
    float penalty;
    // Whether only the best token counts. NaN is then never the largest, and both zeros are equal.
    u32 greedy, padding;
};

constexpr u32 SORT_KEYS = 1024;
constexpr u32 SORT_THREADS = SORT_KEYS / 2;
// The most tokens whose logits change.
constexpr u32 MAX_CHANGED = 512;

STB_DEVICE u64 key_of(float v, u32 token, u32 greedy) {
    u32 bits = __float_as_uint(v);
    if (greedy && v == 0.0f)
        bits = 0;
    u32 order = bits & 0x80000000 ? ~bits : bits | 0x80000000;
    if (greedy && v != v)
        order = 0;
    return u64(order) << 32 | (0xffffffff - token);
}

// Sorts all keys, the highest first.
STB_DEVICE void sort(u64 *keys) {
    for (u32 size = 2; size <= SORT_KEYS; size *= 2) {
        for (u32 step = size / 2; step > 0; step /= 2) {
            __syncthreads();
            const u32 t = threadIdx.x;
            const u32 i = t / step * 2 * step + t % step, j = i + step;
            const bool falling = (i & size) == 0;
            const u64 a = keys[i], b = keys[j];
            if ((a < b) == falling)
                keys[i] = b, keys[j] = a;
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(SORT_THREADS) top_k(const __grid_constant__ TopKParams a) {
    __shared__ u64 keys[SORT_KEYS];
    __shared__ u32 changed[MAX_CHANGED];
    __shared__ u32 last;
    const u32 changes = a.penalized + a.banned;
    for (u32 i = threadIdx.x; i < changes; i += SORT_THREADS)
        changed[i] = a.changed[i];
    __syncthreads();
    auto logit = [&](u32 token) {
        float v = a.x[token];
        for (u32 i = 0; i < changes; ++i)
            if (changed[i] == token)
                v = i >= a.penalized ? __uint_as_float(0xff800000)
                    : v > 0.0f       ? v / a.penalty
                                     : v * a.penalty;
        return key_of(v, token, a.greedy);
    };
    // Puts the first `count` of `n` keys, sorted, at the start of `keys`.
    auto select = [&](u32 n, auto get) {
        for (u32 at = 0, kept = 0; at < n; at += SORT_KEYS - kept, kept = a.count) {
            __syncthreads();
            for (u32 i = threadIdx.x + kept; i < SORT_KEYS; i += SORT_THREADS) {
                const u32 from = at + i - kept;
                keys[i] = from < n ? get(from) : 0;
            }
            sort(keys);
        }
    };
    const u32 first = blockIdx.x * a.slice;
    select(first < a.n ? least(a.slice, a.n - first) : 0, [&](u32 i) { return logit(first + i); });
    if (gridDim.x > 1) {
        for (u32 i = threadIdx.x; i < a.count; i += SORT_THREADS)
            __stcg(&a.partial[u64(blockIdx.x) * a.count + i], keys[i]);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(a.arrived, 1u) + 1 == gridDim.x;
            if (last)
                *a.arrived = 0;
        }
        __syncthreads();
        if (last == 0)
            return;
        __threadfence();
        select(gridDim.x * a.count, [&](u32 i) { return __ldcg(&a.partial[i]); });
    }
    for (u32 i = threadIdx.x; i < a.count; i += SORT_THREADS) {
        const u32 order = u32(keys[i] >> 32);
        a.out[2 * i] = 0xffffffff - u32(keys[i]);
        a.out[2 * i + 1] = order & 0x80000000 ? order & 0x7fffffff : ~order;
    }
}
