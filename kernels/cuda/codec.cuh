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
