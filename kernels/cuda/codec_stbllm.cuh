// The codec of STBLLM.
#pragma once
#include "codec.cuh"

// ---- STBLLM: id 32 (§4) --------------------------------------------------------------------------------

struct Stbllm {
    static constexpr bool HAS_Q8 = true;
    static constexpr u32 UNIT = 32;
    static constexpr u32 PIECE = 64;
    // Bit c of each word belongs to column c of half a unit of 64.
    struct Raw {
        u32 low[2], high[2], negative[2], salient[2];
    };
    struct Scale {
        float s[5];
    };

    static STB_DEVICE Raw load(const PackedMatrix &m, u32 row, u32 piece) {
        Raw raw = {};
        if (piece >= m.units)
            return raw;
        const u64 at = u64(row) * m.units + piece;
        const uint4 states = __ldg(reinterpret_cast<const uint4 *>(m.payload + m.segments[1]) + at);
        const uint2 salient = __ldg(reinterpret_cast<const uint2 *>(m.payload + m.segments[0]) + piece);
        const u32 n = m.kind;
        const u8 *bytes = m.payload + m.segments[2] + at * n;
        u64 signs = 0;
        if (n == 4) {
            signs = __ldg(reinterpret_cast<const u32 *>(bytes));
        } else {
            for (u32 i = 0; i < n; ++i)
                signs |= u64(__ldg(bytes + i)) << 8 * i;
        }
        raw.low[0] = states.x, raw.low[1] = states.y, raw.high[0] = states.z, raw.high[1] = states.w;
        raw.salient[0] = salient.x, raw.salient[1] = salient.y;
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            raw.negative[half] = deposit(raw.low[half] | raw.high[half], signs >> half * 4 * n, n);
        return raw;
    }
    // Assigns the n signs of each of four groups to the kept weights of the group, in order. Each step takes
    // the lowest kept weight of all groups at once. (Only the last group can run out of weights earlier. The
    // borrow from it reaches groups that do not exist.)
    static STB_DEVICE u32 deposit(u32 kept, u64 signs, u32 n) {
        u32 fields = 0, negative = 0;
#pragma unroll
        for (u32 g = 0; g < 4; ++g)
            fields |= (u32(signs >> g * n) & ((1u << n) - 1)) << 8 * g;
        for (u32 k = 0; k < n; ++k) {
            const u32 lowest = kept & ~(kept - 0x01010101);
            negative |= lowest & (fields >> k & 0x01010101) * 255;
            kept ^= lowest;
        }
        return negative;
    }
    static STB_DEVICE Scale scale(const PackedMatrix &m, u32 row, u32 unit) {
        Scale scale = {};
        if (unit * UNIT >= m.cols)
            return scale;
        const u32 blocks = ceil_div(m.cols, m.block);
        const u64 at = (u64(row) * blocks + unit * UNIT / m.block) * 5;
        const u16 *s = reinterpret_cast<const u16 *>(m.payload + m.segments[3]) + at;
#pragma unroll
        for (u32 i = 0; i < 5; ++i)
            scale.s[i] = f16_to_f32(__ldg(s + i));
        return scale;
    }
    static STB_DEVICE float multiplier(const Scale &) { return 1.0f; }
    static STB_DEVICE float weight(const Raw &raw, const Scale &scale, u32 u, u32 c) {
        const bool low = raw.low[u] >> c & 1, high = raw.high[u] >> c & 1;
        const bool salient = raw.salient[u] >> c & 1;
        if (!low && !high)
            return 0.0f;
        const float plain = low ? (high ? scale.s[2] : scale.s[0]) : scale.s[1];
        const u32 sign = (raw.negative[u] >> c & 1) << 31;
        const float value = __uint_as_float(__float_as_uint(salient ? scale.s[3] : plain) ^ sign);
        return salient ? (low ? value + scale.s[4] : value - scale.s[4]) : value;
    }
    static STB_DEVICE float4 weights4(const Raw &raw, const Scale &scale, u32 u, u32 i) {
        return make_float4(weight(raw, scale, u, 4 * i), weight(raw, scale, u, 4 * i + 1),
                           weight(raw, scale, u, 4 * i + 2), weight(raw, scale, u, 4 * i + 3));
    }
    // Bits i, i + 8, i + 16, i + 24 of a word become bytes with one shift.
    static STB_DEVICE u32 column(u32 k) { return k / 4 + 8 * (k % 4); }
    // Computes a sum of planes, each of one magnitude, with 4 instructions for the signs and 3 per plane for
    // every 4 columns. Flipping all bits of x gives −x − 1, so the number of negative weights of a plane is
    // added to its sum.
    static STB_DEVICE float dot(const Raw &raw, const Scale &scale, u32 u, const u32 (&x)[8], float xs, float) {
        const u32 low = raw.low[u], high = raw.high[u], salient = raw.salient[u];
        const u32 negative = raw.negative[u];
        const u32 planes[3] = {low & ~high & ~salient, high & ~low & ~salient, low & high & ~salient};
        const u32 both = (low | high) & salient;
        i32 sums[3];
#pragma unroll
        for (u32 p = 0; p < 3; ++p)
            sums[p] = __popc(planes[p] & negative);
        i32 first = __popc(both & negative), second = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            const u32 mask = (negative >> i & 0x01010101) * 255;
            const i32 signed_x = i32(x[i] ^ mask);
#pragma unroll
            for (u32 p = 0; p < 3; ++p)
                sums[p] = __dp4a(i32(planes[p] >> i & 0x01010101), signed_x, sums[p]);
            // All rows have the same salient columns, and there are few of them.
            if (both != 0) {
                first = __dp4a(i32(both >> i & 0x01010101), signed_x, first);
                second = __dp4a(i32((both & low) >> i & 0x01010101), i32(x[i]), second);
                second -= __dp4a(i32((both & ~low) >> i & 0x01010101), i32(x[i]), 0);
            }
        }
        float sum = scale.s[0] * float(sums[0]) + scale.s[1] * float(sums[1]);
        sum = fmaf(scale.s[2], float(sums[2]), sum);
        sum = fmaf(scale.s[3], float(first), sum);
        return xs * fmaf(scale.s[4], float(second), sum);
    }
};
