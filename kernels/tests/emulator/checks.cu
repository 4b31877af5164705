// Kernels that test the emulator: instructions with given registers, and misuse that must be found.
#include "ptx.cuh"

// d[32][4] += a[32][4] · b[32][4] for one warp, each lane with its registers from memory.
#define INSTRUCTION(name, type, n_b, call)                                                         \
    extern "C" __global__ void name(type *d, const u32 *a, const u32 *b, const u32 *metadata) {    \
        const u32 lane = threadIdx.x;                                                              \
        type sums[4];                                                                              \
        u32 left[4], right[n_b];                                                                   \
        for (int i = 0; i < 4; ++i)                                                                \
            sums[i] = d[lane * 4 + i], left[i] = a[lane * 4 + i];                                  \
        for (int i = 0; i < n_b; ++i)                                                              \
            right[i] = b[lane * 4 + i];                                                            \
        call;                                                                                      \
        for (int i = 0; i < 4; ++i)                                                                \
            d[lane * 4 + i] = sums[i];                                                             \
    }
INSTRUCTION(run_mma_f16, float, 2, mma_f16(sums, left, right))
INSTRUCTION(run_mma_bf16, float, 2, mma_bf16(sums, left, right))
INSTRUCTION(run_mma_s8, i32, 2, mma_s8(sums, left, right))
INSTRUCTION(run_mma_sp_f16_0, float, 4, mma_sp_f16<0>(sums, left, right, metadata[lane]))
INSTRUCTION(run_mma_sp_f16_1, float, 4, mma_sp_f16<1>(sums, left, right, metadata[lane]))
INSTRUCTION(run_mma_sp_bf16_0, float, 4, mma_sp_bf16<0>(sums, left, right, metadata[lane]))
INSTRUCTION(run_mma_sp_bf16_1, float, 4, mma_sp_bf16<1>(sums, left, right, metadata[lane]))
INSTRUCTION(run_mma_sp_s8, i32, 4, mma_sp_s8(sums, left, right, metadata[lane]))

// y[r] = Σ x[r, c] for rows of 64: through shared memory, a block per row.
extern "C" __global__ void row_sums(float *y, const float *x) {
    STB_DYNAMIC_SHARED(raw);
    float *parts = reinterpret_cast<float *>(raw);
    parts[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
    for (u32 half = 32; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    if (threadIdx.x == 0)
        y[blockIdx.x] = parts[0];
}

extern "C" __global__ void missing_barrier(float *y, const float *x) {
    STB_DYNAMIC_SHARED(raw);
    float *parts = reinterpret_cast<float *>(raw);
    parts[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = parts[threadIdx.x ^ 63];
}

extern "C" __global__ void divergent_barrier(float *y, const float *) {
    if (threadIdx.x % 2 == 0)
        __syncthreads();
    else
        __syncthreads();
    y[0] = 1;
}

extern "C" __global__ void lanes_that_stay_away(float *y, const float *x) {
    if (threadIdx.x < 16)
        y[threadIdx.x] = __shfl_xor_sync(0xffffffff, x[threadIdx.x], 1);
}

extern "C" __global__ void absent_lane(float *y, const float *x) {
    if (threadIdx.x < 16)
        y[threadIdx.x] = __shfl_sync(0xffff, x[threadIdx.x], 20);
}

extern "C" __global__ void barrier_nobody_reaches(float *y, const float *) {
    if (threadIdx.x == 32)
        __syncwarp(3);
    else
        __syncthreads();
    y[0] = 1;
}

extern "C" __global__ void beyond_global(float *y, const float *x) {
    y[threadIdx.x] = x[threadIdx.x + 1];
}

extern "C" __global__ void beyond_shared(float *y, const float *) {
    STB_DYNAMIC_SHARED(raw);
    y[threadIdx.x] = reinterpret_cast<float *>(raw)[threadIdx.x + 1];
}

extern "C" __global__ void misaligned(float *y, const float *x) {
    y[threadIdx.x] = reinterpret_cast<const float4 *>(x + 1)->x;
}

// Reads a copy that may not have arrived: waits for all groups but one too many.
extern "C" __global__ void early_read(float *y, const float *x) {
    STB_DYNAMIC_SHARED(raw);
    float *to = reinterpret_cast<float *>(raw);
    to[threadIdx.x] = 0;
    copy_async<4>(to + threadIdx.x, x + threadIdx.x);
    copy_commit();
    copy_wait<1>();
    y[threadIdx.x] = to[threadIdx.x];
    copy_wait<0>();
}

extern "C" __global__ void copies(float *y, const float *x, u32 n) {
    STB_DYNAMIC_SHARED(raw);
    float *to = reinterpret_cast<float *>(raw);
    const u32 at = threadIdx.x * 4;
    // What is not there becomes zero.
    const u32 valid = at >= n ? 0 : n - at >= 4 ? 16 : (n - at) * 4;
    copy_async16(to + at, valid ? x + at : x, valid);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    for (u32 i = threadIdx.x; i < 256; i += 64)
        y[i] = to[i];
}

// Conversions of all f16 and of given f32: out[i] = f16(f32), back[i] = f32(f16 i).
extern "C" __global__ void conversions(u16 *out, const float *x, float *back, u32 n) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n)
        out[i] = f32_to_f16(x[i]), out[n + i] = f32_to_bf16(x[i]);
    if (i < 65536)
        back[i] = f16_to_f32(u16(i));
}

// prmt, dp4a, f16x2 arithmetic.
extern "C" __global__ void words(u32 *y, const u32 *x) {
    y[0] = permute(x[0], x[1], 0x7531);
    y[1] = permute(x[0], x[1], 0xfb08);
    y[2] = u32(__dp4a(i32(x[0]), i32(x[1]), 5));
    y[3] = f16x2_fma(0x3c004000, 0x42003800, 0x3c00bc00); // 2·0.5−1, 1·3+1
    y[4] = f16x2(1.0f, -2.0f);
    y[5] = u32(f32_to_s8(-200.0f)) & 255;
}
