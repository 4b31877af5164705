// Joint N:M codes × many tokens on sparse tensor cores: NM_N, NM_M as defined by the module.
//
// The weights are operand A of mma.sp.m16n8k32, straight from the file's bytes: 1:8, 1:4, 2:8 and
// 2:4 never keep more than two of four neighbours. Activations are operand B. A tile of 16 rows of the
// file is one m16 of the instruction, with row 2·(lane / 4) + h of the tile as row lane / 4 + 8·h of
// the fragment: a lane's two rows are neighbours in every vector of codes, one 16-bit load.
//
// Which column of the matrix is which of the instruction is free, as long as both operands agree. For
// M = 4 they are the same. For M = 8 the 64 columns of two k32 are pieces of eight, and k32 number s has
// pieces 2s, 2s + 1, 2s + 4, 2s + 5: the two codes of a byte (quads q and q + 1 of a lane) are then
// columns 0..15 and 16..31 of the same k32. `ldmatrix` takes any pieces of eight columns.
//
// Values: a register holds the two kept values of four columns. It is one byte permutation of
// {m, −m, 0}, m = the f16 magnitude of the row and block (x + 1 for the stored code x: exact), by a
// selector of 16 bits; selectors come from tables in registers, again by byte permutations of four
// codes at a time (2:8: from a table of 256 words in shared memory). Row scales, 1 / 2^scale_bits and
// the scales of tokens are applied to the sums; column factors were applied to the activations.
// Metadata: every lane finds the indices of its own columns; two shuffles within four lanes bring them
// to the lane that has to supply them.
//
// Budget, per lane: an mma.sp of A100 class tensor cores occupies a scheduler for 8 cycles (m16n8k32: 4096
// products of the dense shape at 512 per cycle and scheduler), an integer instruction for 2. A warp does TILES × NT
// of them per k32 and expands TILES fragments: with NT = 8 there are 64 cycles for a fragment.
//     selectors of 4 values   1:8 7, 1:4 9, 2:4 19, 2:8 18 + 4 shared loads
//     4 values                8 (two permutations each; 2:8: 4)
//     metadata                3 + 1 shuffle
//     block scales            6 if there are any
// that is 18 (1:8), 20 (1:4), 31 (2:4) and 28 (2:8) integer instructions, 36 to 62 cycles: below the tensor
// cores', and beside them. Shared memory: ldmatrix 4 KiB per warp and k32 of 64 tokens, 8 warps 32 KiB =
// 256 cycles for 512 of the tensor cores. Device memory and L2 see packed weights and each activation
// once per 512 rows. Roofline of 4096 × 4096 × 8192 tokens on H100 (mma.sync at about 62 % of 989 · 2
// TFLOP/s sparse): 275 GFLOP / 1.2 PFLOP/s = 0.22 ms; bytes 67 MB of x, 134 MB of y, 2 MB of weights:
// 0.07 ms.
#include "gemm.cuh"

constexpr u32 N = NM_N, M = NM_M;
constexpr u32 BETA = N * (M == 8 ? 3 : 2) + 1;
// Vectors of 64 bytes with codes of a tile for one step: of a chunk of 128 columns (M = 4), or the parts of
// the planes of a chunk of 256 that have them.
constexpr u32 VECTORS = M == 4 ? BETA : N == 1 ? 2 : 4;
// Entries of the table in shared memory.
constexpr u32 TABLE = N == 2 && M == 8 ? 256 : 0;

// Selector bytes for one f16: of {m, −m} in two registers, {m, 0} and {−m, 0}.
constexpr u32 PLUS = 0x10, MINUS = 0x54, ZERO = 0x32;

// How a code looks within four columns: selectors of the value with the lower and the higher index, and both indices,
// twice.
struct Pattern {
    u32 low, high, indices;
};

