// GEMM for the N:M encoding with activations in 8 bits, on sparse tensor cores. The module defines NM_N and NM_M.
// This is gemm_nm.cu with mma.sp.m16n8k64 on bytes, which has twice the rate; read that file first.
//
// Weights are exact: ±1, or ±(x + 1) for a scale code x of 4 bits. (Scale codes of 8 bits do not fit, and
// encoding/nm.rs chooses gemm_nm.cu.) Activations have a scale per token and Q8_COLS columns, within which sums are
// integers in s32. The sums start at MAGIC, so that their bits are a float already: one FADD and one FFMA per result
// and block, and no conversion. No sum exceeds the 2^22 that MAGIC has room for: 16 · 127 · 128 < 2^18.
//
// Columns: for M = 8 the order of columns is that of the matrix. k64 number p of a part of 128 columns has quads 2p
// and 2p + 1, and a register of a lane is one group, so one code determines all four values. For M = 4 a register has
// two groups, which are the lane's own in quads 4p to 4p + 3, so that the codes of a k64 are one 16-bit load (two for
// 2:4) and the signs another. `gemm_prepare_q8` writes this order: 32s + 8t + 4h + e for column 16(2s + h) + 4t + e.
// Values: one permutation of the bytes of {m, 0} and {−m, 0} gives four values. Both rows of a lane share the tables,
// and the selectors of the second row have one more bit set. Metadata: each of four lanes has a byte per row and half;
// two shuffles transpose them.
//
// All of A for Q8_COLS columns is expanded first, TILES · 4 k64 of 5 registers each, so that s32 sums exist for one
// column of tiles at a time only. With s32 sums for all results beside the f32 sums, blocks of 512 × 64 would not fit
// the registers. Blocks of half the size would double the reads of shared memory or the expansions.
//
// Budget of a 16 × 64 fragment for 64 tokens, for gemm_512x64 as compiled for sm_80, with block scales. The limit is 8
// mma.sp of 8 cycles, 64 cycles (A100). Instructions, of which a scheduler issues one per cycle:
//                                   1:8   1:4   2:8   2:4
//     mma.sp                          8     8     8     8
//     FADD, FFMA (4 / 4 k64 each)    16    16    16    16
//     integers, on the ALU           29    32    31    49
//     integers, with the FFMA         5     9     8    14
//     shared memory, shuffles         8     8    13     9
//     all                            66    73    76    96
// So instruction issue is the bound, at 97, 87, 84 and 67 % of the mma.sp rate at best. The ALU comes next, with 2
// cycles per instruction (58 to 98 cycles). Scales for 512 columns would save 8 instructions, but A would not fit the
// registers. Shared memory: ldmatrix takes 32 cycles for four schedulers, codes and shuffles 24. 2:8 also reads its
// table four times, where 32 lanes hit a bank 3 to 4 times, 56 cycles: shared memory is its bound, at about 112 cycles,
// as it is in f16. gemm_nm.cu takes 128 cycles of mma.sp for the same columns (208 for 2:8), so this kernel is at best
// 1.9, 1.7, 1.8 and 1.3 times as fast on an A100. On an H100, where 8 mma.sp take about 52 of these cycles, it is 1.6
// (1:8), 1.4 (1:4) and 1.1 (2:4) times as fast.
// Roofline of 4096 × 4096 × 8192 tokens on an H100: 275 GFLOP at 62 % of 3958 sparse TOP/s take 0.11 ms, and 0.14 ms at
// the bound of 1:8; 134 MB of y and 34 MB of x take 0.05 ms.
#include "gemm_nm.cuh"

// Selector nibbles of one value, from {m of the first row, m of the second row, 0, 0} and {−m, −m, 0, 0}. These select
// for the first row; exclusive-or with SECOND makes them select for the second.
struct Selectors {
    static constexpr u32 PLUS = 0, MINUS = 4, ZERO = 2;
};
constexpr u32 SECOND = 0x11, NEGATIVE = 0x44;

// Four entries of a byte table, from code `first` on: two selectors for the columns of half `half` of a group.
constexpr STB_DEVICE u32 selector_entries(u32 first, u32 half) {
    u32 word = 0;
    for (u32 i = 0; i < 4; ++i) {
        const Pattern p = pattern<Selectors>(first + i, half);
        word |= (p.low | p.high << 4) << 8 * i;
    }
    return word;
}

// The same for indices: those of both halves (M = 8), or the same indices twice (M = 4).
constexpr STB_DEVICE u32 index_entries(u32 first) {
    u32 word = 0;
    for (u32 i = 0; i < 4; ++i) {
        const u32 low = pattern<Selectors>(first + i, 0).indices & 0x0f;
        const u32 high = pattern<Selectors>(first + i, M == 8).indices & 0xf0;
        word |= (low | high) << 8 * i;
    }
    return word;
}

