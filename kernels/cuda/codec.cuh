// Encodings whose rows are computed one by one (all but the joint N:M codes): how a lane loads a
// *piece*, some neighboring columns of a row, and what it multiplies.
//
// A codec has PIECE (columns), UNIT (columns that share a scale, at most 32), Raw (a piece in
// registers), Scale, and:
//   load(m, row, piece)           the piece, zero beyond the row
//   scale(m, row, unit)           the scale of a unit of the row, zero beyond it
//   weights4(raw, scale, u, i)    of unit u of the piece, columns 4i to 4i + 3, up to multiplier(scale)
// and for activations rounded to 8 bits, if ROUNDED:
//   column(k)                     which column of a unit is byte k of its 32 activations
//   dot(raw, scale, u, x, xs, xo) Σ weight · activation of a unit; xs the scale of the activations, xo
//                                 their sum, scaled
#pragma once
#include "common.cuh"

// Words from `p`, which is a multiple of 4 bytes: N, or as many as there are, then zero. `whole`: all are
// there and p is a multiple of 16 (8 for two).
template <int N> STB_DEVICE void load_words(u32 (&to)[N], int at, int n, const u8 *p, u32 there, bool whole) {
    if (whole) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            if (i >= n)
                break;
            if (n - i >= 4) {
                const uint4 v = __ldg(reinterpret_cast<const uint4 *>(p + 4 * i));
                to[at + i] = v.x, to[at + i + 1] = v.y, to[at + i + 2] = v.z, to[at + i + 3] = v.w;
            } else {
                const uint2 v = __ldg(reinterpret_cast<const uint2 *>(p + 4 * i));
                to[at + i] = v.x, to[at + i + 1] = v.y;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i < n)
                to[at + i] = u32(i) < there ? __ldg(reinterpret_cast<const u32 *>(p + 4 * i)) : 0;
    }
}

// Byte e of `bytes` as a float: 2²³ has its last place at 1, so that a byte put below it is added.
STB_DEVICE float byte_to_f32(u32 bytes, u32 e, float offset) {
    return __uint_as_float(permute(bytes, 0x4b000000, 0x7440 + e)) - (8388608.0f + offset);
}

// ---- Integer groups: ids 16 and 17 (spec/encodings.md §3) --------------------------------------------

// Bits 1, 2, 4 and 8 are one plane, 3 bits two. A piece is what 16 bytes of the wide plane hold, or a
// unit if that is more.
template <u32 BITS> struct Int {
    static constexpr bool ROUNDED = true;
    static constexpr u32 UNIT = 32;
    static constexpr u32 WIDE = BITS == 3 ? 2 : BITS;
    static constexpr u32 PIECE = BITS == 1 ? 128 : WIDE == 2 ? 64 : 32;
    static constexpr u32 UNITS = PIECE / UNIT;
    static constexpr int WORDS = int(UNITS * WIDE);
    // A weight is FACTOR · code − OFFSET; codes of 8 bits are signed.
    static constexpr u32 FACTOR = BITS < 4 ? 2 : 1;
    static constexpr int OFFSET = BITS == 8 ? 0 : BITS == 4 ? 8 : (1 << BITS) - 1;

    struct Raw {
        u32 wide[WORDS];
        u32 narrow[BITS == 3 ? int(UNITS) : 1];
    };
    using Scale = float;

    static STB_DEVICE Raw load(const Matrix &m, u32 row, u32 piece) {
        Raw raw;
        const u32 first = piece * UNITS;
        const u32 there = m.units > first ? least(m.units - first, UNITS) : 0;
        const u8 *codes = m.payload + m.segments[0] + u64(row) * m.units * (4 * BITS);
        // Rows start at multiples of 16 if they have whole pieces.
        const bool whole = m.units % UNITS == 0 && there == UNITS;
        load_words(raw.wide, 0, WORDS, codes + first * (4 * WIDE), there * WIDE,
                   whole && (BITS != 3 || m.units % 4 == 0));
        if constexpr (BITS == 3)
            load_words(raw.narrow, 0, int(UNITS), codes + m.units * 8 + first * 4, there,
                       whole && m.units % 4 == 0);
        return raw;
    }
    static STB_DEVICE Scale scale(const Matrix &m, u32 row, u32 unit) {
        if (unit >= m.units)
            return 0.0f;
        const u32 per = m.block / UNIT, groups = m.units / per;
        const u8 *scales = m.payload + m.segments[1];
        return f16_to_f32(__ldg(reinterpret_cast<const u16 *>(scales) + u64(row) * groups + unit / per));
    }
    // The codes of columns 4i to 4i + 3: in a plane of width w, byte k of a unit holds the columns k, k + 4w, …
    static STB_DEVICE u32 codes4(const Raw &raw, u32 u, u32 i) {
        if constexpr (BITS == 8)
            return raw.wide[u * 8 + i];
        if constexpr (BITS == 4)
            return raw.wide[u * 4 + i % 4] >> 4 * (i / 4) & 0x0f0f0f0f;
        if constexpr (BITS == 1)
            return raw.wide[u] >> i & 0x01010101;
        u32 codes = raw.wide[u * 2 + i % 2] >> 2 * (i / 2) & 0x03030303;
        if constexpr (BITS == 3)
            codes |= (raw.narrow[u] >> i & 0x01010101) << 2;
        return codes;
    }
    static STB_DEVICE float multiplier(Scale s) { return s; }
    static STB_DEVICE float4 weights4(const Raw &raw, Scale, u32 u, u32 i) {
        u32 bytes = codes4(raw, u, i) * FACTOR;
        float offset = float(OFFSET);
        if constexpr (BITS == 8)
            bytes ^= 0x80808080, offset = 128.0f;
        return make_float4(byte_to_f32(bytes, 0, offset), byte_to_f32(bytes, 1, offset),
                           byte_to_f32(bytes, 2, offset), byte_to_f32(bytes, 3, offset));
    }
    static STB_DEVICE u32 column(u32 k) { return k; }
    static STB_DEVICE float dot(const Raw &raw, Scale s, u32 u, const u32 (&x)[8], float xs, float xo) {
        i32 sum = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            sum = __dp4a(i32(codes4(raw, u, i)), i32(x[i]), sum);
        return s * (float(FACTOR) * xs * float(sum) - float(OFFSET) * xo);
    }
};
using Int1 = Int<1>;
using Int2 = Int<2>;
using Int3 = Int<3>;
using Int4 = Int<4>;
using Int8 = Int<8>;

