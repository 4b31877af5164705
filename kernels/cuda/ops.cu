// Operations on activations that the matrix-vector kernels have built in, for products that lack
// them; and the choice of the most likely token.
#include "common.cuh"

// Fields as `Params` of ops.rs.
struct Materialise {
    // [tokens][cols]; `with` as in MatVec.
    const float *x, *with;
    float *out;
    u32 cols, source;
    float eps;
    u32 padding;
};

struct Argmax {
    // [tokens][n].
    const float *x;
    u32 *out;
    u32 n, padding;
};

extern "C" {
// A block per token.
__global__ void __launch_bounds__(THREADS) materialise(const __grid_constant__ Materialise a) {
    __shared__ float scratch[WARPS];
    const float *x = a.x + u64(blockIdx.x) * a.cols;
    float *out = a.out + u64(blockIdx.x) * a.cols;
    float scale = 1.0f;
    if (a.source == NORM) {
        float sum = 0.0f;
        for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x)
            sum = fmaf(x[c], x[c], sum);
        scale = 1.0f / sqrtf(block_sum(sum, scratch) / float(a.cols) + a.eps);
    }
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) {
        const float v = x[c];
        out[c] = a.source == NORM   ? v * scale * a.with[c]
                 : a.source == SILU ? silu(v) * a.with[u64(blockIdx.x) * a.cols + c]
                                    : v + a.with[u64(blockIdx.x) * a.cols + c];
    }
}

// The index of the first largest number; NaN is never larger. A block per token.
__global__ void __launch_bounds__(THREADS) argmax(const __grid_constant__ Argmax a) {
    __shared__ float values[WARPS];
    __shared__ u32 indices[WARPS];
    const float *x = a.x + u64(blockIdx.x) * a.n;
    float best = __uint_as_float(0xff800000);
    u32 index = 0xffffffff;
    for (u32 i = threadIdx.x; i < a.n; i += blockDim.x)
        if (x[i] > best)
            best = x[i], index = i;
#pragma unroll
    for (int by = 16; by > 0; by >>= 1) {
        const float other = __shfl_xor_sync(ALL, best, by);
        const u32 at = __shfl_xor_sync(ALL, index, by);
        if (other > best || (other == best && at < index))
            best = other, index = at;
    }
    if (threadIdx.x % WARP == 0)
        values[threadIdx.x / WARP] = best, indices[threadIdx.x / WARP] = index;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 i = 1; i < WARPS; ++i)
            if (values[i] > best || (values[i] == best && indices[i] < index))
                best = values[i], index = indices[i];
        a.out[blockIdx.x] = index < a.n ? index : 0;
    }
}
}
