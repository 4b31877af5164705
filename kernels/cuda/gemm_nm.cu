// GEMM for the N:M encoding on sparse tensor cores. The module defines NM_N and NM_M.
//
// The weights are operand A of mma.sp.m16n8k32, expanded directly from the bytes of the file: 1:8, 1:4, 2:8 and 2:4 never
// keep more than two of four neighbors. Activations are operand B. A tile of 16 rows of the file is one m16 of the
// instruction, with row 2·(lane / 4) + h of the tile as row lane / 4 + 8·h of the fragment. So a lane's two rows are
// neighbors in every vector of codes and are read by one 16-bit load.
//
// The assignment of matrix columns to instruction columns is free, as long as both operands agree. For M = 4 it is the
// identity. For M = 8 the 64 columns of two k32 are pieces of eight, and k32 number s has pieces 2s, 2s + 1, 2s + 4 and
// 2s + 5: the two codes of a byte (quads q and q + 1 of a lane) are then columns 0..15 and 16..31 of the same k32.
// `ldmatrix` accepts any pieces of eight columns.
//
// Values: a register holds the two kept values of four columns. One byte permutation of {m, −m, 0} by a 16-bit selector
// computes it, where m is the f16 magnitude of the row and block (x + 1 for the stored code x, which is exact). Selectors
// come from tables in registers, again by byte permutations, four codes at a time (for 2:8 from a table of 256 words in
// shared memory). Row scales, 1 / 2^scale_bits and the scales of tokens are applied to the sums; column factors were
// applied to the activations. Metadata: every lane computes the indices of its own columns, and two shuffles within four
// lanes move them to the lane that has to supply them.
//
// Budget per lane: an mma.sp of A100-class tensor cores occupies a scheduler for 8 cycles (m16n8k32 has 4096 products of
// the dense shape, at 512 per cycle and scheduler), an integer instruction for 2. A warp issues TILES × NT mma.sp per k32
// and expands TILES fragments, so NT = 8 leaves 64 cycles for a fragment. Integer instructions of a fragment:
//     selectors of 4 values   1:8 7, 1:4 9, 2:4 19, 2:8 18 + 4 shared loads
//     4 values                8 (two permutations each; 2:8: 4)
//     metadata                3 + 1 shuffle
//     block scales            6 if there are any
// That is 18 (1:8), 20 (1:4), 31 (2:4) and 28 (2:8) integer instructions, 36 to 62 cycles: fewer than the tensor cores
// take, and beside them. Shared memory: ldmatrix reads 4 KiB per warp and k32 of 64 tokens, so 8 warps read 32 KiB in 256
// cycles, of 512 of the tensor cores. Device memory and L2 read packed weights, and each activation once per 512 rows.
// Roofline of 4096 × 4096 × 8192 tokens on an H100 (mma.sync at about 62 % of 989 · 2 sparse TFLOP/s): 275 GFLOP at 1.2
// PFLOP/s take 0.22 ms; 67 MB of x, 134 MB of y and 2 MB of weights take 0.07 ms.
#include "gemm_nm.cuh"

// Selector bytes of one f16, from {m, 0} and {−m, 0} in two registers.
struct Selectors {
    static constexpr u32 PLUS = 0x10, MINUS = 0x54, ZERO = 0x32;
};

// Four entries of a byte table, from code `first` on: field 0 is `low`, 1 `high`, 2 `indices` of the patterns.
constexpr STB_DEVICE u32 entries(u32 first, u32 half, u32 field) {
    u32 word = 0;
    for (u32 i = 0; i < 4; ++i) {
        const Pattern p = pattern<Selectors>(first + i, half);
        word |= (field == 0 ? p.low : field == 1 ? p.high : p.indices) << 8 * i;
    }
    return word;
}

// The tables with which a lane expands codes.
struct Expander {
    u32 t;
    // Tables for this lane's half of a group (M = 8), indexed by codes without the sign.
    u32 low[4], high[4], indices[4];
    const u32 *table;
    // Selectors and a mask for the exchange of indices.
    u32 keep, send, mask, order;