// Of the columns of half `half` of the group (M = 8).
constexpr STB_DEVICE Pattern pattern(u32 code, u32 half) {
    constexpr u32 P = M == 8 ? 3 : 2;
    const u32 i = code & (M - 1), j = N == 2 ? code >> P & (M - 1) : i, s = code >> (BETA - 1);
    const bool has_i = i / 4 == half, has_j = j / 4 == half && j != i;
    const u32 sign_i = s ? MINUS : PLUS, sign_j = s != u32(i > j) ? MINUS : PLUS;
    if (has_i && has_j) {
        const u32 a = i & 3, b = j & 3;
        const u32 indices = a < b ? a | b << 2 : b | a << 2;
        return {a < b ? sign_i : sign_j, a < b ? sign_j : sign_i, indices * 0x11};
    }
    // A single one, or none: with a neighbour that is zero.
    const u32 at = has_j ? j & 3 : i & 3;
    const u32 value = has_i ? sign_i : has_j ? sign_j : ZERO;
    const u32 indices = at < 2 ? 0x44 : 0xee;
    return {at % 2 == 0 ? value : ZERO, at % 2 == 1 ? value : ZERO, indices};
}

// Four entries of a table of bytes, from code `first`: field 0 low, 1 high, 2 indices.
constexpr STB_DEVICE u32 entries(u32 first, u32 half, u32 field) {
    u32 word = 0;
    for (u32 i = 0; i < 4; ++i) {
        const Pattern p = pattern(first + i, half);
        word |= (field == 0 ? p.low : field == 1 ? p.high : p.indices) << 8 * i;
    }
    return word;
}

// What a lane needs to expand codes.
struct Expander {
    u32 group, t;
    // Tables for this lane's half of a group (M = 8), codes without the sign.
    u32 low[4], high[4], indices[4];
    const u32 *table;
    // For the exchange of indices.
    u32 keep, send, mask, order;

    STB_DEVICE explicit Expander(const u32 *table) : table(table) {
        const u32 lane = threadIdx.x % WARP;
        group = lane / 4, t = lane % 4;
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

    // Two rows' bytes of a vector.
    STB_DEVICE u32 rows(const u8 *codes, u32 vector, u32 lane) const {
        return *reinterpret_cast<const u16 *>(codes + vector * 64 + lane * 16 + 2 * group);
    }

    // All ones in byte k where bit 3 of nibble k is set.
    static STB_DEVICE u32 top_bits(u32 nibbles) {
        return permute(nibbles, nibbles << 4, 0x9d8c);
    }

    // Selectors of the four values in the order of the registers, and the indices in the order of the
    // codes: [row, columns 0..15], [row, 16..31], [row + 1, 0..15], [row + 1, 16..31], of k32
    // number s of pair p. `codes` is the tile's part of the step; `odd` whether that is the second half of its chunk.
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
            const u32 a = rows(codes, p, lane);
            const u32 b = rows(codes, 2, lane) >> 4 * p;
            const u32 c = rows(codes, 3, lane) >> (4 * odd + 2 * p);
            // Codes of seven bits, each in a byte: first those of columns 0..15, then 16..31.
            const u32 first = (a & 0x0f0f) | (b << 4 & 0x3030) | (c << 6 & 0x4040);
            const u32 second = (a >> 4 & 0x0f0f) | (b << 2 & 0x3030) | (c << 5 & 0x4040);
            const u32 half = t % 2 * 128;
            const u32 e[4] = {table[half + (first & 127)], table[half + (second & 127)],
                              table[half + (first >> 8)], table[half + (second >> 8)]};
            to[0] = e[0], to[2] = e[1], to[1] = e[2], to[3] = e[3];
            return permute(permute(e[0], e[1], 0x62), permute(e[2], e[3], 0x62), 0x5410);
        }
        to[0] = permute(lo, hi, 0x40);
        to[2] = permute(lo, hi, 0x51);
        to[1] = permute(lo, hi, 0x62);
        to[3] = permute(lo, hi, 0x73);
        return found;
    }

    // Metadata of both k32 of a pair: lanes t = 0, 1 get that of the first, 2, 3 of the second.
    STB_DEVICE u32 exchange(u32 first, u32 second) const {
        // Lanes with even t collect columns 0..15, odd ones 16..31: four bits of their own and four
        // of their neighbour. Bytes: k32 0 and rows r, r + 1, then k32 1.
        const u32 own = permute(first, second, keep);
        const u32 other = __shfl_xor_sync(ALL, permute(first, second, send), 1);
        const u32 both = (own & mask) | (other & ~mask);
        return permute(both, __shfl_xor_sync(ALL, both, 2), order);
    }
};