// ---- Dense: ids 1 to 3 (§2) ----------------------------------------------------------------------------

template <class Type> struct Dense {
    static constexpr bool ROUNDED = false;
    static constexpr u32 PIECE = 16 / Type::BYTES;
    static constexpr u32 UNIT = PIECE;
    struct Raw {
        u32 words[4];
    };
    using Scale = float;

    static STB_DEVICE Raw load(const Matrix &m, u32 row, u32 piece) {
        Raw raw = {{0, 0, 0, 0}};
        const u32 first = piece * PIECE;
        const u32 there = m.cols > first ? least(m.cols - first, PIECE) : 0;
        const u8 *data = m.payload + m.segments[0] + (u64(row) * m.cols + first) * Type::BYTES;
        if (m.cols % PIECE == 0 && there == PIECE) {
            load_words(raw.words, 0, 4, data, 4, true);
        } else {
#pragma unroll
            for (u32 i = 0; i < PIECE; ++i)
                if (i < there)
                    Type::insert(raw.words, i, data);
        }
        return raw;
    }
    static STB_DEVICE Scale scale(const Matrix &, u32, u32) { return 1.0f; }
    static STB_DEVICE float multiplier(Scale) { return 1.0f; }
    static STB_DEVICE float4 weights4(const Raw &raw, Scale, u32, u32 i) {
        return make_float4(Type::get(raw.words, 4 * i), Type::get(raw.words, 4 * i + 1),
                           Type::get(raw.words, 4 * i + 2), Type::get(raw.words, 4 * i + 3));
    }
};
struct TypeF32 {
    static constexpr u32 BYTES = 4;
    static STB_DEVICE void insert(u32 (&words)[4], u32 i, const u8 *data) {
        words[i] = __ldg(reinterpret_cast<const u32 *>(data) + i);
    }
    static STB_DEVICE float get(const u32 (&words)[4], u32 i) { return __uint_as_float(words[i]); }
};
struct Type16 {
    static constexpr u32 BYTES = 2;
    static STB_DEVICE void insert(u32 (&words)[4], u32 i, const u8 *data) {
        words[i / 2] |= u32(__ldg(reinterpret_cast<const u16 *>(data) + i)) << 16 * (i % 2);
    }
};
struct TypeF16 : Type16 {
    static STB_DEVICE float get(const u32 (&words)[4], u32 i) {
        return f16_to_f32(u16(words[i / 2] >> 16 * (i % 2)));
    }
};
struct TypeBf16 : Type16 {
    static STB_DEVICE float get(const u32 (&words)[4], u32 i) {
        return bf16_to_f32(u16(words[i / 2] >> 16 * (i % 2)));
    }
};
using DenseF32 = Dense<TypeF32>;
using DenseF16 = Dense<TypeF16>;
using DenseBf16 = Dense<TypeBf16>;

// ---- STBLLM: id 32 (§4) --------------------------------------------------------------------------------

struct Stbllm {
    static constexpr bool ROUNDED = true;
    static constexpr u32 UNIT = 32;
    static constexpr u32 PIECE = 64;
    // Bit c of each word belongs to column c of half a unit of 64.
    struct Raw {
        u32 low[2], high[2], negative[2], salient[2];
    };
    struct Scale {
        float s[5];
    };

    static STB_DEVICE Raw load(const Matrix &m, u32 row, u32 piece) {
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
    // Puts the n signs of each of four groups at the group's kept weights, in order: takes the lowest
    // kept weight of all groups at once. (Only a last group can run out of weights earlier; the borrow
    // from it reaches groups that do not exist.)
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
    static STB_DEVICE Scale scale(const Matrix &m, u32 row, u32 unit) {
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
    // A sum of planes, each of one magnitude: per 4 columns 4 instructions for the signs and 3 per plane. x
    // with all bits changed is −x − 1, so that the negative weights of a plane are added once more.
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
            // Salient columns are the same in all rows, and few.
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
