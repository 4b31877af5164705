// Operations on activations that the matrix-vector kernels have built in, for products that lack them.
#include "common.cuh"

// Fields as `Params` of ops.rs.
struct Materialize {
    // [tokens][cols]; `with` as in Gemv.
    const float *x, *with;
    float *out;
    u32 cols, source;
    float eps;
    u32 padding;
};

extern "C" {
// A block per token.
__global__ void __launch_bounds__(THREADS) materialize(const __grid_constant__ Materialize a) {
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
}
