// Prepares activations for a GEMM: applies column factors, and converts to f16 with a power of two per token, to 8
// bits with a scale per Q8_COLS columns, or to pairs of bf16. Rows are padded with zeros.
#include "gemm.cuh"

// Fields as `PrepareParams` of gemm.rs.
struct PrepareParams {
    // Only the shape and the column factors are used.
    PackedMatrix w;
    // [tokens][cols].
    const float *x;
    // [tokens][stride].
    u16 *out;
    float *scale;
    // `stride` is in units of 16 bits.
    u32 tokens, stride;
    // Columns of a group of codes, for `gemm_prepare_q8`.
    u32 group, padding;
};

// One block per token. The largest magnitude becomes 2^14 to 2^15, so that f16 does not overflow, and does not lose
// bits of numbers larger than 2^-28 of the largest.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS) gemm_prepare_f16(const PrepareParams a) {
    __shared__ float scratch[GEMM_WARPS];
    const u32 cols = a.w.cols;
    const float *x = a.x + u64(blockIdx.x) * cols;
    const u16 *factors = (a.w.kind & 256)
                             ? reinterpret_cast<const u16 *>(a.w.payload + a.w.segments[0])
                             : nullptr;
    float most = 0.0f;
    for (u32 c = threadIdx.x; c < cols; c += GEMM_THREADS) {
        const float v = x[c] * (factors ? f16_to_f32(factors[c]) : 1.0f);
        most = fmaxf(most, fabsf(v));
    }
#pragma unroll
    for (i32 by = 16; by > 0; by >>= 1)
        most = fmaxf(most, __shfl_xor_sync(ALL, most, by));
    if (threadIdx.x % WARP == 0)
        scratch[threadIdx.x / WARP] = most;
    __syncthreads();
    for (u32 i = 0; i < GEMM_WARPS; ++i)
        most = fmaxf(most, scratch[i]);
    // 2^e ≤ most < 2^(e + 1). NaN and infinities stay what they are.
    const u32 exponent = __float_as_uint(most) >> 23;
    const bool usable = exponent > 20 && exponent < 255;
    const float up = usable ? __uint_as_float((254 + 14 - exponent) << 23) : 1.0f;
    u16 *out = a.out + u64(blockIdx.x) * a.stride;
    for (u32 c = threadIdx.x; c < a.stride; c += GEMM_THREADS) {
        const float v = c < cols ? x[c] * (factors ? f16_to_f32(factors[c]) : 1.0f) : 0.0f;
        out[c] = f32_to_f16(v * up);
    }
    if (threadIdx.x == 0)
        a.scale[blockIdx.x] = usable ? __uint_as_float((exponent - 14) << 23) : 1.0f;
}

// One block per token and one warp per Q8_COLS columns. Activations are rounded to the nearest multiple of 1/127 of the
// largest magnitude, as bytes from −127 to 127. Scales are [columns / Q8_COLS][tokens]. An activation that is not finite
// makes the scale NaN, and with it the results of this token and of no other. Activations so small that the inverse
// overflows count as zero.
//
// Columns are in the order in which gemm_nm_s8.cu multiplies them: with groups of four columns, lane t of the
// instruction has the groups t and t + 4 of eight next to each other.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS) gemm_prepare_q8(const PrepareParams a) {
    const u32 cols = a.w.cols, lane = threadIdx.x % WARP;
    const float *x = a.x + u64(blockIdx.x) * cols;
    const u16 *factors = (a.w.kind & 256)
                             ? reinterpret_cast<const u16 *>(a.w.payload + a.w.segments[0])
                             : nullptr;
    u32 *out = reinterpret_cast<u32 *>(a.out + u64(blockIdx.x) * a.stride);
    for (u32 block = threadIdx.x / WARP; block < ceil_div(cols, Q8_COLS); block += GEMM_WARPS) {
        float v[2][4];
        float most = 0.0f;
        bool finite = true;
#pragma unroll
        for (u32 h = 0; h < 2; ++h)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const u32 c = block * Q8_COLS + (32 * h + lane) * 4 + i;
                v[h][i] = c < cols ? x[c] * (factors ? f16_to_f32(factors[c]) : 1.0f) : 0.0f;
                most = fmaxf(most, fabsf(v[h][i]));
                finite = finite && fabsf(v[h][i]) <= 3.4028235e38f;
            }
#pragma unroll
        for (i32 by = 16; by > 0; by >>= 1)
            most = fmaxf(most, __shfl_xor_sync(ALL, most, by));
        finite = __all_sync(ALL, finite);
        const float inverse = 127.0f / most;
        const bool usable = finite && inverse <= 3.0e38f;
#pragma unroll
        for (u32 h = 0; h < 2; ++h) {
            u32 word = 0;
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                word |= u32((usable ? f32_to_s8(v[h][i] * inverse) : 0) & 255) << 8 * i;
            const u32 four = block * (Q8_COLS / 4) + 32 * h + lane;
            const u32 at = a.group == 4 ? (four & ~7u) | (four & 3) << 1 | (four >> 2 & 1) : four;
            out[at] = word;
        }
        if (lane == 0)
            a.scale[u64(block) * a.tokens + blockIdx.x] = !finite  ? __uint_as_float(0x7fc00000)
                                                          : usable ? most / 127.0f
                                                                   : 0.0f;
    }
}

// Splits activations into sums of two bf16 for gemm_rows.cu: all high parts, then all low parts. One block per token.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS) gemm_prepare_bf16x2(const PrepareParams a) {
    const u32 cols = a.w.cols;
    const float *x = a.x + u64(blockIdx.x) * cols;
    u16 *high = a.out + u64(blockIdx.x) * a.stride, *low = high + u64(a.tokens) * a.stride;
    for (u32 c = threadIdx.x; c < a.stride; c += GEMM_THREADS) {
        const float v = c < cols ? x[c] : 0.0f;
        const u16 upper = f32_to_bf16(v);
        high[c] = upper;
        // An infinity or NaN has no low part.
        low[c] = (upper & 0x7f80) == 0x7f80 ? 0 : f32_to_bf16(v - bf16_to_f32(upper));
    }
}
