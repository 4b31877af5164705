// RoPE with the store to the KV cache, and attention of a few tokens: -DKV=KvF16 and so on.
//
// A block computes some query heads of one key-value head over a split of SPLIT_KEYS keys (flash decoding). The last
// block of a token and head adds the splits in their order. Keys and values are read once for all heads of a block.
// With one head that is 2 · 2 bytes per 4 operations, so memory bandwidth is the limit.
#include "kv_cache.cuh"

// Fields as `RopeParams` of attention/shape.rs.
struct RopeParams {
    // [tokens][heads · width], rotated in place.
    float *q;
    // [tokens][kv_heads · width].
    const float *k, *v;
    // Radians per position of each pair.
    const float *frequencies;
    const KvSlot *slots;
    u32 heads, kv_heads, width, layer;
    // Whether the elements of a pair are neighbors. Otherwise they are half a head apart.
    u32 interleaved, padding;
};

// Fields as `AttentionDecodeParams` of attention/shape.rs.
struct AttentionDecodeParams {
    // [tokens][heads · width].
    const float *q;
    float *out;
    const KvSlot *slots;
    // For each token and block of heads, [splits][heads of a block][2 + width]: the largest score, the sum of
    // weights, and the weighted sum of values.
    float *partial;
    u32 *arrived;
    u32 heads, kv_heads, width, layer;
    u32 splits;
    float scale;
};

constexpr u32 BLOCK_THREADS = 128;
// Keys of a split.
constexpr u32 SPLIT_KEYS = 256;
constexpr u32 LANES_PER_KEY = 8;

// Returns element i of a row after RoPE.
STB_DEVICE float rotated(const float *x, u32 i, u32 width, const RopeParams &a, float position) {
    const u32 half = width / 2;
    const u32 pair = a.interleaved ? i / 2 : i % half;
    const bool second = a.interleaved ? i % 2 : i >= half;
    const u32 low = a.interleaved ? 2 * pair : pair, high = a.interleaved ? low + 1 : pair + half;
    const float angle = position * a.frequencies[pair];
    const float c = cosf(angle), s = sinf(angle), u = x[low], v = x[high];
    return second ? v * c + u * s : u * c - v * s;
}

// Converts the scores of a split to weights, and computes the largest score and the sum of weights of each head.
STB_DEVICE void weigh(float *scores, float *most, float *total, u32 heads, u32 keys) {
    for (u32 h = threadIdx.x / WARP; h < heads; h += BLOCK_THREADS / WARP) {
        float *s = scores + h * SPLIT_KEYS;
        float largest = __uint_as_float(0xff800000), sum = 0.0f;
        for (u32 i = threadIdx.x % WARP; i < keys; i += WARP)
            largest = fmaxf(largest, s[i]);
#pragma unroll
        for (int by = 16; by > 0; by >>= 1)
            largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, by));
        for (u32 i = threadIdx.x % WARP; i < keys; i += WARP) {
            s[i] = expf(s[i] - largest);
            sum += s[i];
        }
        sum = warp_sum(sum);
        if (threadIdx.x % WARP == 0)
            most[h] = largest, total[h] = sum;
    }
}

