// GEMM for all encodings but N:M, on dense tensor cores. The module defines CODEC_HEADER and CODEC.
//
// A block dequantizes 64 rows × 128 columns at a time into shared memory and multiplies them with 64 tokens. Every
// number is the sum of two bf16, high + low, and a product is high·high + high·low + low·high, so that 16 bits of each
// number count over the whole range of f32 without scales. The tensor cores compute three products for one (about 200
// dense TFLOP/s at best on an H100), and each weight is dequantized once per 64 tokens.
#include CODEC_HEADER
#include "gemm.cuh"

using Codec = CODEC;
constexpr u32 ROWS = 64, TOKENS = 64;
// Bytes of the high parts of a block of rows or tokens, [row][column]. The low parts follow.
constexpr u32 HALF = ROWS * 256;

STB_DEVICE float upper(float v) { return __uint_as_float(u32(f32_to_bf16(v)) << 16); }

// Dequantizes the columns of `step` to two bf16 each.
STB_DEVICE void decode(const PackedMatrix &m, u8 *to, u32 first_row, u32 step) {
    constexpr u32 PIECES = STEP / Codec::PIECE;
    for (u32 k = threadIdx.x; k < ROWS * PIECES; k += GEMM_THREADS) {
        const u32 row = k / PIECES, piece = k % PIECES;
        const bool there = first_row + row < m.rows;
        const u32 index = step * PIECES + piece;
        typename Codec::Raw raw = {};
        if (there)
            raw = Codec::load(m, first_row + row, index);
        constexpr u32 UNITS = Codec::PIECE / Codec::UNIT;
#pragma unroll
        for (u32 u = 0; u < UNITS; ++u) {
            typename Codec::Scale scale = {};
            if (there)
                scale = Codec::scale(m, first_row + row, index * UNITS + u);
            const float factor = there ? Codec::multiplier(scale) : 0.0f;
#pragma unroll
            for (u32 i = 0; i < Codec::UNIT / 4; ++i) {
                float4 w = Codec::weights4(raw, scale, u, i);
                const u32 column = piece * Codec::PIECE + u * Codec::UNIT + 4 * i;
                // Columns beyond the matrix are multiplied with zeros, so they must be finite.
                w.x *= factor, w.y *= factor, w.z *= factor, w.w *= factor;
                const float x = upper(w.x), y = upper(w.y), z = upper(w.z), v = upper(w.w);
                u8 *at = to + place(row, column / 8) + column % 8 * 2;
                *reinterpret_cast<uint2 *>(at) = make_uint2(bf16x2(x, y), bf16x2(z, v));
                *reinterpret_cast<uint2 *>(at + HALF) =
                    make_uint2(bf16x2(w.x - x, w.y - y), bf16x2(w.z - z, w.w - v));
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(GEMM_THREADS, 2) gemm_rows(const GemmParams a) {
    STB_DYNAMIC_SHARED(shared);
    u8 *weights = shared, *activations = shared + 2 * HALF;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // A warp computes 16 rows and 32 tokens.
    const u32 row = warp % 4 * 16, token = warp / 4 * 32;
    const u32 first_row = blockIdx.x * ROWS, first_token = blockIdx.y * TOKENS;
    float sums[4][4];
#pragma unroll
    for (u32 j = 0; j < 4; ++j)
#pragma unroll
        for (u32 k = 0; k < 4; ++k)
            sums[j][k] = 0.0f;

    GemmParams low = a;
    low.x += u64(a.tokens) * a.stride;
    const u32 steps = ceil_div(a.w.cols, STEP);
    for (u32 step = 0; step < steps; ++step) {
        // After this, no thread reads the previous step.
        __syncthreads();
        load_x<TOKENS>(a, activations, first_token, step);
        load_x<TOKENS>(low, activations + HALF, first_token, step);
        copy_commit();
        decode(a.w, weights, first_row, step);
        copy_wait<0>();
        __syncthreads();
#pragma unroll 2
        for (u32 k = 0; k < STEP / 16; ++k) {
            u32 w[2][4], x[2][2][4];
            const u32 w_row = row + lane / 8 % 2 * 8 + lane % 8, w_piece = 2 * k + lane / 16;
#pragma unroll
            for (u32 part = 0; part < 2; ++part) {
                load_matrix_x4(w[part], weights + part * HALF + place(w_row, w_piece));
#pragma unroll
                for (u32 j = 0; j < 2; ++j) {
                    const u32 x_row = token + 8 * (2 * j + lane / 16) + lane % 8;
                    const u32 x_piece = 2 * k + lane / 8 % 2;
                    load_matrix_x4(x[part][j], activations + part * HALF + place(x_row, x_piece));
                }
            }
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32(&high)[4] = x[0][j / 2], (&rest)[4] = x[1][j / 2];
                const u32 x_high[2] = {high[j % 2 * 2], high[j % 2 * 2 + 1]};
                const u32 x_low[2] = {rest[j % 2 * 2], rest[j % 2 * 2 + 1]};
                // The small products first.
                mma_bf16(sums[j], w[1], x_high);
                mma_bf16(sums[j], w[0], x_low);
                mma_bf16(sums[j], w[0], x_high);
            }
        }
    }
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
#pragma unroll
        for (u32 k = 0; k < 4; ++k) {
            const u32 r = first_row + row + lane / 4 + k / 2 * 8;
            const u32 t = first_token + token + 8 * j + 2 * (lane % 4) + k % 2;
            if (r >= a.w.rows || t >= a.tokens)
                continue;
            float &y = a.y[u64(t) * a.w.rows + r];
            y = a.add ? y + sums[j][k] : sums[j][k];
        }
    }
}
