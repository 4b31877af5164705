// Shared by the GEMM kernels of N:M encodings, for any precision of activations: the layout of codes and scales in
// shared memory, the loop over the columns, and the stores of results. The module defines NM_N and NM_M.
#pragma once
#include "gemm.cuh"

constexpr u32 N = NM_N, M = NM_M;
constexpr u32 BETA = N * (M == 8 ? 3 : 2) + 1;
// Vectors of 64 bytes with the codes of a tile for 128 columns: a whole chunk (M = 4), or the parts of the planes of
// a chunk of 256 columns that contain them (M = 8).
constexpr u32 VECTORS = M == 4 ? BETA : N == 1 ? 2 : 4;
// Entries of the lookup table in shared memory.
constexpr u32 TABLE = N == 2 && M == 8 ? 256 : 0;
static_assert(TABLE == 0 || TABLE == GEMM_THREADS, "an entry for each thread");

// A code within four columns: the selectors of the values with the lower and the higher index, and both indices,
// repeated.
struct Pattern {
    u32 low, high, indices;
};

// The pattern of half `half` of a group (M = 8), with the selectors S::PLUS, S::MINUS and S::ZERO.
template <class S> constexpr STB_DEVICE Pattern pattern(u32 code, u32 half) {
    constexpr u32 P = M == 8 ? 3 : 2;
    const u32 i = code & (M - 1), j = N == 2 ? code >> P & (M - 1) : i, s = code >> (BETA - 1);
    const bool has_i = i / 4 == half, has_j = j / 4 == half && j != i;
    const u32 sign_i = s ? S::MINUS : S::PLUS, sign_j = s != u32(i > j) ? S::MINUS : S::PLUS;
    if (has_i && has_j) {
        const u32 a = i & 3, b = j & 3;
        const u32 indices = a < b ? a | b << 2 : b | a << 2;
        return {a < b ? sign_i : sign_j, a < b ? sign_j : sign_i, indices * 0x11};
    }
    // One kept weight or none: the other value is zero.
    const u32 at = has_j ? j & 3 : i & 3;
    const u32 value = has_i ? sign_i : has_j ? sign_j : S::ZERO;
    const u32 indices = at < 2 ? 0x44 : 0xee;
    return {at % 2 == 0 ? value : S::ZERO, at % 2 == 1 ? value : S::ZERO, indices};
}

// The bytes of a lane's two rows in a vector, for lane `lane` of the file.
STB_DEVICE u32 rows(const u8 *codes, u32 vector, u32 lane) {
    return *reinterpret_cast<const u16 *>(codes + vector * 64 + lane * 16 + threadIdx.x % WARP / 4 * 2);
}

// All ones in byte k where bit 3 of nibble k is set.
STB_DEVICE u32 top_bits(u32 nibbles) { return permute(nibbles, nibbles << 4, 0x9d8c); }

// The codes of 2:8, seven bits each in a byte, of two rows and the quads 2p and 2p + 1 of half `odd` of a chunk.
struct Sevens {
    u32 first, second;

    STB_DEVICE Sevens(const u8 *codes, u32 odd, u32 p, u32 lane) {
        const u32 a = rows(codes, p, lane);
        const u32 b = rows(codes, 2, lane) >> 4 * p;
        const u32 c = rows(codes, 3, lane) >> (4 * odd + 2 * p);
        first = (a & 0x0f0f) | (b << 4 & 0x3030) | (c << 6 & 0x4040);
        second = (a >> 4 & 0x0f0f) | (b << 2 & 0x3030) | (c << 5 & 0x4040);
    }
};

