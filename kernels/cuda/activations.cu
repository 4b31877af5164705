// The operations that GEMV kernels fuse into reading their input, for products that do not.
#include "common.cuh"

// Fields as `ActivationParams` of activations.rs.
struct ActivationParams {
    // [tokens][cols]; `with` as in GemvParams.
    const float *x, *with;
    float *out;
    u32 cols, input;
    float eps;
    u32 padding;
};

extern "C" {
// One block per token.
__global__ void __launch_bounds__(THREADS) compute_activations(const __grid_constant__ ActivationParams a) {
    __shared__ float scratch[WARPS];
    const float *x = a.x + u64(blockIdx.x) * a.cols;
    float *out = a.out + u64(blockIdx.x) * a.cols;
    float scale = 1.0f;
    if (a.input == INPUT_RMS_NORM) {
        float sum = 0.0f;
        for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x)
            sum = fmaf(x[c], x[c], sum);
        scale = 1.0f / sqrtf(block_sum(sum, scratch) / float(a.cols) + a.eps);
    }
    for (u32 c = threadIdx.x; c < a.cols; c += blockDim.x) {
        const float v = x[c];
        out[c] = a.input == INPUT_RMS_NORM   ? v * scale * a.with[c]
                 : a.input == INPUT_SWIGLU ? silu(v) * a.with[u64(blockIdx.x) * a.cols + c]
                                    : v + a.with[u64(blockIdx.x) * a.cols + c];
    }
}
}
