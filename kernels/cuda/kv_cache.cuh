// The KV cache, shared by the attention kernels: -DKV=KvF16 and so on.
//
// The cache of a sequence is one allocation. For each layer it holds the keys, then the values: [kv_heads][capacity]
// rows of 8-element chunks, for KvQ8 followed by [kv_heads][capacity] scales, padded to a multiple of 16 bytes.
#pragma once
#include "common.cuh"

// The cache of a token's sequence, and the position of the token. Fields as `KvSlot` of attention/kv_cache.rs.
struct KvSlot {
    u8 *cache;
    u32 capacity, position;
};

// Elements are read and written 8 at a time.
constexpr u32 CHUNK = 8;

struct KvF32 {
    static constexpr u32 BYTES = 4;
    static constexpr bool SCALED = false;
    static STB_DEVICE void get(float (&v)[CHUNK], const u8 *p) {
        const float4 a = *reinterpret_cast<const float4 *>(p), b = *reinterpret_cast<const float4 *>(p + 16);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
    static STB_DEVICE void put(u8 *p, float v, float) { *reinterpret_cast<float *>(p) = v; }
};
struct KvF16 {
    static constexpr u32 BYTES = 2;
    static constexpr bool SCALED = false;
    static STB_DEVICE void get(float (&v)[CHUNK], const u8 *p) {
        const uint4 a = *reinterpret_cast<const uint4 *>(p);
        const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i)
            v[i] = f16_to_f32(u16(words[i / 2] >> 16 * (i % 2)));
    }
    // NaN stays NaN.
    static STB_DEVICE float saturated(float v) {
        return v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v;
    }
    static STB_DEVICE void put(u8 *p, float v, float) {
        *reinterpret_cast<u16 *>(p) = f32_to_f16(saturated(v));
    }
};
// One scale per row. A row with a number that is not finite has the scale NaN.
struct KvQ8 {
    static constexpr u32 BYTES = 1;
    static constexpr bool SCALED = true;
    static STB_DEVICE void get(float (&v)[CHUNK], const u8 *p) {
        const uint2 a = *reinterpret_cast<const uint2 *>(p);
#pragma unroll
        for (u32 i = 0; i < CHUNK; ++i)
            v[i] = __uint_as_float(permute((i < 4 ? a.x : a.y) ^ 0x80808080, 0x4b000000, 0x7440 + i % 4)) -
                   8388736.0f;
    }
    static STB_DEVICE void put(u8 *p, float v, float inverse) {
        *reinterpret_cast<i8 *>(p) = v == v ? i8(f32_to_s8(v * inverse)) : i8(0);
    }
};

STB_DEVICE u32 row_bytes(u32 width) { return ceil_div(width, CHUNK) * CHUNK * KV::BYTES; }

// The keys of a head in a layer, or its values if `which` is 1.
struct KvRows {
    u8 *rows;
    float *scales;
    u32 stride;
    STB_DEVICE KvRows(const KvSlot &slot, u32 kv_heads, u32 width, u32 layer, u32 which, u32 head)
        : stride(row_bytes(width)) {
        const u64 count = u64(kv_heads) * slot.capacity;
        const u64 bytes = (count * (stride + (KV::SCALED ? 4 : 0)) + 15) / 16 * 16;
        u8 *base = slot.cache + (u64(layer) * 2 + which) * bytes;
        rows = base + u64(head) * slot.capacity * stride;
        scales = reinterpret_cast<float *>(base + count * stride) + u64(head) * slot.capacity;
    }
    STB_DEVICE const u8 *chunk(u32 row, u32 c) const {
        return rows + u64(row) * stride + c * CHUNK * KV::BYTES;
    }
};
