// Attention of many consecutive tokens of one sequence (prefill), in the manner of FlashAttention-2: -DKV=KvF16 or KvQ8.
// The cache already holds their keys and values.
//
// The queries of one key-value head are the rows of a matrix, [token][query head of the group]. Heads that share keys
// share their tiles, and a tile of rows has few tokens, so that little is computed beyond the causal border. A block has
// ROWS rows, a warp 16 of them. The block loops over the keys that its last token attends to, KEYS at a time: scores
// S = Q · Kᵀ, weights P = 2^(S − M) with M the largest score of the row so far, sums O = O · 2^(old M − M) + P · V. Both
// products are mma.m16n8k16 of f16 with sums in f32. S in registers becomes P, operand A of the second product, without
// shared memory. Scores, M and the sum of weights are f32.
//
// Queries become f16 times a power of two per row, which is multiplied back into the scores, so no query is too large or
// too small for f16. A row with a number that is not finite becomes NaN as a whole. Weights are at most 1. 8-bit keys are
// integers that f16 holds exactly, and their scales are applied to the scores. 8-bit values become f16 with their scales,
// and saturate as in a cache of f16.
//
// A NaN in the cache makes the results of the tokens that attend to it NaN, and no others. A weight of 0 times NaN would
// be NaN, so tiles on the causal border are searched for NaN.
//
// Shared memory: three stages in turn. The keys of a tile are one stage and its values another, so that one is multiplied
// while two are being copied. The order of the 16-byte pieces differs from row to row, so that the eight rows of a matrix
// for `ldmatrix` touch all banks. 8-bit keys and values are copied as they are, and expanded to f16 into one tile between
// two barriers.
//
// Budget for a warp with width 128 and 64 keys on an A100: 128 mma of 8 cycles of a scheduler (2048 products at 256 per
// cycle) take 1024 cycles. Other units work beside them: 32 exponentials of 8 cycles, 256; about 210 operations of 2
// cycles for maxima, differences, sums, conversions and scaling O, 420; 64 ldmatrix of 512 bytes each. A multiprocessor
// reads 128 bytes of shared memory per cycle, so 32 KiB for each of 4 warps take 1024 cycles, as many as the products. An
// H100 doubles the rate of the products only: shared memory then allows at most half of the dense peak, about 80 % of
// what mma.sync reaches there. L2 delivers a tile of keys and values (32 KiB) per block for 2.1 million operations: 64
// per byte, 350 TFLOP/s at 5.5 TB/s. Blocks of 128 rows, two m16 per warp, would halve both for 64 more registers, but a
// prompt of 512 tokens with 32 heads is then 128 blocks of 4 warps, fewer than one per multiprocessor of an H100. This
// has to be decided on a GPU.
#include "kv_cache.cuh"

// Fields as `AttentionPrefillParams` of attention/shape.rs.
struct AttentionPrefillParams {
    // [tokens][heads · width].
    const float *q;
    float *out;
    // The slot of the first token. The other tokens follow it.
    const KvSlot *slots;
    u32 heads, kv_heads, width, layer;
    u32 tokens;
    float scale;
};

constexpr u32 BLOCK_WARPS = 4, BLOCK_THREADS = BLOCK_WARPS * WARP;
// Rows of a block.
constexpr u32 ROWS = 16 * BLOCK_WARPS;
constexpr u32 STAGES = 3;
constexpr float LOG2_E = 1.44269504f;

STB_DEVICE float infinity() { return __uint_as_float(0x7f800000); }

// The top bit of each f16 of a pair that is NaN.
STB_DEVICE u32 nan_bits(u32 pair) { return ((pair & 0x7fff7fff) + 0x03ff03ff) & 0x80008000; }

