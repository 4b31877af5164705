// The codecs of integer groups.
#pragma once
#include "codec.cuh"

// ---- Integer groups: ids 16 and 17 (spec/encodings.md §3) --------------------------------------------

// Codes of 1, 2, 4 and 8 bits have one bit plane, codes of 3 bits have two. A piece is 16 bytes of the wide
// plane, or a unit if that is more.
template <u32 BITS> struct Int {
    static constexpr bool HAS_Q8 = true;
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

    static STB_DEVICE Raw load(const PackedMatrix &m, u32 row, u32 piece) {
        Raw raw;
        const u32 first = piece * UNITS;
        const u32 there = m.units > first ? least(m.units - first, UNITS) : 0;
        const u8 *codes = m.payload + m.segments[0] + u64(row) * m.units * (4 * BITS);
        // A row of whole pieces starts at a multiple of 16 bytes.
        const bool whole = m.units % UNITS == 0 && there == UNITS;
        load_words(raw.wide, 0, WORDS, codes + first * (4 * WIDE), there * WIDE,
                   whole && (BITS != 3 || m.units % 4 == 0));
        if constexpr (BITS == 3)
            load_words(raw.narrow, 0, int(UNITS), codes + m.units * 8 + first * 4, there,
                       whole && m.units % 4 == 0);
        return raw;
    }
    static STB_DEVICE Scale scale(const PackedMatrix &m, u32 row, u32 unit) {
        if (unit >= m.units)
            return 0.0f;
        const u32 per = m.block / UNIT, groups = m.units / per;
        const u8 *scales = m.payload + m.segments[1];
        return f16_to_f32(__ldg(reinterpret_cast<const u16 *>(scales) + u64(row) * groups + unit / per));
    }
    // Returns the codes of columns 4i to 4i + 3. In a plane of width w, byte k of a unit holds the columns k,
    // k + 4w, …
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
