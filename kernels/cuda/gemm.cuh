// Shared by the GEMM kernels: their parameter, loads of activations into shared memory, and stores of results.
#pragma once
#include "common.cuh"

// y[t][r] (+)= Σ_c w[r, c] · x[t][c]. Fields as `GemmParams` of gemm.rs.
struct GemmParams {
    PackedMatrix w;
    // Prepared activations and their scales: from `gemm_prepare_f16` f16, [tokens][stride], with a scale per token;
    // from `gemm_prepare_q8` bytes in the same space, with a scale per Q8_COLS columns and token; from
    // `gemm_prepare_bf16x2` two bf16 per activation, without scales.
    const u16 *x;
    const float *scale;
    // [tokens][rows].
    float *y;
    // With several splits, the results of each block of the grid, and the number of splits that have arrived.
    float *partial;
    u32 *arrived;
    u32 tokens;
    // The length of a row of `x` in units of 16 bits, which is whole steps.
    u32 stride;
    // Steps of a split, and the number of splits.
    u32 steps, splits;
    // Whether results are added to `y`.
    u32 add;
    u32 padding;
};

constexpr u32 GEMM_WARPS = 8;
constexpr u32 GEMM_THREADS = GEMM_WARPS * WARP;
// Columns of a stage of shared memory, if activations have 16 bits.
constexpr u32 STEP = 128;
// Columns of a token that share a scale if activations have 8 bits: the same number of bytes as STEP in 16 bits.
constexpr u32 Q8_COLS = 2 * STEP;
// Steps that are in shared memory or being copied there.
constexpr u32 STAGES = 3;

// The activations of TOKENS tokens are rows of 256 bytes, which are STEP columns of 16 bits. The order of the 16-byte
// pieces differs from row to row, so that the eight rows of a matrix for `ldmatrix` touch all banks.
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

// Writes the results of a lane for two rows, r and r + 1, and two tokens, t and t + 1, which are in the order
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

// Returns whether this block is the last of its splits to arrive, and therefore sums the `partial` results of all
// splits. All threads of the block call it after they have written their results.
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