// Computes up to HEADS query heads of a key-value head.
template <u32 HEADS> STB_DEVICE void attention_decode(const AttentionDecodeParams &a) {
    STB_DYNAMIC_SHARED(shared);
    __shared__ u32 last;
    __shared__ float most[HEADS], total[HEADS];
    const u32 split = blockIdx.x, token = blockIdx.z;
    const u32 group = a.heads / a.kv_heads, parts = ceil_div(group, HEADS);
    const u32 head = blockIdx.y / parts, first = blockIdx.y % parts * HEADS;
    const u32 heads = least(HEADS, group - first);
    const KvSlot slot = a.slots[token];
    const u32 visible = slot.position + 1, active = ceil_div(visible, SPLIT_KEYS);
    if (split >= active)
        return;
    const u32 from = split * SPLIT_KEYS, keys = least(SPLIT_KEYS, visible - from);
    const u32 width = a.width, chunks = ceil_div(width, CHUNK), padded = chunks * CHUNK;
    // Queries, and later sums, [HEADS][padded]; scores, [HEADS][SPLIT_KEYS].
    float *q = reinterpret_cast<float *>(shared), *scores = q + HEADS * padded;
    const u64 row = u64(token) * a.heads * width + u64(head * group + first) * width;
    for (u32 i = threadIdx.x; i < HEADS * padded; i += BLOCK_THREADS) {
        const u32 h = i / padded, d = i % padded;
        q[i] = h < heads && d < width ? a.q[row + u64(h) * width + d] * a.scale : 0.0f;
    }
    __syncthreads();

    const KvRows k(slot, a.kv_heads, width, a.layer, 0, head);
    const u32 lane = threadIdx.x % LANES_PER_KEY;
    // All threads of a warp take the same number of rounds, for the shuffles.
    for (u32 base = 0; base < keys; base += BLOCK_THREADS / LANES_PER_KEY) {
        const u32 key = base + threadIdx.x / LANES_PER_KEY;
        float sum[HEADS] = {};
        if (key < keys) {
            for (u32 c = lane; c < chunks; c += LANES_PER_KEY) {
                float v[CHUNK];
                KV::get(v, k.chunk(from + key, c));
#pragma unroll
                for (u32 h = 0; h < HEADS; ++h) {
                    const float4 *x = reinterpret_cast<const float4 *>(q + h * padded + c * CHUNK);
                    const float4 low = x[0], high = x[1];
                    sum[h] += v[0] * low.x + v[1] * low.y + v[2] * low.z + v[3] * low.w +
                              (v[4] * high.x + v[5] * high.y + v[6] * high.z + v[7] * high.w);
                }
            }
        }
        const float scale = KV::SCALED && key < keys ? k.scales[from + key] : 1.0f;
#pragma unroll
        for (u32 h = 0; h < HEADS; ++h) {
            float s = sum[h];
#pragma unroll
            for (u32 by = LANES_PER_KEY / 2; by > 0; by /= 2)
                s += __shfl_xor_sync(ALL, s, int(by));
            if (lane == 0 && key < keys)
                scores[h * SPLIT_KEYS + key] = s * scale;
        }
    }
    __syncthreads();

    weigh(scores, most, total, heads, keys);
    for (u32 i = threadIdx.x; i < HEADS * padded; i += BLOCK_THREADS)
        q[i] = 0.0f;
    __syncthreads();

    // A thread sums one chunk of every `groups`-th value. The sums of the groups are then added in order.
    const KvRows v(slot, a.kv_heads, width, a.layer, 1, head);
    const u32 groups = BLOCK_THREADS / chunks, mine = threadIdx.x / chunks, c = threadIdx.x % chunks;
    float acc[HEADS][CHUNK] = {};
    if (mine < groups) {
        for (u32 key = mine; key < keys; key += groups) {
            float x[CHUNK];
            KV::get(x, v.chunk(from + key, c));
            const float scale = KV::SCALED ? v.scales[from + key] : 1.0f;
#pragma unroll
            for (u32 h = 0; h < HEADS; ++h) {
                const float w = h < heads ? scores[h * SPLIT_KEYS + key] * scale : 0.0f;
#pragma unroll
                for (u32 i = 0; i < CHUNK; ++i)
                    acc[h][i] = fmaf(w, x[i], acc[h][i]);
            }
        }
    }
    for (u32 g = 0; g < groups; ++g) {
        if (mine == g)
#pragma unroll
            for (u32 h = 0; h < HEADS; ++h)
#pragma unroll
                for (u32 i = 0; i < CHUNK; ++i)
                    q[h * padded + c * CHUNK + i] += acc[h][i];
        __syncthreads();
    }

    if (active == 1) {
        for (u32 i = threadIdx.x; i < heads * width; i += BLOCK_THREADS)
            a.out[row + i] = q[i / width * padded + i % width] / total[i / width];
        return;
    }
    const u32 place = token * gridDim.y + blockIdx.y, stride = HEADS * (2 + width);
    float *partial = a.partial + u64(place) * a.splits * stride;
    float *own = partial + u64(split) * stride;
    for (u32 i = threadIdx.x; i < heads * width; i += BLOCK_THREADS)
        __stcg(&own[i / width * (2 + width) + 2 + i % width], q[i / width * padded + i % width]);
    if (threadIdx.x < heads) {
        __stcg(&own[threadIdx.x * (2 + width)], most[threadIdx.x]);
        __stcg(&own[threadIdx.x * (2 + width) + 1], total[threadIdx.x]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&a.arrived[place], 1u) + 1 == active;
        if (last)
            a.arrived[place] = 0;
    }
    __syncthreads();
    if (last == 0)
        return;
    __threadfence();
    for (u32 i = threadIdx.x; i < heads * width; i += BLOCK_THREADS) {
        const u32 h = i / width;
        float largest = __uint_as_float(0xff800000);
        for (u32 s = 0; s < active; ++s)
            largest = fmaxf(largest, __ldcg(&partial[u64(s) * stride + h * (2 + width)]));
        float sum = 0.0f, weight = 0.0f;
        for (u32 s = 0; s < active; ++s) {
            const float *of = partial + u64(s) * stride + h * (2 + width);
            const float share = expf(__ldcg(of) - largest);
            weight = fmaf(share, __ldcg(of + 1), weight);
            sum = fmaf(share, __ldcg(of + 2 + i % width), sum);
        }
        a.out[row + i] = sum / weight;
    }
}