// The signs of a lane's two rows for the k64 p of a part, from one bit per quad: nibble 4 · row + quad is 0 or 1.
STB_DEVICE u32 spread_signs(u32 minus, u32 p) {
    const u32 bits = permute(minus, 0, 0x4140) >> 4 * p & 0x000f000f;
    const u32 pairs = (bits | bits << 6) & 0x03030303;
    return (pairs | pairs << 3) & 0x11111111;
}

// The selectors of a lane's registers of A, in their low 16 bits, and the indices. Register 2s + r has columns 8t to
// 8t + 7 of half s of the k64 for row r of the lane; its indices are in byte 2r + s.
struct Expanded {
    u32 selectors[4], indices;
};

// `codes` are the codes of a tile in a part, which is half `odd` of a chunk of 256 columns.
STB_DEVICE Expanded expand(const u8 *codes, u32 odd, u32 p, const u32 *table) {
    const u32 t = threadIdx.x % 4;
    Expanded e;
    if (N == 1 && M == 8) {
        constexpr u32 LOW[2] = {selector_entries(0, 0), selector_entries(4, 0)};
        constexpr u32 HIGH[2] = {selector_entries(0, 1), selector_entries(4, 1)};
        constexpr u32 INDICES[2] = {index_entries(0), index_entries(4)};
        // Nibble 2r + s.
        const u32 x = rows(codes, p, t), at = x & 0x7777;
        const u32 sign = (top_bits(x) & NEGATIVE * 0x01010101) ^ SECOND * 0x01010000;
        const u32 low = permute(LOW[0], LOW[1], at) ^ sign;
        const u32 high = permute(HIGH[0], HIGH[1], at) ^ sign;
        e.selectors[0] = permute(low, high, 0x40), e.selectors[2] = permute(low, high, 0x51);
        e.selectors[1] = permute(low, high, 0x62), e.selectors[3] = permute(low, high, 0x73);
        e.indices = permute(INDICES[0], INDICES[1], at);
    } else if (N == 1) {
        constexpr u32 FIRST[2] = {selector_entries(0, 0), selector_entries(4, 0)};
        // Nibble 4r + quad: the position.
        u32 x = permute(rows(codes, p, t), 0, 0x4140);
        x = (x | x << 4) & 0x0f0f0f0f;
        x = (x | x << 2) & 0x33333333;
        const u32 at = x | spread_signs(rows(codes, 2, t), p) << 2;
        const u32 first = permute(FIRST[0], FIRST[1], at);
        const u32 second = permute(FIRST[0] ^ SECOND * 0x01010101, FIRST[1] ^ SECOND * 0x01010101, at >> 16);
        e.selectors[0] = first, e.selectors[2] = first >> 16;
        e.selectors[1] = second, e.selectors[3] = second >> 16;
        // Positions 0 and 1 have the indices 0 and 1, other positions 2 and 3.
        e.indices = 0x44444444 + 5 * (x & 0x22222222);
    } else if (M == 4) {
        constexpr u32 SELECTORS[4] = {selector_entries(0, 0), selector_entries(4, 0), selector_entries(8, 0),
                                      selector_entries(12, 0)};
        constexpr u32 INDICES[4] = {index_entries(0), index_entries(4), index_entries(8), index_entries(12)};
        const u32 signs = spread_signs(rows(codes, 4, t), p) | 0x22220000;
        u32 indices[2];
#pragma unroll
        for (u32 s = 0; s < 2; ++s) {
            // Nibble 2r + quad % 2.
            const u32 x = rows(codes, 2 * p + s, t), at = x & 0x7777, upper = top_bits(x);
            const auto find = [&](const u32(&entries)[4]) {
                const u32 a = permute(entries[0], entries[1], at);
                return a ^ ((a ^ permute(entries[2], entries[3], at)) & upper);
            };
            const u32 sign = permute(NEGATIVE << 8 | SECOND << 16 | (NEGATIVE ^ SECOND) << 24, 0,
                                         permute(signs, 0, s ? 0x31 : 0x20));
            const u32 both = find(SELECTORS) ^ sign;
            e.selectors[2 * s] = both, e.selectors[2 * s + 1] = both >> 16;
            indices[s] = find(INDICES);
        }
        const u32 even = permute(indices[0], indices[1], 0x6240);
        const u32 uneven = permute(indices[0], indices[1], 0x7351);
        e.indices = (even & 0x0f0f0f0f) | (uneven & 0xf0f0f0f0);
    } else {
        // An entry has selectors in its low half and indices in its third byte.
        const Sevens c(codes, odd, p, t);
        e.selectors[0] = table[c.first & 127], e.selectors[1] = table[128 + (c.first >> 8)];
        e.selectors[2] = table[c.second & 127], e.selectors[3] = table[128 + (c.second >> 8)];
        e.indices = permute(permute(e.selectors[0], e.selectors[2], 0x62),
                                permute(e.selectors[1], e.selectors[3], 0x62), 0x5410);
    }
    return e;
}

