// Shared by all kernels: packed matrices, the parameters and input of a GEMV, and the sum of partial results
// without a second kernel.
#pragma once
#include "ptx.cuh"

constexpr u32 WARP = 32;
// Threads and warps of a block of the GEMV kernels.
constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 ALL = 0xffffffff;

STB_DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }
STB_DEVICE u32 least(u32 a, u32 b) { return a < b ? a : b; }

// A packed matrix. The payload is exactly as in the file. Fields as `MatrixParams` of encoding/interface.rs.
struct PackedMatrix {
    const u8 *payload;
    // Bytes from the start of the payload to each segment.
    u64 segments[4];
    u32 rows, cols;
    // Integer groups: units of 32 columns of a row, including its padding. STBLLM: units of 64 columns. N:M:
    // bytes of the codes of a tile.
    u32 units;
    // Columns of a group (integers) or of a block (others); 0 if there are no block scales.
    u32 block;
    // STBLLM: N. N:M and trellis codes: bits of a block scale, plus 256 if there are column factors.
    u32 kind;
    u32 padding;
};

// The operation that a kernel applies to the activations as it reads them: `ActivationInput` of input.rs.
enum InputKind : u32 {
    INPUT_PLAIN,    // x
    INPUT_RMS_NORM, // x · with / sqrt(mean(x²) + eps)
    INPUT_SWIGLU,   // silu(x) · with
};

// y[t][r] (+)= Σ_c w[r, c] · x[t][c] for up to three matrices with one encoding and one input.
// Fields as `GemvParams` of gemv.rs.
struct GemvParams {
    PackedMatrix matrices[3];
    // [tokens][rows of the matrix].
    float *out[3];
    // x is [tokens][cols]. `with` is the weight of the norm, [cols], or the other input, [tokens][cols].
    const float *x, *with;
    // For each row block and token group, the sums of each slab, [slabs][block_rows · T], and the number of
    // slabs that have arrived.
    float *partial;
    u32 *arrived;
    u32 count, tokens;
    u32 input;
    // Whether results are added to `out`.
    u32 add;
    // Columns of a slab, and the number of slabs.
    u32 slab, slabs;
    u32 block_rows;
    float eps;
};

STB_DEVICE float warp_sum(float v) {
#pragma unroll
    for (int by = 16; by > 0; by >>= 1)
        v += __shfl_xor_sync(ALL, v, by);
    return v;
}

STB_DEVICE float silu(float v) { return v / (1.0f + expf(-v)); }

// Returns Σ `v` over the block to all threads. `scratch` has room for a float per warp.
STB_DEVICE float block_sum(float v, float *scratch) {
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % WARP == 0)
        scratch[threadIdx.x / WARP] = v;
    __syncthreads();
    float sum = 0.0f;
    for (u32 i = 0; i < blockDim.x / WARP; ++i)
        sum += scratch[i];
    return sum;
}

// The work of a block: some rows of a matrix, a slab of columns, T tokens.
struct BlockWork {
    u32 matrix;
    u32 first_row, rows;
    u32 first_col, cols;
    u32 first_token, tokens;
};

template <u32 T> STB_DEVICE BlockWork block_work(const GemvParams &a) {
    BlockWork p;
    u32 block = blockIdx.x;
    p.matrix = 0;
    while (p.matrix + 1 < a.count) {
        const u32 blocks = ceil_div(a.matrices[p.matrix].rows, a.block_rows);
        if (block < blocks)
            break;
        block -= blocks;
        ++p.matrix;
    }
    const PackedMatrix &m = a.matrices[p.matrix];
    p.first_row = block * a.block_rows;
    p.rows = least(a.block_rows, m.rows - p.first_row);
    p.first_col = blockIdx.y * a.slab;
    p.cols = least(a.slab, m.cols - p.first_col);
    p.first_token = blockIdx.z * T;
    p.tokens = least(T, a.tokens - p.first_token);
    return p;
}

// The activations of T tokens. Tokens and columns that do not exist are zero.
template <u32 T> struct Activations {
    const GemvParams &a;
    const BlockWork &p;
    float scale[T];

    // Called by all threads of the block. Every block computes the norm itself, from L2, which is cheaper than
    // a kernel.
    STB_DEVICE Activations(const GemvParams &a, const BlockWork &p, float *scratch) : a(a), p(p) {
        const u32 cols = a.matrices[0].cols;
#pragma unroll
        for (u32 t = 0; t < T; ++t) {
            scale[t] = 1.0f;
            if (a.input == INPUT_RMS_NORM && t < p.tokens) {
                const float *x = a.x + u64(p.first_token + t) * cols;
                float sum = 0.0f;
                for (u32 c = threadIdx.x; c < cols; c += blockDim.x)
                    sum = fmaf(x[c], x[c], sum);
                scale[t] = 1.0f / sqrtf(block_sum(sum, scratch) / float(cols) + a.eps);
            }
        }
    }

    // The activation of token t and column c.
    STB_DEVICE float operator()(u32 t, u32 c) const {
        const u32 cols = a.matrices[0].cols;
        if (t >= p.tokens || c >= cols)
            return 0.0f;
        const u64 at = u64(p.first_token + t) * cols + c;
        const float x = a.x[at];
        if (a.input == INPUT_RMS_NORM)
            return x * scale[t] * a.with[c];
        if (a.input == INPUT_SWIGLU)
            return silu(x) * a.with[at];
        return x;
    }
};

// Writes the sums of this block, `sums[row][T]` in shared memory, which all threads can read. With several
// slabs, the last block to arrive adds the sums of all slabs in their order, so the result does not depend
// on which block is last. The counter is zero before and after.
template <u32 T> STB_DEVICE void finish(const GemvParams &a, const BlockWork &p, const float *sums, u32 *flag) {
    const u32 n = p.rows * T;
    float *out = a.out[p.matrix];
    const u32 rows = a.matrices[p.matrix].rows;
    const u32 group = blockIdx.z * gridDim.x + blockIdx.x;
    float *partial = a.partial + u64(group) * a.slabs * a.block_rows * T;
    if (a.slabs > 1) {
        for (u32 i = threadIdx.x; i < n; i += blockDim.x)
            __stcg(&partial[blockIdx.y * a.block_rows * T + i], sums[i]);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            *flag = atomicAdd(&a.arrived[group], 1u) + 1 == a.slabs;
            if (*flag)
                a.arrived[group] = 0;
        }
        __syncthreads();
        if (*flag == 0)
            return;
        __threadfence();
    }
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        const u32 t = i % T, r = i / T;
        if (t >= p.tokens)
            continue;
        float sum = 0.0f;
        if (a.slabs > 1) {
            for (u32 s = 0; s < a.slabs; ++s)
                sum += __ldcg(&partial[s * a.block_rows * T + i]);
        } else {
            sum = sums[i];
        }
        float &to = out[u64(p.first_token + t) * rows + p.first_row + r];
        to = a.add ? to + sum : sum;
    }
}

// Rows of a matrix, converted to f32. Fields as `DequantizeParams` of gemv.rs.
struct DequantizeParams {
    PackedMatrix matrix;
    // The row numbers; nullptr for all rows in order.
    const u32 *ids;
    // [count][cols].
    float *out;
    u32 count, padding;
};