    STB_DEVICE explicit Expander(const u32 *table) : table(table) {
        t = threadIdx.x % 4;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            // 1:8 and 1:4 have eight codes (1:4 with its sign), 2:4 sixteen.
            const u32 first = N == 1 ? 4 * (i % 2) : 4 * i;
            const bool second = M == 8 && t % 2 == 1;
            low[i] = second ? entries(first, 1, 0) : entries(first, 0, 0);
            high[i] = second ? entries(first, 1, 1) : entries(first, 0, 1);
            indices[i] = second ? entries(first, 1, 2) : entries(first, 0, 2);
        }
        keep = t % 2 ? 0x7531 : 0x6420, send = t % 2 ? 0x6420 : 0x7531;
        mask = t % 2 ? 0xf0f0f0f0 : 0x0f0f0f0f;
        order = t / 2 ? 0x3726 : 0x5140;
    }

    // Computes the selectors of the four values of k32 number s of pair p, in the order of the registers, and returns
    // the indices in the order of the codes: [row, columns 0..15], [row, 16..31], [row + 1, 0..15], [row + 1, 16..31].
    // `codes` are the codes of the tile in the step, and `odd` says whether they are the second half of a chunk.
    STB_DEVICE u32 selectors(u32 (&to)[4], const u8 *codes, u32 odd, u32 p, u32 s) const {
        u32 lo, hi, found;
        if (N == 1 && M == 8) {
            const u32 x = rows(codes, p, 2 * s + t / 2), at = x & 0x7777;
            const u32 sign = top_bits(x) & 0x44444444;
            lo = permute(low[0], low[1], at) ^ sign;
            hi = permute(high[0], high[1], at) ^ sign;
            found = permute(indices[0], indices[1], at);
        } else if (N == 1 && M == 4) {
            const u32 x = rows(codes, p, t) >> 4 * s, minus = rows(codes, 2, t) >> (4 * p + 2 * s);
            const u32 at = (x & 0x0303) | (x << 2 & 0x3030) | (minus << 2 & 0x0404) |
                           (minus << 5 & 0x4040);
            lo = permute(low[0], low[1], at);
            hi = permute(high[0], high[1], at);
            found = permute(indices[0], indices[1], at);
        } else if (N == 2 && M == 4) {
            const u32 x = rows(codes, 2 * p + s, t), at = x & 0x7777, upper = top_bits(x);
            const u32 minus = rows(codes, 4, t) >> (4 * p + 2 * s);
            const u32 sign = permute(0x4400, 0, ((minus & 0x0303) | (minus & 0x0303) << 3) & 0x1111);
            auto find = [&](const u32(&table)[4]) {
                const u32 a = permute(table[0], table[1], at);
                return a ^ ((a ^ permute(table[2], table[3], at)) & upper);
            };
            lo = find(low) ^ sign;
            hi = find(high) ^ sign;
            found = find(indices);
        } else {
            const u32 lane = 2 * s + t / 2;
            // `first` has the codes of columns 0..15, `second` those of 16..31.
            const Sevens c(codes, odd, p, lane);
            const u32 half = t % 2 * 128;
            const u32 e[4] = {table[half + (c.first & 127)], table[half + (c.second & 127)],
                              table[half + (c.first >> 8)], table[half + (c.second >> 8)]};
            to[0] = e[0], to[2] = e[1], to[1] = e[2], to[3] = e[3];
            return permute(permute(e[0], e[1], 0x62), permute(e[2], e[3], 0x62), 0x5410);
        }
        to[0] = permute(lo, hi, 0x40);
        to[2] = permute(lo, hi, 0x51);
        to[1] = permute(lo, hi, 0x62);
        to[3] = permute(lo, hi, 0x73);
        return found;
    }

    // Returns the metadata of a pair of k32: lanes t = 0 and 1 get those of the first, 2 and 3 those of the second.
    STB_DEVICE u32 exchange(u32 first, u32 second) const {
        // Lanes with even t collect columns 0..15, lanes with odd t 16..31: four bits of their own and four of their
        // neighbor. The bytes are rows r and r + 1 of k32 0, then of k32 1.
        const u32 own = permute(first, second, keep);
        const u32 other = __shfl_xor_sync(ALL, permute(first, second, send), 1);
        const u32 both = (own & mask) | (other & ~mask);
        return permute(both, __shfl_xor_sync(ALL, both, 2), order);
    }
};

// The magnitudes of a lane's two rows, as operands of the permutation: {m, 0} and {−m, 0}.
struct Magnitudes {
    u32 plus[2], minus[2];