// For heads of up to WIDTH elements; missing elements are zero.
template <u32 WIDTH, u32 KEYS> struct Kernel {
    static constexpr u32 PIECES = WIDTH / CHUNK, STEPS = WIDTH / 16;
    // Bytes of a tile in f16, and of a stage.
    static constexpr u32 TILE = KEYS * WIDTH * 2;
    static constexpr u32 STAGE = KV::SCALED ? KEYS * (WIDTH + 4) : TILE;
    static constexpr u32 EXPANDED = STAGES * STAGE;
    static constexpr u32 QUERIES = EXPANDED + (KV::SCALED ? TILE : 0);
    // The queries of wide heads do not fit registers. Their fragments are in shared memory, separately for each lane.
    static constexpr bool KEEPS = WIDTH <= 128;

    const AttentionPrefillParams &a;
    u8 *shared;
    KvSlot slot;
    u32 head, group, first_row, rows;
    // The keys that some row of the block attends to, and those that all its rows attend to.
    u32 visible, common;
    u32 warp, lane;
    // For each of a lane's two rows: the last key that it attends to, the factor of its scores, the largest score so
    // far, and this lane's part of the sum of weights.
    u32 last[2];
    float factor[2], most[2], total[2];
    u32 q[KEEPS ? STEPS : 1][4];
    float out[2 * STEPS][4];

    STB_DEVICE Kernel(const AttentionPrefillParams &a, u8 *shared) : a(a), shared(shared), slot(a.slots[0]) {
        group = a.heads / a.kv_heads, rows = a.tokens * group;
        // The blocks with the most keys come first, so that the grid does not end with a long block.
        first_row = (gridDim.x - 1 - blockIdx.x) * ROWS, head = blockIdx.y;
        visible = slot.position + (least(first_row + ROWS, rows) - 1) / group + 1;
        common = slot.position + first_row / group + 1;
        warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            last[i] = slot.position + row(i) / group;
            most[i] = -infinity(), total[i] = 0.0f;
        }
#pragma unroll
        for (u32 n = 0; n < 2 * STEPS; ++n)
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
                out[n][k] = 0.0f;
    }

    // The lane's rows: row lane / 4 of the fragments and the one 8 after it.
    STB_DEVICE u32 row(u32 i) const { return first_row + warp * 16 + lane / 4 + 8 * i; }
    // The index of the first element of such a row in queries and results.
    STB_DEVICE u64 at(u32 i) const {
        const u32 token = row(i) / group, of_group = row(i) % group;
        return (u64(token) * a.heads + head * group + of_group) * a.width;
    }
    // Bytes from the start of a tile to a piece of eight elements of a key.
    static STB_DEVICE u32 place(u32 key, u32 piece) {
        const u32 by = PIECES % 8 == 0 ? key % 8 : key / 2 % 4;
        return (key * PIECES + (piece ^ by)) * 16;
    }
    STB_DEVICE u8 *stage(u32 part) const { return shared + part % STAGES * STAGE; }

    STB_DEVICE void load_queries() {
        float inverse[2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            float largest = 0.0f;
            const float *from = a.q + at(i);
            if (row(i) < rows)
                for (u32 c = 2 * (lane % 4); c < a.width; c += 8) {
                    const float2 v = *reinterpret_cast<const float2 *>(from + c);
                    largest = fmaxf(largest, fmaxf(fabsf(v.x), fabsf(v.y)));
                    if (v.x != v.x || v.y != v.y)
                        largest = infinity();
                }
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
            // The power of two is within 2^±126 and not subnormal. The largest magnitude becomes less than 4.
            u32 exponent = __float_as_uint(largest) >> 23;
            exponent = exponent < 27 ? 27 : exponent > 253 ? 253 : exponent;
            inverse[i] = __uint_as_float((254 - exponent) << 23);
            factor[i] = __uint_as_float(exponent << 23) * (a.scale * LOG2_E);
            if (largest == infinity())
                factor[i] = __uint_as_float(0x7fc00000);
        }
#pragma unroll
        for (u32 k = 0; k < STEPS; ++k) {
            u32 x[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 c = 16 * k + 8 * (i / 2) + 2 * (lane % 4);
                float2 v = {0.0f, 0.0f};
                if (row(i % 2) < rows && c < a.width)
                    v = *reinterpret_cast<const float2 *>(a.q + at(i % 2) + c);
                x[i] = f16x2(v.x * inverse[i % 2], v.y * inverse[i % 2]);
            }
            if constexpr (KEEPS) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
                    q[k][i] = x[i];
            } else {
                queries()[k * WARP] = {x[0], x[1], x[2], x[3]};
            }
        }
    }
    STB_DEVICE uint4 *queries() const {
        return reinterpret_cast<uint4 *>(shared + QUERIES) + warp * STEPS * WARP + lane;
    }

    // Starts to copy the keys or values of a tile. Those that do not exist become zero.
    STB_DEVICE void load(u32 part, const KvRows &from, u32 first) const {
        u8 *to = stage(part);
        const u32 chunks = ceil_div(a.width, CHUNK);
#pragma unroll
        for (u32 n = 0; n < KEYS * PIECES / BLOCK_THREADS; ++n) {
            const u32 i = n * BLOCK_THREADS + threadIdx.x, key = i / PIECES, piece = i % PIECES;
            const bool there = first + key < visible && piece < chunks;
            const u8 *chunk = there ? from.chunk(first + key, piece) : from.rows;
            if constexpr (KV::SCALED)
                copy_async<8>(to + i * 8, chunk, there ? 8 : 0);
            else
                copy_async16(to + place(key, piece), chunk, there ? 16 : 0);
        }
        if constexpr (KV::SCALED) {
            if (threadIdx.x < KEYS) {
                const bool there = first + threadIdx.x < visible;
                const float *scale = from.scales + (there ? first + threadIdx.x : 0);
                copy_async<4>(to + KEYS * WIDTH + threadIdx.x * 4, scale, there ? 4 : 0);
            }
        }
    }

    STB_DEVICE const float *scales(u32 part) const {
        return reinterpret_cast<const float *>(stage(part) + KEYS * WIDTH);
    }

    // Waits for the keys or values of a tile, starts to copy those of the next tile, and returns the tile in f16.
    template <bool VALUES> STB_DEVICE u8 *next(u32 part, const KvRows &from, u32 tile) const {
        copy_wait<1>();
        // After this, all threads see the copied stage, and no thread reads the stage that is loaded next.
        __syncthreads();
        if ((tile + 1) * KEYS < visible)
            load(part + 2, from, (tile + 1) * KEYS);
        copy_commit();
        if constexpr (!KV::SCALED)
            return stage(part);
        u8 *to = shared + EXPANDED;
        const u8 *raw = stage(part);
#pragma unroll
        for (u32 n = 0; n < KEYS * PIECES / BLOCK_THREADS; ++n) {
            const u32 i = n * BLOCK_THREADS + threadIdx.x, key = i / PIECES, piece = i % PIECES;
            u32 x[4];
            if constexpr (VALUES) {
                float v[CHUNK];
                KV::get(v, raw + i * 8);
                const float scale = scales(part)[key];
#pragma unroll
                for (u32 k = 0; k < 4; ++k)
                    x[k] = f16x2(KvF16::saturated(v[2 * k] * scale), KvF16::saturated(v[2 * k + 1] * scale));
            } else {
                // The f16 1024 + code + 128, which is exact.
                const uint2 codes = *reinterpret_cast<const uint2 *>(raw + i * 8);
#pragma unroll
                for (u32 k = 0; k < 4; ++k) {
                    const u32 word = (k < 2 ? codes.x : codes.y) ^ 0x80808080;
                    x[k] = f16x2_add(permute(word, 0x64646464, k % 2 ? 0x4342 : 0x4140), 0xe480e480);
                }
            }
            *reinterpret_cast<uint4 *>(to + place(key, piece)) = {x[0], x[1], x[2], x[3]};
        }
        __syncthreads();
        return to;
    }

    // s = Q · Kᵀ for a warp's rows and a tile of keys. Scores of keys that a row does not attend to are −∞.
    STB_DEVICE void scores(float (&s)[KEYS / 8][4], const u8 *keys, u32 part, u32 first) const {
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                s[n][i] = 0.0f;
#pragma unroll
        for (u32 k = 0; k < STEPS; ++k) {
            u32 x[4];
            if constexpr (KEEPS) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
                    x[i] = q[k][i];
            } else {
                const uint4 v = queries()[k * WARP];
                x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
            }
#pragma unroll
            for (u32 n = 0; n < KEYS / 16; ++n) {
                u32 y[4];
                const u32 key = 16 * n + lane / 16 * 8 + lane % 8;
                load_matrix_x4(y, keys + place(key, 2 * k + lane / 8 % 2));
                const u32 low[2] = {y[0], y[1]}, high[2] = {y[2], y[3]};
                mma_f16(s[2 * n], x, low);
                mma_f16(s[2 * n + 1], x, high);
            }
        }
        if constexpr (KV::SCALED) {
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; ++n) {
                const u32 key = 8 * n + lane % 4 * 2;
                const float2 scale = *reinterpret_cast<const float2 *>(scales(part) + key);
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
                    s[n][i] *= i % 2 ? scale.y : scale.x;
            }
        }
        if (first + KEYS <= common)
            return;
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                if (first + 8 * n + lane % 4 * 2 + i % 2 > last[i / 2])
                    s[n][i] = -infinity();
    }

    // Converts scores to weights, and scales the sums so far to the new largest score.
    STB_DEVICE void weigh(float (&s)[KEYS / 8][4]) {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            float largest = -infinity();
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; ++n)
                largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, 2));
            largest = fmaxf(most[r], largest);
            // If all scores are NaN or −∞ there is no largest. NaN stays NaN, and −∞ becomes a weight of 0.
            const float from = largest == -infinity() ? 0.0f : largest;
            const float share = exp2_approx((most[r] - from) * factor[r]);
            most[r] = largest;
            total[r] *= share;
