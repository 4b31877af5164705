// Operations of conversion on matrices, between the products of cuBLAS and cuSOLVER. All are bound by memory
// bandwidth.
#include "ptx.cuh"

constexpr u32 THREADS = 256;

// Fields as `HessianParams` of hessian.rs.
struct HessianParams {
    // [n][n].
    float *f32;
    double *f64, *identity;
    u32 n;
    float scale;
};

// Fields as `SubmatrixParams` of hessian.rs: [rows][cols], with a row every `stride` elements.
struct SubmatrixParams {
    float *to;
    const float *from, *minus;
    u64 to_stride, from_stride;
    u32 rows, cols;
};

// Fields as `BlockDotsParams` of hessian.rs.
struct BlockDotsParams {
    // [rows][cols], with a row every `stride` elements.
    const float *a, *b;
    u64 a_stride, b_stride;
    // [rows][blocks].
    double *out;
    u32 rows, cols;
    // Columns of a block.
    u32 span, blocks;
};

STB_DEVICE u64 element() { return u64(blockIdx.x) * THREADS + threadIdx.x; }

extern "C" {
// Converts a matrix to f64 in reverse order, because the lower factor of the reversed matrix is the upper factor
// of the matrix. Also writes an identity matrix.
__global__ void __launch_bounds__(THREADS) reverse_to_f64(const __grid_constant__ HessianParams a) {
    const u64 i = element(), all = u64(a.n) * a.n;
    if (i >= all)
        return;
    a.f64[i] = double(a.f32[all - 1 - i]);
    a.identity[i] = i % (a.n + 1) == 0 ? 1.0 : 0.0;
}

// Converts a lower triangle to f32 in reverse order, which makes it an upper triangle, with zeros below.
__global__ void __launch_bounds__(THREADS) reverse_to_f32(const __grid_constant__ HessianParams a) {
    const u64 i = element(), all = u64(a.n) * a.n;
    if (i >= all)
        return;
    const u32 row = u32(i / a.n), col = u32(i % a.n);
    a.f32[i] = col >= row ? float(a.f64[all - 1 - i]) : 0.0f;
}

// Scales the lower triangle of the sums and mirrors it.
__global__ void __launch_bounds__(THREADS) finish_hessian(const __grid_constant__ HessianParams a) {
    const u64 i = element();
    if (i >= u64(a.n) * a.n)
        return;
    const u32 row = u32(i / a.n), col = u32(i % a.n);
    if (col > row)
        return;
    const float v = a.f32[i] * a.scale;
    a.f32[i] = v;
    if (col < row)
        a.f32[u64(col) * a.n + row] = v;
}

// to = from − minus, or to = from. `minus` has the layout of `from`.
__global__ void __launch_bounds__(THREADS) copy_submatrix(const __grid_constant__ SubmatrixParams a) {
    const u64 i = element();
    if (i >= u64(a.rows) * a.cols)
        return;
    const u64 row = i / a.cols, col = i % a.cols, at = row * a.from_stride + col;
    a.to[row * a.to_stride + col] = a.minus ? a.from[at] - a.minus[at] : a.from[at];
}

// Σ a · b over each block of columns of each row, in f64. A warp computes one sum, always in the same order.
__global__ void __launch_bounds__(THREADS) block_dots(const __grid_constant__ BlockDotsParams a) {
    const u64 i = element() / 32;
    if (i >= u64(a.rows) * a.blocks)
        return;
    const u32 block = u32(i % a.blocks), lane = threadIdx.x % 32;
    const u64 row = i / a.blocks;
    const u32 first = block * a.span;
    const u32 end = a.cols - first < a.span ? a.cols : first + a.span;
    double sum = 0.0;
    for (u32 c = first + lane; c < end; c += 32)
        sum += double(a.a[row * a.a_stride + c]) * double(a.b[row * a.b_stride + c]);
#pragma unroll
    for (int by = 16; by > 0; by >>= 1) {
        // Shuffles move words of 32 bits.
        const u64 bits = u64(__double_as_longlong(sum));
        const u32 low = __shfl_xor_sync(0xffffffff, u32(bits), by);
        const u32 high = __shfl_xor_sync(0xffffffff, u32(bits >> 32), by);
        sum += __longlong_as_double(i64(u64(high) << 32 | low));
    }
    if (lane == 0)
        a.out[i] = sum;
}
}
