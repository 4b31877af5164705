// GEMV for encodings whose rows are computed one by one: -DCODEC_HEADER="codec_int_group.cuh" -DCODEC=Int4 and
// so on.
//
// A warp computes R rows at once, and a lane reads pieces of 16 bytes of each row. Loads are coalesced over the
// lanes, and R loads are in flight at once. The activations of a slab of columns are in shared memory, and a
// lane reads those of its piece once for all R rows. Pieces in shared memory have 4 words of padding, so that
// the lanes of a quarter-warp read different banks.
#include CODEC_HEADER

// a · b + sum, in the order of the columns.
STB_DEVICE float dot4(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// Rows that a warp computes at once for T tokens.
template <u32 T> constexpr u32 rows_at_once() { return T == 1 ? 4 : 2; }

// ---- Activations in f32 --------------------------------------------------------------------------

// Instructions per weight: n for the codec (1/2 + 2 for integers of 4 bits), T to multiply, and (1 + T)/4R to
// load activations.
template <class C, u32 T> STB_DEVICE void gemv_f32(const GemvParams &a) {
    constexpr u32 R = rows_at_once<T>(), UNITS = C::PIECE / C::UNIT;
    constexpr u32 STRIDE = C::PIECE == 4 ? 4 : C::PIECE + 4; // Words of a piece in shared memory.
    STB_DYNAMIC_SHARED(shared);
    __shared__ u32 flag;
    __shared__ float scratch[WARPS];
    const BlockWork p = block_work<T>(a);
    const PackedMatrix &m = a.matrices[p.matrix];
    const u32 pieces = a.slab / C::PIECE;
    // Activations, [T][pieces][STRIDE], then sums, [block_rows][T].
    float *x = reinterpret_cast<float *>(shared), *sums = x + T * pieces * STRIDE;
    {
        const Activations<T> activations(a, p, scratch);
#pragma unroll
        for (u32 t = 0; t < T; ++t)
            for (u32 c = threadIdx.x; c < a.slab; c += THREADS)
                x[(t * pieces + c / C::PIECE) * STRIDE + c % C::PIECE] = activations(t, p.first_col + c);
    }
    __syncthreads();
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 used = ceil_div(p.cols, C::PIECE);
    for (u32 first = warp * R; first < p.rows; first += WARPS * R) {
        float acc[R][T] = {};
        for (u32 piece = lane; piece < used; piece += WARP) {
            const u32 at = p.first_col / C::PIECE + piece;
            typename C::Raw raw[R];
#pragma unroll
            for (u32 r = 0; r < R; ++r)
                raw[r] = C::load(m, p.first_row + least(first + r, p.rows - 1), at);
#pragma unroll
            for (u32 u = 0; u < UNITS; ++u) {
                typename C::Scale scale[R];
                float sum[R][T] = {};
#pragma unroll
                for (u32 r = 0; r < R; ++r)
                    scale[r] = C::scale(m, p.first_row + least(first + r, p.rows - 1), at * UNITS + u);
#pragma unroll
                for (u32 i = 0; i < C::UNIT / 4; ++i) {
                    float4 xs[T];
#pragma unroll
                    for (u32 t = 0; t < T; ++t)
                        xs[t] = *reinterpret_cast<const float4 *>(
                            &x[(t * pieces + piece) * STRIDE + u * C::UNIT + 4 * i]);
#pragma unroll
                    for (u32 r = 0; r < R; ++r) {
                        const float4 w = C::weights4(raw[r], scale[r], u, i);
#pragma unroll
                        for (u32 t = 0; t < T; ++t)
                            sum[r][t] = dot4(w, xs[t], sum[r][t]);
                    }
                }
#pragma unroll
                for (u32 r = 0; r < R; ++r)
#pragma unroll
                    for (u32 t = 0; t < T; ++t)
                        acc[r][t] = fmaf(C::multiplier(scale[r]), sum[r][t], acc[r][t]);
            }
        }
#pragma unroll
        for (u32 r = 0; r < R; ++r)
#pragma unroll
            for (u32 t = 0; t < T; ++t) {
                const float sum = warp_sum(acc[r][t]);
                if (lane == 0 && first + r < p.rows)
                    sums[(first + r) * T + t] = sum;
            }
    }
    __syncthreads();
    finish<T>(a, p, sums, &flag);
}

// ---- Activations in 8 bits with a scale per 32 columns -----------------------------------------------

// Words from one piece of activations to the next.
template <class C> constexpr u32 stride_q8() { return C::PIECE / 4 + 4; }

// Rounds the activations of a slab into shared memory: words of four activations, [T][pieces][stride_q8], and the
// scale and the scaled sum of each unit of 32 columns, [T][units].
template <class C, u32 T>
STB_DEVICE void quantize_activations(u32 *x, float2 *scales, const GemvParams &a, const BlockWork &p, float *scratch) {
    constexpr u32 UNITS = C::PIECE / C::UNIT, STRIDE = stride_q8<C>();
    const u32 pieces = a.slab / C::PIECE, units = a.slab / 32;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Activations<T> activations(a, p, scratch);
#pragma unroll
    for (u32 t = 0; t < T; ++t)
        for (u32 unit = warp; unit < units; unit += WARPS) {
            const float v = activations(t, p.first_col + unit * 32 + C::column(lane));
            float most = fabsf(v);
#pragma unroll
            for (int by = 16; by > 0; by >>= 1)
                most = fmaxf(most, __shfl_xor_sync(ALL, most, by));
            // Activations so small that the inverse overflows count as zero. An activation that is not
            // finite makes the result NaN.
            const float inverse = 127.0f / most;
            const bool fine = inverse <= 3.0e38f;
            const i32 code = fine && v == v ? f32_to_s8(v * inverse) : 0;
            const bool poisoned = __any_sync(ALL, !(fabsf(v) <= 3.4028235e38f));
            const i32 total = i32(__reduce_add_sync(ALL, code));
            u32 word = u32(code & 255) << 8 * (lane % 4);
            word |= __shfl_xor_sync(ALL, word, 1);
            word |= __shfl_xor_sync(ALL, word, 2);
            if (lane % 4 == 0)
                x[(t * pieces + unit / UNITS) * STRIDE + unit % UNITS * 8 + lane / 4] = word;
            if (lane == 0) {
                const float scale = poisoned ? __uint_as_float(0x7fc00000) : fine ? most / 127.0f : 0.0f;
                scales[t * units + unit] = make_float2(scale, scale * float(total));
            }
        }
}

// Instructions per weight: 3/8 to extract and T/4 to multiply for integers of 4 bits, 1/2 and T/4 for 1 bit.
template <class C, u32 T> STB_DEVICE void gemv_q8(const GemvParams &a) {
    constexpr u32 R = rows_at_once<T>();
    constexpr u32 UNITS = C::PIECE / C::UNIT;
    constexpr u32 STRIDE = stride_q8<C>();
    STB_DYNAMIC_SHARED(shared);
    __shared__ u32 flag;
    __shared__ float scratch[WARPS];
    const BlockWork p = block_work<T>(a);
    const PackedMatrix &m = a.matrices[p.matrix];
    const u32 pieces = a.slab / C::PIECE, units = a.slab / 32;
    // Words of four activations, [T][pieces][STRIDE]; the scale and the scaled sum of each unit, [T][units];
    // sums, [block_rows][T].
    u32 *x = reinterpret_cast<u32 *>(shared);
    float2 *scales = reinterpret_cast<float2 *>(x + T * pieces * STRIDE);
    float *sums = reinterpret_cast<float *>(scales + T * units);
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    quantize_activations<C, T>(x, scales, a, p, scratch);
    __syncthreads();

    const u32 used = ceil_div(p.cols, C::PIECE);
    for (u32 first = warp * R; first < p.rows; first += WARPS * R) {
        float acc[R][T] = {};
        for (u32 piece = lane; piece < used; piece += WARP) {
            const u32 at = p.first_col / C::PIECE + piece;
            typename C::Raw raw[R];
#pragma unroll
            for (u32 r = 0; r < R; ++r)
                raw[r] = C::load(m, p.first_row + least(first + r, p.rows - 1), at);
#pragma unroll
            for (u32 u = 0; u < UNITS; ++u) {
                typename C::Scale scale[R];
#pragma unroll
                for (u32 r = 0; r < R; ++r)
                    scale[r] = C::scale(m, p.first_row + least(first + r, p.rows - 1), at * UNITS + u);
#pragma unroll
                for (u32 t = 0; t < T; ++t) {
                    const u32 *from = &x[(t * pieces + piece) * STRIDE + u * 8];
                    const uint4 low = *reinterpret_cast<const uint4 *>(from);
                    const uint4 high = *reinterpret_cast<const uint4 *>(from + 4);
                    const u32 words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
                    const float2 xs = scales[t * units + piece * UNITS + u];
#pragma unroll
                    for (u32 r = 0; r < R; ++r)
                        acc[r][t] += C::dot(raw[r], scale[r], u, words, xs.x, xs.y);
                }
            }
        }
#pragma unroll
        for (u32 r = 0; r < R; ++r)
#pragma unroll
            for (u32 t = 0; t < T; ++t) {
                const float sum = warp_sum(acc[r][t]);
                if (lane == 0 && first + r < p.rows)
                    sums[(first + r) * T + t] = sum;
            }
    }
    __syncthreads();
    finish<T>(a, p, sums, &flag);
}

// ---- Conversion to f32 -----------------------------------------------------------------------------

// Block (x, y) converts part x of row y.
template <class C> STB_DEVICE void dequantize(const DequantizeParams &a) {
    const PackedMatrix &m = a.matrix;
    const u32 piece = blockIdx.x * blockDim.x + threadIdx.x;
    if (piece * C::PIECE >= m.cols)
        return;
    const u32 row = a.ids != nullptr ? a.ids[blockIdx.y] : blockIdx.y;
    if (row >= m.rows)
        return;
    const typename C::Raw raw = C::load(m, row, piece);
    float *out = a.out + u64(blockIdx.y) * m.cols;
#pragma unroll
    for (u32 u = 0; u < C::PIECE / C::UNIT; ++u) {
        const typename C::Scale scale = C::scale(m, row, piece * (C::PIECE / C::UNIT) + u);
        const float factor = C::multiplier(scale);
#pragma unroll
        for (u32 i = 0; i < C::UNIT / 4; ++i) {
            const float4 w = C::weights4(raw, scale, u, i);
            const float four[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (u32 k = 0; k < 4; ++k) {
                const u32 c = piece * C::PIECE + u * C::UNIT + 4 * i + k;
                if (c < m.cols)
                    out[c] = factor * four[k];
            }
        }
    }
}

extern "C" {
__global__ void __launch_bounds__(THREADS) gemv_f32_1(const __grid_constant__ GemvParams a) { gemv_f32<CODEC, 1>(a); }
__global__ void __launch_bounds__(THREADS) gemv_f32_2(const __grid_constant__ GemvParams a) { gemv_f32<CODEC, 2>(a); }
__global__ void __launch_bounds__(THREADS) gemv_f32_4(const __grid_constant__ GemvParams a) { gemv_f32<CODEC, 4>(a); }
__global__ void __launch_bounds__(THREADS) gemv_q8_1(const __grid_constant__ GemvParams a) {
    if constexpr (CODEC::HAS_Q8)
        gemv_q8<CODEC, 1>(a);
}
__global__ void __launch_bounds__(THREADS) gemv_q8_2(const __grid_constant__ GemvParams a) {
    if constexpr (CODEC::HAS_Q8)
        gemv_q8<CODEC, 2>(a);
}
__global__ void __launch_bounds__(THREADS) gemv_q8_4(const __grid_constant__ GemvParams a) {
    if constexpr (CODEC::HAS_Q8)
        gemv_q8<CODEC, 4>(a);
}
__global__ void __launch_bounds__(THREADS) dequantize_rows(const __grid_constant__ DequantizeParams a) { dequantize<CODEC>(a); }
}
