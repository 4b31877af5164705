// What the kernels for many tokens share: their parameter, activations on their way into shared memory, results on
// their way out.
#pragma once
#include "common.cuh"

// y[t][r] (+)= Σ_c w[r, c] · x[t][c]. Fields as `GemmParams` of gemm.rs.
struct GemmParams {
    PackedMatrix w;
    // From `gemm_prepare`: f16, [tokens][stride], and what they are multiples of. From `gemm_round`: bytes in the same
    // room, and by ROUNDED columns and token what they are multiples of.
    const u16 *x;
    const float *scale;
    // [tokens][rows].
    float *y;
    // With several splits: by block of the grid, their results, and how many are there.
    float *partial;
    u32 *arrived;
    u32 tokens;
    // Numbers of 16 bits of a row of `x`: whole steps.
    u32 stride;
    // Steps of a split, and how many splits there are.
    u32 steps, splits;
    // Whether results are added to `y`.
    u32 add;
    u32 padding;
};

constexpr u32 GEMM_WARPS = 8;
constexpr u32 GEMM_THREADS = GEMM_WARPS * WARP;
// Columns that are in shared memory at a time, if activations have 16 bits.
constexpr u32 STEP = 128;
// Columns of a token that have one scale where activations are rounded to 8 bits: as many bytes as STEP has in 16 bits.
constexpr u32 Q8_COLS = 2 * STEP;
// Steps that are in shared memory or on their way.
constexpr u32 STAGES = 3;

// Activations of TOKENS tokens: rows of 256 bytes, STEP columns if they have 16 bits. Pieces of 16 bytes of a row lie at places
// that differ from row to row, so that the eight rows of a matrix for `ldmatrix` touch all banks.
STB_DEVICE u32 place(u32 token, u32 piece) { return token * 256 + ((piece ^ (token & 7)) * 16); }

template <u32 TOKENS> STB_DEVICE void load_x(const GemmParams &a, u8 *to, u32 first_token, u32 step) {
    for (u32 i = threadIdx.x; i < TOKENS * 16; i += GEMM_THREADS) {
        const u32 token = i / 16, piece = i % 16;
        const bool there = first_token + token < a.tokens;
        const u16 *from =
            a.x + (there ? u64(first_token + token) * a.stride + step * STEP + piece * 8 : 0);
        copy_async16(to + place(token, piece), from, there ? 16 : 0);
    }
}

// Writes a lane's sums of two rows, r and r + 1, for two tokens, t and t + 1: values in the order
// [r, t], [r, t + 1], [r + 1, t], [r + 1, t + 1].
STB_DEVICE void write(const GemmParams &a, const float (&v)[4], u32 row, u32 token) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        if (token + i >= a.tokens)
            continue;
        float *y = a.y + u64(token + i) * a.w.rows + row;
        if (row < a.w.rows)
            y[0] = a.add ? y[0] + v[i] : v[i];
        if (row + 1 < a.w.rows)
            y[1] = a.add ? y[1] + v[2 + i] : v[2 + i];
    }
}

// Whether this block is the last of its splits to arrive, and has to sum up what all have written to `partial`. All
// threads of the block call it, after writing.
STB_DEVICE bool is_last(const GemmParams &a, u32 *flag) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32 block = blockIdx.y * gridDim.x + blockIdx.x;
        *flag = atomicAdd(&a.arrived[block], 1u) + 1 == a.splits;
        if (*flag)
            a.arrived[block] = 0;
    }
    __syncthreads();
    const bool last = *flag != 0;
    if (last)
        __threadfence();
    return last;
}