extern "C" {
// One warp per token and head: query heads, then key heads, then value heads.
__global__ void __launch_bounds__(WARP) rope_kv(const __grid_constant__ RopeParams a) {
    const u32 token = blockIdx.y, lane = threadIdx.x, width = a.width;
    const KvSlot slot = a.slots[token];
    const float position = float(slot.position);
    u32 head = blockIdx.x;
    if (head < a.heads) {
        float *q = a.q + u64(token) * a.heads * width + u64(head) * width;
        const u32 half = width / 2;
        for (u32 pair = lane; pair < half; pair += WARP) {
            const u32 low = a.interleaved ? 2 * pair : pair;
            const u32 high = a.interleaved ? low + 1 : pair + half;
            const float u = rotated(q, low, width, a, position);
            const float v = rotated(q, high, width, a, position);
            q[low] = u, q[high] = v;
        }
        return;
    }
    head -= a.heads;
    const u32 which = head / a.kv_heads;
    head %= a.kv_heads;
    const float *from = (which == 0 ? a.k : a.v) + u64(token) * a.kv_heads * width + u64(head) * width;
    const KvRows rows(slot, a.kv_heads, width, a.layer, which, head);
    u8 *to = rows.rows + u64(slot.position) * rows.stride;
    float inverse = 1.0f;
    if constexpr (KV::SCALED) {
        float most = 0.0f;
        bool poisoned = false;
        for (u32 i = lane; i < width; i += WARP) {
            const float v = which == 0 ? rotated(from, i, width, a, position) : from[i];
            most = fmaxf(most, fabsf(v));
            poisoned |= !(fabsf(v) <= 3.4028235e38f);
        }
#pragma unroll
        for (int by = 16; by > 0; by >>= 1)
            most = fmaxf(most, __shfl_xor_sync(ALL, most, by));
        poisoned = __any_sync(ALL, poisoned);
        // A row so small that the inverse overflows counts as zero.
        inverse = 127.0f / most;
        if (poisoned || !(inverse < 3.4028235e38f))
            inverse = 0.0f;
        if (lane == 0)
            rows.scales[slot.position] = poisoned ? __uint_as_float(0x7fc00000) : most / 127.0f;
    }
    for (u32 i = lane; i < width; i += WARP) {
        const float v = which == 0 ? rotated(from, i, width, a, position) : from[i];
        KV::put(to + i * KV::BYTES, v, inverse);
    }
}
__global__ void __launch_bounds__(BLOCK_THREADS) attention_decode_1(const __grid_constant__ AttentionDecodeParams a) {
    attention_decode<1>(a);
}
__global__ void __launch_bounds__(BLOCK_THREADS) attention_decode_4(const __grid_constant__ AttentionDecodeParams a) {
    attention_decode<4>(a);
}
__global__ void __launch_bounds__(BLOCK_THREADS) attention_decode_8(const __grid_constant__ AttentionDecodeParams a) {
    attention_decode<8>(a);
}
}