#pragma unroll
            for (u32 n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (u32 i = 2 * r; i < 2 * r + 2; ++i) {
                    // A fused s · factor − from · factor would not be 0 for a large largest score.
                    s[n][i] = exp2_approx((s[n][i] - from) * factor[r]);
                    total[r] += s[n][i];
                }
#pragma unroll
            for (u32 n = 0; n < 2 * STEPS; ++n)
                out[n][2 * r] *= share, out[n][2 * r + 1] *= share;
        }
    }

    // out += P · V.
    STB_DEVICE void add(const float (&s)[KEYS / 8][4], const u8 *values) {
#pragma unroll
        for (u32 k = 0; k < KEYS / 16; ++k) {
            const float(&low)[4] = s[2 * k], (&high)[4] = s[2 * k + 1];
            const u32 p[4] = {f16x2(low[0], low[1]), f16x2(low[2], low[3]), f16x2(high[0], high[1]),
                              f16x2(high[2], high[3])};
#pragma unroll
            for (u32 n = 0; n < STEPS; ++n) {
                u32 y[4];
                const u32 key = 16 * k + lane % 16;
                load_matrix_x4_trans(y, values + place(key, 2 * n + lane / 16));
                const u32 left[2] = {y[0], y[1]}, right[2] = {y[2], y[3]};
                mma_f16(out[2 * n], p, left);
                mma_f16(out[2 * n + 1], p, right);
            }
        }
    }

    // Makes the sums of rows NaN that attend to a value that is NaN, and replaces such values by zero for the other
    // rows. All threads call it. All values are visible to all threads before and after.
    STB_DEVICE void poison(u8 *values, u32 first) {
        bool found = false;
        for (u32 i = threadIdx.x; i < TILE / 4; i += BLOCK_THREADS)
            found |= nan_bits(reinterpret_cast<const u32 *>(values)[i]) != 0;
        if (!__syncthreads_or(found))
            return;
#pragma unroll 1
        for (u32 key = 0; key < KEYS; ++key)
#pragma unroll
            for (u32 n = 0; n < 2 * STEPS; ++n) {
                const u8 *pair = values + place(key, n) + lane % 4 * 4;
                const u32 bits = nan_bits(*reinterpret_cast<const u32 *>(pair));
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
                    if (first + key <= last[i / 2] && (bits >> (i % 2 ? 31 : 15) & 1))
                        out[n][i] = __uint_as_float(0x7fc00000);
            }
        __syncthreads();
        for (u32 i = threadIdx.x; i < TILE / 4; i += BLOCK_THREADS) {
            u32 &pair = reinterpret_cast<u32 *>(values)[i];
            pair &= ~((nan_bits(pair) >> 15) * 0xffff);
        }
        __syncthreads();
    }

    STB_DEVICE void write() {
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            float sum = total[r];
            sum += __shfl_xor_sync(ALL, sum, 1);
            sum += __shfl_xor_sync(ALL, sum, 2);
            if (row(r) >= rows)
                continue;
            const float inverse = 1.0f / sum;
            float *to = a.out + at(r);
#pragma unroll
            for (u32 n = 0; n < 2 * STEPS; ++n) {
                const u32 c = 8 * n + lane % 4 * 2;
                if (c < a.width)
                    *reinterpret_cast<float2 *>(to + c) = {out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse};
            }
        }
    }

    STB_DEVICE void run() {
        const KvRows keys(slot, a.kv_heads, a.width, a.layer, 0, head);
        const KvRows values(slot, a.kv_heads, a.width, a.layer, 1, head);
        load(0, keys, 0);
        copy_commit();
        load(1, values, 0);
        copy_commit();
        load_queries();
        for (u32 tile = 0; tile * KEYS < visible; ++tile) {
            float s[KEYS / 8][4];
            const u32 first = tile * KEYS;
            scores(s, next<false>(2 * tile, keys, tile), 2 * tile, first);
            weigh(s);
            u8 *v = next<true>(2 * tile + 1, values, tile);
            if (first + KEYS > common)
                poison(v, first);
            add(s, v);
        }
        copy_wait<0>();
        write();
    }
};

#define STB_ATTENTION_PREFILL(name, width, keys)                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK_THREADS)                                                \
        name(const __grid_constant__ AttentionPrefillParams a) {                                               \
        STB_DYNAMIC_SHARED(shared);                                                                            \
        Kernel<width, keys> kernel(a, shared);                                                                 \
        kernel.run();                                                                                          \
    }
// Widths up to 64, 96, 128 and 256; keys of a tile as `PREFILL` of attention/shape.rs.
STB_ATTENTION_PREFILL(attention_prefill_64, 64, 64)
STB_ATTENTION_PREFILL(attention_prefill_96, 96, 64)
STB_ATTENTION_PREFILL(attention_prefill_128, 128, 64)
STB_ATTENTION_PREFILL(attention_prefill_256, 256, 32)