    STB_DEVICE Magnitudes() {
        plus[0] = plus[1] = 0x3c00, minus[0] = minus[1] = 0xbc00;
    }
    // Converts two scale codes x to x + 1, by way of the f16 1024 + x.
    STB_DEVICE explicit Magnitudes(u32 low, u32 high) {
        const u32 m = f16x2_add(low | high << 16 | 0x64006400, 0xe3fee3fe);
        plus[0] = m & 0xffff, plus[1] = m >> 16;
        minus[0] = plus[0] ^ 0x8000, minus[1] = plus[1] ^ 0x8000;
    }
};

struct F16Activations {
    static constexpr u32 PARTS = 1, SCALE_BYTES = 16;
    static constexpr bool TOKEN_SCALES = true;
};

template <u32 TILES, u32 NT> struct Kernel : Frame<F16Activations, TILES, NT> {
    using Base = Frame<F16Activations, TILES, NT>;
    using Base::bits, Base::lane, Base::warp;
    const u32 *table;

    STB_DEVICE Kernel(const GemmParams &a, u8 *shared) : Base(a), table(reinterpret_cast<u32 *>(shared)) {
        if constexpr (TABLE != 0) {
            const Pattern p = pattern<Selectors>(threadIdx.x % 128, threadIdx.x / 128);
            reinterpret_cast<u32 *>(shared)[threadIdx.x] = p.low | p.high << 8 | p.indices << 16;
        }
    }

    STB_DEVICE void run(u8 *stages) const {
        const Expander expand(table);
        Base::run(stages, [&](typename Base::Sums &sums, const u8 *stage, u32 step) {
#pragma unroll 1
            for (u32 p = 0; p < 2; ++p)
                multiply(sums, stage, step % 2, p, expand);
        });
    }

    STB_DEVICE Magnitudes magnitudes(const u8 *stage, u32 tile, u32 sub) const {
        if (bits == 0)
            return Magnitudes();
        const u8 *at = this->scale_codes(stage, 0, tile, sub);
        if (bits == 8) {
            const u32 x = *reinterpret_cast<const u16 *>(at + lane / 4 * 2);
            return Magnitudes(x & 255, x >> 8);
        }
        const u32 x = this->two_nibbles(at);
        return Magnitudes(x & 15, x >> 8 & 15);
    }

    STB_DEVICE void multiply(typename Base::Sums &sums, const u8 *stage, u32 odd, u32 p,
                             const Expander &expand) const {
        u32 values[TILES][2][4], metadata[TILES];
#pragma unroll
        for (u32 i = 0; i < TILES; ++i) {
            const u32 tile = warp * TILES + i;
            const u8 *codes = this->codes(stage, 0, tile);
            const Magnitudes m[2] = {magnitudes(stage, tile, 2 * p), magnitudes(stage, tile, 2 * p + 1)};
            u32 found[2];
#pragma unroll
            for (u32 s = 0; s < 2; ++s) {
                u32 selectors[4];
                found[s] = expand.selectors(selectors, codes, odd, p, s);
#pragma unroll
                for (u32 k = 0; k < 4; ++k) {
                    // Each magnitude is for 32 columns, which are one k32 for M = 4 and half of each for M = 8.
                    const Magnitudes &of = m[M == 4 ? s : k / 2];
                    values[i][s][k] = permute(of.plus[k % 2], of.minus[k % 2], selectors[k]);
                }
            }
            metadata[i] = expand.exchange(found[0], found[1]);
        }
        // Matrix k of ldmatrix is a piece of eight columns.
        const u32 k = lane / 8, row = lane % 8;
#pragma unroll
        for (u32 j = 0; j < NT; ++j) {
            u32 b[2][4];
#pragma unroll
            for (u32 s = 0; s < 2; ++s) {
                const u32 piece = 8 * p + (M == 4 ? 4 * s + k : 2 * s + 4 * (k / 2) + k % 2);
                load_matrix_x4(b[s], stage + place(8 * j + row, piece));
            }
#pragma unroll
            for (u32 i = 0; i < TILES; ++i)
                mma_sp_f16<0>(sums[i][j], values[i][0], b[0], metadata[i]);
#pragma unroll
            for (u32 i = 0; i < TILES; ++i)
                mma_sp_f16<1>(sums[i][j], values[i][1], b[1], metadata[i]);
        }
    }
};

// 512 rows × 64 tokens, 256 × 64, 256 × 16.
STB_GEMM(gemm_512x64, 4, 8)
STB_GEMM(gemm_256x64, 2, 8)
STB_GEMM(gemm_256x16, 2, 2)
