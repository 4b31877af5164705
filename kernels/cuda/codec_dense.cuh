// The codecs of dense matrices.
#pragma once
#include "codec.cuh"

// ---- Dense: ids 1 to 3 (§2) ----------------------------------------------------------------------------

template <class Type> struct Dense {
    static constexpr bool HAS_Q8 = false;
    static constexpr u32 PIECE = 16 / Type::BYTES;
    static constexpr u32 UNIT = PIECE;
    struct Raw {
        u32 words[4];
    };
    using Scale = float;

    static STB_DEVICE Raw load(const PackedMatrix &m, u32 row, u32 piece) {
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
    static STB_DEVICE Scale scale(const PackedMatrix &, u32, u32) { return 1.0f; }
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
