// Activations for the products with many tokens: column factors applied, in f16 with a power of two per token, padded
// with zeros.
#include "gemm.cuh"

// Fields as `PrepareParams` of gemm.rs.
struct Prepare {
    // Only the column factors are used, if there are any.
    Matrix w;
    // [tokens][cols].
    const float *x;
    // [tokens][stride].
    u16 *out;
    float *scale;
    u32 tokens, stride;
};

// A block per token. The largest number becomes 2^14 to 2^15, so that f16 neither overflows nor loses
// bits of anything larger than 2^-28 of it.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS) gemm_prepare(const Prepare a) {
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
    // 2^e ≤ most < 2^(e + 1). Numbers that are no numbers stay so.
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

// Activations as sums of two bf16 for gemm_rows.cu: all high parts, then all low parts. A block per token.
extern "C" __global__ void __launch_bounds__(GEMM_THREADS) gemm_split(const Prepare a) {
    const u32 cols = a.w.cols;
    const float *x = a.x + u64(blockIdx.x) * cols;
    u16 *high = a.out + u64(blockIdx.x) * a.stride, *low = high + u64(a.tokens) * a.stride;
    for (u32 c = threadIdx.x; c < a.stride; c += GEMM_THREADS) {
        const float v = c < cols ? x[c] : 0.0f;
        const u16 upper = f32_to_bf16(v);
        high[c] = upper;
        // Nothing to add to what is infinite.
        low[c] = (upper & 0x7f80) == 0x7f80 ? 0 : f32_to_bf16(v - bf16_to_f32(upper));
    }
}
