// Codecs: how the kernels read encodings whose rows are computed one by one (all but N:M). A lane loads
// *pieces*, which are some neighboring columns of a row.
//
// codec_*.cuh defines the codecs. A codec has PIECE (the columns of a piece), UNIT (the columns that share a
// scale, at most 32), Raw (a piece in registers), Scale, and these functions:
//   load(m, row, piece)           returns the piece; columns beyond the row are zero
//   scale(m, row, unit)           returns the scale of a unit of the row, zero beyond the row
//   weights4(raw, scale, u, i)    returns columns 4i to 4i + 3 of unit u of the piece, without multiplier(scale)
// If HAS_Q8 is true, it also multiplies activations in 8 bits:
//   column(k)                     returns the column of a unit whose activation is byte k of the unit's 32 bytes
//   dot(raw, scale, u, x, xs, xo) returns Σ weight · activation of a unit; xs is the scale of the activations
//                                 and xo their scaled sum
#pragma once
#include "common.cuh"

// Loads n words from `p`, which is a multiple of 4 bytes; words from number `there` on are zero. `whole` says
// that all words exist and that p is a multiple of 16 (of 8 for two words).
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

// Returns byte e of `bytes` as a float. The last place of 2²³ is 1, so a byte put into its mantissa is added.
STB_DEVICE float byte_to_f32(u32 bytes, u32 e, float offset) {
    return __uint_as_float(permute(bytes, 0x4b000000, 0x7440 + e)) - (8388608.0f + offset);
}