// A block of TOKENS tokens and BLOCK_TILES tiles of rows. `Precision` describes the activations:
//     PARTS            parts of 128 columns in a step, which has 256 bytes for each token
//     SCALE_BYTES      bytes of the scale codes of a tile in shared memory, for each 32 columns
//     TOKEN_SCALES     whether activations have one scale per token; otherwise one per token and step
template <class Precision, u32 TILES, u32 NT> struct Frame {
    static constexpr u32 BLOCK_TILES = GEMM_WARPS * TILES, TOKENS = 8 * NT;
    static constexpr u32 PARTS = Precision::PARTS, SCALE_BYTES = Precision::SCALE_BYTES;
    // A stage of shared memory: activations; codes by part and tile; scale codes by part, tile and 32 columns; scales
    // of tokens.
    static constexpr u32 CODES = TOKENS * 256;
    static constexpr u32 SCALES = CODES + PARTS * BLOCK_TILES * VECTORS * 64;
    static constexpr u32 TOKEN_SCALES = SCALES + PARTS * BLOCK_TILES * 4 * SCALE_BYTES;
    static constexpr u32 STAGE = TOKEN_SCALES + (Precision::TOKEN_SCALES ? 0 : TOKENS * 4);

    using Sums = float[TILES][NT][4];

    const GemmParams &a;
    const u32 bits, first_tile, first_token, warp, lane;

    STB_DEVICE explicit Frame(const GemmParams &a)
        : a(a), bits(a.w.kind & 255), first_tile(blockIdx.x * BLOCK_TILES), first_token(blockIdx.y * TOKENS),
          warp(threadIdx.x / WARP), lane(threadIdx.x % WARP) {}

    // Finds vector v of a part in the codes of a tile, in vectors. Returns false if it does not exist, in the last
    // chunk of a row.
    STB_DEVICE bool locate(u32 part, u32 v, u32 &at) const {
        const u32 quads = ceil_div(ceil_div(a.w.cols, M), 4);
        const u32 chunk = M == 4 ? part : part / 2;
        const u32 n = least(8, quads - 8 * chunk);
        u32 within;
        bool there = true;
        if (M == 4) {
            constexpr u32 WIDTH = N == 1 ? 2 : 4;
            const u32 wide = ceil_div(n * WIDTH, 8);
            within = v < WIDTH ? v : wide;
            there = v < wide || v == WIDTH;
        } else {
            const u32 wide = ceil_div(n, 2), narrow = ceil_div(n, 4), odd = part % 2;
            within = v < 2 ? 2 * odd + v : v == 2 ? wide + odd : wide + narrow;
            there = v < 2 ? within < wide : v > 2 || odd < narrow;
        }
        at = chunk * BETA + within;
        return there;
    }

    STB_DEVICE void load(u8 *to, u32 step) const {
        load_x<TOKENS>(a, to, first_token, step);
        if constexpr (!Precision::TOKEN_SCALES) {
            for (u32 i = thread_again(); i < TOKENS; i += GEMM_THREADS) {
                const bool there = first_token + i < a.tokens;
                const float *from = a.scale + (there ? u64(step) * a.tokens + first_token + i : 0);
                copy_async<4>(to + TOKEN_SCALES + i * 4, from, there ? 4 : 0);
            }
        }
#pragma unroll
        for (u32 part = 0; part < PARTS; ++part)
            load_codes(to, part, step * PARTS + part);
    }

    // Copies the codes and scale codes of part `at` of the columns, which may be one beyond the last.
    STB_DEVICE void load_codes(u8 *to, u32 part, u32 at) const {
        const u32 thread = thread_again();
        const bool exists = PARTS == 1 || at * STEP < a.w.cols;
        const u32 tiles = ceil_div(a.w.rows, 16);
        const u8 *codes = a.w.payload + a.w.segments[3];
        u8 *to_codes = to + CODES + part * BLOCK_TILES * VECTORS * 64;
        for (u32 i = thread; i < BLOCK_TILES * VECTORS * 4; i += GEMM_THREADS) {
            const u32 piece = i % 4, v = i / 4 % VECTORS, tile = i / 4 / VECTORS;
            u32 vector = 0;
            const bool there = exists && locate(at, v, vector) && first_tile + tile < tiles;
            const u64 from = there ? u64(first_tile + tile) * a.w.units + vector * 64 + piece * 16 : 0;
            copy_async16(to_codes + i * 16, codes + from, there ? 16 : 0);
        }
        if (bits == 0)
            return;
        const u32 blocks = ceil_div(a.w.cols, a.w.block);
        const u8 *scales = a.w.payload + a.w.segments[2];
        u8 *to_scales = to + SCALES + part * BLOCK_TILES * 4 * SCALE_BYTES;
        for (u32 i = thread; i < BLOCK_TILES * 4; i += GEMM_THREADS) {
            const u32 sub = i % 4, tile = i / 4;
            const u32 block = (at * STEP + 32 * sub) / a.w.block;
            const bool there = block < blocks && first_tile + tile < tiles;
            const u64 from = there ? (u64(first_tile + tile) * blocks + block) * 2 * bits : 0;
            if (SCALE_BYTES == 16 && bits == 8)
                copy_async16(to_scales + i * SCALE_BYTES, scales + from, there ? 16 : 0);
            else
                copy_async<8>(to_scales + i * SCALE_BYTES, scales + from, there ? 8 : 0);
        }
    }

    // The codes of a tile of the block in a part of a stage.
    STB_DEVICE const u8 *codes(const u8 *stage, u32 part, u32 tile) const {
        return stage + CODES + (part * BLOCK_TILES + tile) * VECTORS * 64;
    }
    // The scale codes of such a tile for 32 columns.
    STB_DEVICE const u8 *scale_codes(const u8 *stage, u32 part, u32 tile, u32 sub) const {
        return stage + SCALES + ((part * BLOCK_TILES + tile) * 4 + sub) * SCALE_BYTES;
    }
    // The scale codes of a lane's two rows, of 4 bits, in the low halves of two bytes. In the file, row k of a tile is
    // in the low half of byte k, and row k + 8 in the high half.
    STB_DEVICE u32 two_nibbles(const u8 *at) const {
        const u32 group = lane / 4;
        return *reinterpret_cast<const u16 *>(at + 2 * (group % 4)) >> (group / 4 * 4);
    }

    // The loop over the columns. multiply(sums, stage, step) adds the products of a step.
    template <class Multiply> STB_DEVICE void run(u8 *stages, const Multiply &multiply) const {
        const u32 all = ceil_div(a.w.cols, PARTS * STEP);
        const u32 first = blockIdx.z * a.steps;
        const u32 steps = first < all ? least(a.steps, all - first) : 0;
        Sums sums;
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
            // After this, all threads see the copied stage, and no thread reads the stage that is loaded next.
            __syncthreads();
            if (step + STAGES - 1 < steps)
                load(stages + (step + STAGES - 1) % STAGES * STAGE, first + step + STAGES - 1);
            copy_commit();
            multiply(sums, stages + step % STAGES * STAGE, first + step);
        }
        copy_wait<0>();
        finish(sums, stages);
    }

    // Writes the results of a lane for tile i of its warp and the tokens from 8j on.
    STB_DEVICE void emit(const float (&s)[4], u32 i, u32 j) const {
        const u16 *row_scales = reinterpret_cast<const u16 *>(a.w.payload + a.w.segments[1]);
        const float unit = bits == 8 ? 1.0f / 256 : bits == 4 ? 1.0f / 16 : 1.0f;
        const u32 row = (first_tile + warp * TILES + i) * 16 + 2 * (lane / 4);
        const float r0 = row < a.w.rows ? f16_to_f32(row_scales[row]) * unit : 0.0f;
        const float r1 = row + 1 < a.w.rows ? f16_to_f32(row_scales[row + 1]) * unit : 0.0f;
        const u32 token = first_token + 8 * j + 2 * (lane % 4);
        float t0 = 1.0f, t1 = 1.0f;
        if constexpr (Precision::TOKEN_SCALES) {
            t0 = token < a.tokens ? a.scale[token] : 0.0f;
            t1 = token + 1 < a.tokens ? a.scale[token + 1] : 0.0f;
        }
        const float v[4] = {s[0] * r0 * t0, s[1] * r0 * t1, s[2] * r1 * t0, s[3] * r1 * t1};
        write(a, v, row, token);
    }

    STB_DEVICE void finish(const Sums &sums, u8 *shared) const {
        if (a.splits == 1) {
#pragma unroll
            for (u32 i = 0; i < TILES; ++i)
#pragma unroll
                for (u32 j = 0; j < NT; ++j)
                    emit(sums[i][j], i, j);
            return;
        }
        constexpr u32 RESULTS = TILES * NT * 4;
        const u32 block = blockIdx.y * gridDim.x + blockIdx.x;
        float *partial = a.partial + u64(block) * a.splits * RESULTS * GEMM_THREADS + threadIdx.x;
        float *mine = partial + u64(blockIdx.z) * RESULTS * GEMM_THREADS;
#pragma unroll
        for (u32 k = 0; k < RESULTS; ++k)
            __stcg(&mine[k * GEMM_THREADS], sums[k / 4 / NT][k / 4 % NT][k % 4]);
        // All threads have read the stages, which become scratch memory.
        __syncthreads();
        if (!is_last(a, reinterpret_cast<u32 *>(shared)))
            return;
#pragma unroll 1
        for (u32 k = 0; k < RESULTS; k += 4) {
            // In the order of the splits, whichever block is last.
            float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            for (u32 split = 0; split < a.splits; ++split)
#pragma unroll
                for (u32 n = 0; n < 4; ++n)
                    sum[n] += __ldcg(&partial[(u64(split) * RESULTS + k + n) * GEMM_THREADS]);
            emit(sum, k / 4 / NT, k / 4 % NT);
        }
    }
};

#define STB_GEMM(name, tiles, nt)                                                                  \
    extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 1) name(const GemmParams a) {             \
        STB_DYNAMIC_SHARED(shared);                                                                \
        const Kernel<tiles, nt> kernel(a, shared);                                                 \
        kernel.run(shared + TABLE * 4);                                                            \
    }