// Magnitudes of a lane's two rows as tables for the permutation: {m, 0} and {−m, 0}.
struct Magnitudes {
    u32 plus[2], minus[2];

    STB_DEVICE Magnitudes() {
        plus[0] = plus[1] = 0x3c00, minus[0] = minus[1] = 0xbc00;
    }
    // From two scale codes x: x + 1, by way of 1024 + x.
    STB_DEVICE explicit Magnitudes(u32 low, u32 high) {
        const u32 m = f16x2_add(low | high << 16 | 0x64006400, 0xe3fee3fe);
        plus[0] = m & 0xffff, plus[1] = m >> 16;
        minus[0] = plus[0] ^ 0x8000, minus[1] = plus[1] ^ 0x8000;
    }
};

template <u32 TILES, u32 NT> struct Kernel {
    static constexpr u32 BLOCK_TILES = GEMM_WARPS * TILES, TOKENS = 8 * NT;
    // A stage of shared memory: activations, codes by tile, scale codes by 32 columns and tile.
    static constexpr u32 CODES = TOKENS * 256, SCALES = CODES + BLOCK_TILES * VECTORS * 64;
    static constexpr u32 STAGE = SCALES + BLOCK_TILES * 4 * 16;

    const Gemm &a;
    u32 first_tile, first_token, bits;

    // Where vector v of a step is in the codes of a tile, in vectors; false if it is not there (in the last chunk of a
    // row).
    STB_DEVICE bool locate(u32 step, u32 v, u32 &at) const {
        const u32 quads = ceil_div(ceil_div(a.w.cols, M), 4);
        const u32 chunk = M == 4 ? step : step / 2;
        const u32 n = least(8, quads - 8 * chunk);
        u32 within;
        bool there = true;
        if (M == 4) {
            constexpr u32 WIDTH = N == 1 ? 2 : 4;
            const u32 wide = ceil_div(n * WIDTH, 8);
            within = v < WIDTH ? v : wide;
            there = v < wide || v == WIDTH;
        } else {
            const u32 wide = ceil_div(n, 2), narrow = ceil_div(n, 4), odd = step % 2;
            within = v < 2 ? 2 * odd + v : v == 2 ? wide + odd : wide + narrow;
            there = v < 2 ? within < wide : v > 2 || odd < narrow;
        }
        at = chunk * BETA + within;
        return there;
    }

    STB_DEVICE void load(u8 *to, u32 step) const {
        load_x<TOKENS>(a, to, first_token, step);
        const u32 tiles = ceil_div(a.w.rows, 16);
        const u8 *codes = a.w.payload + a.w.segments[3];
        for (u32 i = threadIdx.x; i < BLOCK_TILES * VECTORS * 4; i += GEMM_THREADS) {
            const u32 piece = i % 4, v = i / 4 % VECTORS, tile = i / 4 / VECTORS;
            u32 at = 0;
            const bool there = locate(step, v, at) && first_tile + tile < tiles;
            const u64 from = there ? u64(first_tile + tile) * a.w.units + at * 64 + piece * 16 : 0;
            copy_async16(to + CODES + i * 16, codes + from, there ? 16 : 0);
        }
        if (bits == 0)
            return;
        const u32 blocks = ceil_div(a.w.cols, a.w.block);
        const u8 *scales = a.w.payload + a.w.segments[2];
        for (u32 i = threadIdx.x; i < BLOCK_TILES * 4; i += GEMM_THREADS) {
            const u32 sub = i % 4, tile = i / 4;
            const u32 block = (step * STEP + 32 * sub) / a.w.block;
            const bool there = block < blocks && first_tile + tile < tiles;
            const u64 from = there ? (u64(first_tile + tile) * blocks + block) * 2 * bits : 0;
            if (bits == 8)
                copy_async16(to + SCALES + i * 16, scales + from, there ? 16 : 0);
            else
                copy_async<8>(to + SCALES + i * 16, scales + from, there ? 8 : 0);
        }
    }

    STB_DEVICE Magnitudes magnitudes(const u8 *stage, u32 tile, u32 sub, u32 group) const {
        if (bits == 0)
            return Magnitudes();
        const u8 *at = stage + SCALES + (tile * 4 + sub) * 16;
        if (bits == 8) {
            const u32 x = *reinterpret_cast<const u16 *>(at + 2 * group);
            return Magnitudes(x & 255, x >> 8);
        }
        // Row k in the low half of byte k, row k + 8 in the high half.
        const u32 x = *reinterpret_cast<const u16 *>(at + 2 * (group % 4)) >> (group / 4 * 4);
        return Magnitudes(x & 15, x >> 8 & 15);
    }

    STB_DEVICE void run(u8 *shared) {
        u32 *table = reinterpret_cast<u32 *>(shared);
        u8 *stages = shared + TABLE * 4;
        static_assert(TABLE == 0 || TABLE == GEMM_THREADS, "an entry for each thread");
        if constexpr (TABLE != 0) {
            const Pattern p = pattern(threadIdx.x % 128, threadIdx.x / 128);
            table[threadIdx.x] = p.low | p.high << 8 | p.indices << 16;
        }
        bits = a.w.kind & 255;
        first_tile = blockIdx.x * BLOCK_TILES;
        first_token = blockIdx.y * TOKENS;
        const u32 all = ceil_div(a.w.cols, STEP);
        const u32 first = blockIdx.z * a.steps;
        const u32 steps = first < all ? least(a.steps, all - first) : 0;
        const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        const Expander expand(table);

        float sums[TILES][NT][4];
#pragma unroll
        for (u32 i = 0; i < TILES; ++i)
#pragma unroll
            for (u32 j = 0; j < NT; ++j)
#pragma unroll
                for (u32 k = 0; k < 4; ++k)
                    sums[i][j][k] = 0.0f;

#pragma unroll
        for (u32 s = 0; s + 1 < STAGES; ++s) {
            if (s < steps)
                load(stages + s * STAGE, first + s);
            copy_commit();
        }
        for (u32 step = 0; step < steps; ++step) {
            copy_wait<i32(STAGES) - 2>();
            // All have what was copied, and nobody reads the stage that is loaded next.
            __syncthreads();
            if (step + STAGES - 1 < steps)
                load(stages + (step + STAGES - 1) % STAGES * STAGE, first + step + STAGES - 1);
            copy_commit();
            const u8 *stage = stages + step % STAGES * STAGE;
#pragma unroll 1
            for (u32 p = 0; p < 2; ++p)
                multiply(sums, stage, (first + step) % 2, p, warp, lane, expand);
        }
        copy_wait<0>();
        finish(sums, warp, lane, stages);
    }

    STB_DEVICE void multiply(float (&sums)[TILES][NT][4], const u8 *stage, u32 odd, u32 p, u32 warp,
                             u32 lane, const Expander &expand) const {
        u32 values[TILES][2][4], metadata[TILES];
#pragma unroll
        for (u32 i = 0; i < TILES; ++i) {
            const u32 tile = warp * TILES + i;
            const u8 *codes = stage + CODES + tile * VECTORS * 64;
            const Magnitudes m[2] = {magnitudes(stage, tile, 2 * p, expand.group),
                                     magnitudes(stage, tile, 2 * p + 1, expand.group)};
            u32 found[2];
#pragma unroll
            for (u32 s = 0; s < 2; ++s) {
                u32 selectors[4];
                found[s] = expand.selectors(selectors, codes, odd, p, s);
#pragma unroll
                for (u32 k = 0; k < 4; ++k) {
                    // Of 32 columns each: M = 4 has them in one k32, M = 8 half in each.
                    const Magnitudes &of = m[M == 4 ? s : k / 2];
                    values[i][s][k] = permute(of.plus[k % 2], of.minus[k % 2], selectors[k]);
                }
            }
            metadata[i] = expand.exchange(found[0], found[1]);
        }
        // Matrix k of ldmatrix: piece of eight columns.
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

    // Writes a lane's sums for tile i of its warp and tokens 8j and on.
    STB_DEVICE void emit(const float (&s)[4], u32 warp, u32 lane, u32 i, u32 j) const {
        const u16 *row_scales = reinterpret_cast<const u16 *>(a.w.payload + a.w.segments[1]);
        const float unit = bits == 8 ? 1.0f / 256 : bits == 4 ? 1.0f / 16 : 1.0f;
        const u32 row = (first_tile + warp * TILES + i) * 16 + 2 * (lane / 4);
        const float r0 = row < a.w.rows ? f16_to_f32(row_scales[row]) * unit : 0.0f;
        const float r1 = row + 1 < a.w.rows ? f16_to_f32(row_scales[row + 1]) * unit : 0.0f;
        const u32 token = first_token + 8 * j + 2 * (lane % 4);
        const float t0 = token < a.tokens ? a.scale[token] : 0.0f;
        const float t1 = token + 1 < a.tokens ? a.scale[token + 1] : 0.0f;
        const float v[4] = {s[0] * r0 * t0, s[1] * r0 * t1, s[2] * r1 * t0, s[3] * r1 * t1};
        write(a, v, row, token);
    }

    STB_DEVICE void finish(const float (&sums)[TILES][NT][4], u32 warp, u32 lane, u8 *shared) const {
        if (a.splits == 1) {
#pragma unroll
            for (u32 i = 0; i < TILES; ++i)
#pragma unroll
                for (u32 j = 0; j < NT; ++j)
                    emit(sums[i][j], warp, lane, i, j);
            return;
        }
        constexpr u32 RESULTS = TILES * NT * 4;
        const u32 block = blockIdx.y * gridDim.x + blockIdx.x;
        float *partial = a.partial + u64(block) * a.splits * RESULTS * GEMM_THREADS + threadIdx.x;
        float *mine = partial + u64(blockIdx.z) * RESULTS * GEMM_THREADS;
#pragma unroll
        for (u32 k = 0; k < RESULTS; ++k)
            __stcg(&mine[k * GEMM_THREADS], sums[k / 4 / NT][k / 4 % NT][k % 4]);
        // Everybody has read the stages: they become scratch.
        __syncthreads();
        if (!is_last(a, reinterpret_cast<u32 *>(shared)))
            return;
#pragma unroll 1
        for (u32 k = 0; k < RESULTS; k += 4) {
            // In the order of the splits, whoever does it.
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            for (u32 split = 0; split < a.splits; ++split)
#pragma unroll
                for (u32 n = 0; n < 4; ++n)
                    sum[n] += __ldcg(&partial[(u64(split) * RESULTS + k + n) * GEMM_THREADS]);
            emit(sum, warp, lane, k / 4 / NT, k / 4 % NT);
        }
    }
};

#define STB_GEMM(name, tiles, nt)                                                                  \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) name(const Gemm a) {             \
        STB_DYNAMIC_SHARED(shared);                                                                \
        Kernel<tiles, nt> kernel{a, 0, 0, 0};                                                      \
        kernel.run(shared);                                                                        \
    }
// 512 rows × 64 tokens, 256 × 64, 256 × 16.
STB_GEMM(gemm_512x64, 4, 8)
STB_GEMM(gemm_256x64, 2, 8)
STB_GEMM(gemm_256x16, 2, 2)