// The metadata that lane t supplies, for half t / 2 and row t % 2: byte 2r + s of the indices of four lanes, in the
// order of the lanes.
STB_DEVICE u32 exchange(u32 indices) {
    const u32 t = threadIdx.x % 4;
    const u32 row = permute(indices, __shfl_xor_sync(ALL, indices, 1), t % 2 ? 0x3726 : 0x5140);
    return permute(row, __shfl_xor_sync(ALL, row, 2), t / 2 ? 0x3276 : 0x5410);
}

struct Int8Activations {
    static constexpr u32 PARTS = Q8_COLS / STEP, SCALE_BYTES = 8;
    static constexpr bool TOKEN_SCALES = false;
};

// The bits of 1.5 · 2^23. Adding an integer of less than 2^22 to the bits adds it to the float.
constexpr i32 MAGIC = 0x4b400000;

template <u32 TILES, u32 NT> struct Kernel : Frame<Int8Activations, TILES, NT> {
    using Base = Frame<Int8Activations, TILES, NT>;
    using Base::bits, Base::lane, Base::warp;
    // The k64 of a step.
    static constexpr u32 DEPTH = Q8_COLS / 64;
    const u32 *table;

    STB_DEVICE Kernel(const GemmParams &a, u8 *shared) : Base(a), table(reinterpret_cast<u32 *>(shared)) {
        if constexpr (TABLE != 0) {
            const u32 code = threadIdx.x % 128, second = threadIdx.x / 128 * SECOND;
            const Pattern low = pattern<Selectors>(code, 0), high = pattern<Selectors>(code, 1);
            const u32 indices = (low.indices & 0x0f) | (high.indices & 0xf0);
            const u32 first = (low.low | low.high << 4) ^ second;
            reinterpret_cast<u32 *>(shared)[threadIdx.x] =
                first | ((high.low | high.high << 4) ^ second) << 8 | indices << 16;
        }
    }

    STB_DEVICE void run(u8 *stages) const {
        Base::run(stages, [&](typename Base::Sums &sums, const u8 *stage, u32) { multiply(sums, stage); });
    }

    STB_DEVICE void multiply(typename Base::Sums &sums, const u8 *stage) const {
        u32 values[TILES][DEPTH][4], metadata[TILES][DEPTH];
#pragma unroll
        for (u32 i = 0; i < TILES; ++i)
#pragma unroll
            for (u32 k = 0; k < DEPTH; ++k)
                metadata[i][k] = fragment(values[i][k], stage, warp * TILES + i, k / 2, k % 2);
        // Matrix lane / 8 of ldmatrix is a piece of 16 columns. The pieces of k64 k and k + 2 are 128 bytes apart.
        const u8 *const x[2] = {stage + place(lane % 8, lane / 8), stage + place(lane % 8, 4 + lane / 8)};
#pragma unroll
        for (u32 j = 0; j < NT; ++j) {
            i32 whole[TILES][4];
#pragma unroll
            for (u32 k = 0; k < DEPTH; ++k) {
                u32 b[4];
                load_matrix_x4(b, x[k % 2] + place(8 * j, 8 * (k / 2)));
#pragma unroll
                for (u32 i = 0; i < TILES; ++i) {
                    if (k == 0)
                        whole[i][0] = whole[i][1] = whole[i][2] = whole[i][3] = MAGIC;
                    mma_sp_s8(whole[i], values[i][k], b, metadata[i][k]);
                }
            }
            const float2 scale = *reinterpret_cast<const float2 *>(stage + Base::TOKEN_SCALES +
                                                                   (8 * j + lane % 4 * 2) * 4);
#pragma unroll
            for (u32 i = 0; i < TILES; ++i)
#pragma unroll
                for (u32 n = 0; n < 4; ++n) {
                    const float v = __int_as_float(whole[i][n]) - __int_as_float(MAGIC);
                    sums[i][j][n] = fmaf(v, n % 2 ? scale.y : scale.x, sums[i][j][n]);
                }
        }
    }

    // Computes the values of k64 number p of a part, and returns the metadata that the lane supplies.
    STB_DEVICE u32 fragment(u32 (&values)[4], const u8 *stage, u32 tile, u32 part, u32 p) const {
        const u32 scale_mask = bits == 0 ? 0 : 0x0f0f;
        const Expanded e = expand(this->codes(stage, part, tile), part, p, table);
#pragma unroll
        for (u32 s = 0; s < 2; ++s) {
            // x + 1, and −(x + 1), which is x with all bits flipped. Without block scales x = 0.
            const u32 x = this->two_nibbles(this->scale_codes(stage, part, tile, 2 * p + s)) & scale_mask;
            const u32 plus = x + 0x0101, minus = x ^ 0xffff;
#pragma unroll
            for (u32 r = 0; r < 2; ++r)
                values[2 * s + r] = permute(plus, minus, e.selectors[2 * s + r]);
        }
        return exchange(e.indices);
    }
};

// 512 rows × 64 tokens, 256 × 64, 256 × 16.
STB_GEMM(gemm_512x64, 4, 8)
STB_GEMM(gemm_256x64, 2, 8)
STB_GEMM(gemm_256x16, 2, 2)
