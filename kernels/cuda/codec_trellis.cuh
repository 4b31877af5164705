// The codecs of trellis codes.
#pragma once
#include "codec.cuh"

// ---- Trellis codes: id 80 (spec/encodings.md §7) ---------------------------------------------------------

// In a step the window moves by BITS bits and makes WEIGHTS weights. A row has four steps of each stream, so a lane
// takes some bits of each of the streams in its piece; the lanes of neighboring rows take the others.
template <u32 BITS, u32 WEIGHTS> struct Trellis {
    static constexpr bool HAS_Q8 = true;
    static constexpr u32 UNIT = 32;
    static constexpr u32 PIECE = 32;
    static constexpr u32 STREAMS = PIECE / (4 * WEIGHTS);
    static constexpr u32 STREAM = 8 * BITS; // Bytes of a stream.
    static constexpr u32 ZERO = 64;

    // Bits of m.kind: those of a block scale, and the one for column factors.
    static constexpr u32 SCALE_BITS = 255, COL_FACTORS = 256;
    // The column factors follow the tables, which take at most 64 bytes, at the next multiple of 64.
    static constexpr u32 FACTORS = 64;

    struct Raw {
        u32 bits[STREAMS];          // From the first window of the row on.
        u32 tables[WEIGHTS][2][4];
        const u16 *factors;         // Of the columns of the piece; null if there are none.
        u32 columns;                // Of the piece that the matrix has.
    };
    using Scale = float;

    static STB_DEVICE Raw load(const PackedMatrix &m, u32 row, u32 piece) {
        Raw raw;
        const u32 *tables = reinterpret_cast<const u32 *>(m.payload + m.segments[0]);
#pragma unroll
        for (u32 i = 0; i < WEIGHTS * 8; ++i)
            raw.tables[i / 8][i / 4 % 2][i % 4] = __ldg(tables + i);
        raw.columns = m.cols - least(piece * PIECE, m.cols);
        raw.factors = nullptr;
        if (m.kind & COL_FACTORS)
            raw.factors = reinterpret_cast<const u16 *>(m.payload + m.segments[0] + FACTORS) + piece * PIECE;
        // m.units is the length of a tile in bytes.
        const u32 first = piece * STREAMS, streams = m.units / STREAM;
        const u8 *tile = m.payload + m.segments[3] + u64(row / 16) * m.units;
        const u32 bit = 4 * BITS * (row % 16);
#pragma unroll
        for (u32 s = 0; s < STREAMS; ++s) {
            raw.bits[s] = 0;
            if (first + s >= streams)
                continue;
            const u8 *stream = tile + u64(first + s) * STREAM;
            u32 word = 0;
#pragma unroll
            for (u32 k = 0; k < 4; ++k)
                word |= u32(__ldg(stream + (bit / 8 + k) % STREAM)) << 8 * k;
            raw.bits[s] = word >> bit % 8;
        }
        return raw;
    }
    static STB_DEVICE Scale scale(const PackedMatrix &m, u32 row, u32 unit) {
        if (unit * UNIT >= m.cols)
            return 0.0f;
        const u16 *rows = reinterpret_cast<const u16 *>(m.payload + m.segments[1]);
        const float scale = f16_to_f32(__ldg(rows + row));
        const u32 bits = m.kind & SCALE_BITS;
        if (bits == 0)
            return scale;
        const u32 blocks = ceil_div(m.cols, m.block), at = row / 16 * blocks + unit * UNIT / m.block;
        const u8 *codes = m.payload + m.segments[2] + u64(at) * 2 * bits;
        if (bits == 8)
            return scale * (float(__ldg(codes + row % 16) + 1) * (1.0f / 256.0f));
        const u32 code = __ldg(codes + row % 8) >> (row % 16 >= 8 ? 4 : 0) & 15;
        return scale * (float(code + 1) * (1.0f / 16.0f));
    }
    // Returns four nibbles of v, from bits 0, BITS, 2·BITS and 3·BITS on, side by side.
    static STB_DEVICE u32 nibbles(u32 v) {
        u32 all = 0;
#pragma unroll
        for (u32 j = 0; j < 4; ++j)
            all |= (v >> BITS * j & 15) << 4 * j;
        return all;
    }
    // Looks four nibbles up in a table of 16 bytes.
    static STB_DEVICE u32 look_up(const u32 (&table)[4], u32 four) {
        const u32 low = four & 0x7777;
        const u32 upper = permute(0x0000ff00, 0, four >> 3 & 0x1111); // All ones where the index is 8 or more.
        return (permute(table[0], table[1], low) & ~upper) | (permute(table[2], table[3], low) & upper);
    }
    // Returns the levels of columns 4i to 4i + 3. A level is at most 127, so that bytes do not carry.
    static STB_DEVICE u32 levels4(const Raw &raw, u32 i) {
        const u32 bits = raw.bits[i / WEIGHTS];
        const u32(&tables)[2][4] = raw.tables[i % WEIGHTS];
        return look_up(tables[0], nibbles(bits)) + look_up(tables[1], nibbles(bits ^ bits >> 4));
    }
    static STB_DEVICE float multiplier(Scale s) { return s; }
    static STB_DEVICE float4 weights4(const Raw &raw, Scale, u32, u32 i) {
        const u32 bytes = levels4(raw, i);
        const float zero = float(ZERO);
        return make_float4(byte_to_f32(bytes, 0, zero) * factor(raw, 4 * i),
                           byte_to_f32(bytes, 1, zero) * factor(raw, 4 * i + 1),
                           byte_to_f32(bytes, 2, zero) * factor(raw, 4 * i + 2),
                           byte_to_f32(bytes, 3, zero) * factor(raw, 4 * i + 3));
    }
    // Returns the factor of a column of the piece.
    static STB_DEVICE float factor(const Raw &raw, u32 column) {
        if (raw.factors == nullptr || column >= raw.columns)
            return 1.0f;
        return f16_to_f32(__ldg(raw.factors + column));
    }
    static STB_DEVICE u32 column(u32 k) { return k; }
    // Without column factors: a matrix that has them is multiplied with activations in f32.
    static STB_DEVICE float dot(const Raw &raw, Scale s, u32, const u32 (&x)[8], float xs, float xo) {
        i32 sum = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i)
            sum = __dp4a(i32(levels4(raw, i)), i32(x[i]), sum);
        return s * (xs * float(sum) - float(ZERO) * xo);
    }
};
using Trellis12 = Trellis<1, 2>;
using Trellis11 = Trellis<1, 1>;
using Trellis32 = Trellis<3, 2>;
using Trellis21 = Trellis<2, 1>;
using Trellis52 = Trellis<5, 2>;
using Trellis31 = Trellis<3, 1>;
using Trellis41 = Trellis<4, 1>;
