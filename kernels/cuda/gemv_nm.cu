// GEMV for the N:M sparse-sign encoding (spec/encodings.md §5): -DNM_N=1 -DNM_M=8 and so on.
//
// The code of a group selects one of few sums of the group's M activations. A block computes the lookup table of
// all these sums for a slab of columns in shared memory, once for all its rows. Every lane has its own entries in
// its own bank, so a lookup for a group of 8 weights takes one cycle of the banks whatever the codes are. A lane
// loads 16 bytes of a plane: 16 rows of one group out of four, in QV quads. Activations are not rounded. Two codes
// of 1:4 share a lookup, because they have six bits together.
//
// A lookup takes a shift and a mask for each plane, the load and an addition (for 2:8 also a shift and a mask for
// the sign). The banks serve 32 lookups per cycle and multiprocessor. DECODE.md has the counts in the machine code
// and the roofline.
#include "common.cuh"

constexpr u32 N = NM_N, M = NM_M;
constexpr u32 P = M == 8 ? 3 : 2;
constexpr u32 BETA = N * P + 1;
// The planes of a code, from its low bits: widths 4, 2 and 1, as far as they are binary digits of BETA.
constexpr u32 WIDTH_0 = BETA >= 4 ? 4 : 2;
constexpr u32 WIDTH_1 = BETA == 4 ? 0 : BETA == 7 ? 2 : 1;
constexpr u32 WIDTH_2 = BETA == 7 ? 1 : 0;
// Vectors of the widest plane in a chunk of 8 quads, and the quads of a vector, which a lane reads at a time.
constexpr u32 VECTORS = WIDTH_0;
constexpr u32 QV = 8 / WIDTH_0;
// The sign of 2:8 is applied to the looked-up value. The tables of other rates include the sign.
constexpr bool SIGN_APART = BETA == 7;
// The number of codes that share a lookup: for 1:4 the codes of two quads, 16 columns apart. Then their bits in the
// planes, and the number of lookups for a vector.
constexpr u32 PAIR = N == 1 && M == 4 ? 2 : 1;
constexpr u32 BITS_0 = PAIR * WIDTH_0, BITS_1 = PAIR * WIDTH_1, LOOKS = QV / PAIR;
constexpr u32 ENTRIES = 1u << (SIGN_APART ? BETA - 1 : PAIR * BETA);
// Columns of a quad, and of a vector of four neighboring lanes.
constexpr u32 QUAD = 4 * M;
constexpr u32 STEP = QV * QUAD;
// Vectors that a lane reads in a step with T tokens. Two neighboring vectors mostly share block scales.
constexpr STB_DEVICE u32 vectors_of(u32 t) { return t == 1 ? 2 : 1; }
constexpr u32 TILE = 16;

// Columns of a lookup table.
constexpr u32 TABLE_COLS = PAIR * M;
// Bytes of a lookup table for one token. With one token, tables begin at multiples of this size, so that a code
// and an offset form an address without an addition.
constexpr u32 TABLE = ENTRIES * WARP * 4;

// Computes Σ ±activation over the kept weights of a code, or of two codes that share a lookup.
template <u32 T> STB_DEVICE void entry(const float (&x)[TABLE_COLS][T], u32 code, float (&sum)[T]) {
#pragma unroll
    for (u32 t = 0; t < T; ++t)
        sum[t] = 0.0f;
    if constexpr (N == 1) {
#pragma unroll
        for (u32 s = 0; s < PAIR; ++s) {
            // The positions of both codes come first, then their signs.
            const u32 i = code >> s * P & (M - 1);
            const float sign = code >> (PAIR * P + s) & 1 ? -1.0f : 1.0f;
#pragma unroll
            for (u32 k = 0; k < M; ++k)
#pragma unroll
                for (u32 t = 0; t < T; ++t)
                    sum[t] += k == i ? sign * x[s * M + k][t] : 0.0f;
        }
    } else {
        const u32 i = code & (M - 1);
        const u32 j = code >> P & (M - 1);
        const float sign = code >> 2 * P ? -1.0f : 1.0f;
        const float other = i == j ? 0.0f : i > j ? -sign : sign;
#pragma unroll
        for (u32 k = 0; k < M; ++k)
#pragma unroll
            for (u32 t = 0; t < T; ++t) {
                sum[t] += k == i ? sign * x[k][t] : 0.0f;
                sum[t] += k == j && i != j ? other * x[k][t] : 0.0f;
            }
    }
}

// Where the codes of a lane are in a tile. The planes of a chunk follow one another; each is whole vectors.
struct Place {
    bool exists;
    u32 at[3];
    // The position of the lane's bits in the bytes of the narrower planes.
    u32 shift_1, shift_2;
};

// The place in a chunk that has `n` of 8 quads.
STB_DEVICE Place place_in(u32 n, u32 position, u32 lane) {
    Place p;
    const u32 chunk = position / VECTORS, v = position % VECTORS, quad = v * QV;
    const u32 vectors_0 = ceil_div(n * WIDTH_0, 8), vectors_1 = ceil_div(n * WIDTH_1, 8);
    const u32 base = chunk * 64 * BETA + lane % 4 * 16;
    p.exists = v < vectors_0;
    p.at[0] = base + v * 64;
    p.at[1] = base + (vectors_0 + quad * WIDTH_1 / 8) * 64;
    p.at[2] = base + (vectors_0 + vectors_1 + quad * WIDTH_2 / 8) * 64;
    p.shift_1 = quad * WIDTH_1 % 8;
    p.shift_2 = quad * WIDTH_2 % 8;
    return p;
}
STB_DEVICE Place place(u32 quads, u32 position, u32 lane) {
    const u32 first = position / VECTORS * 8;
    return place_in(first < quads ? least(8, quads - first) : 0, position, lane);
}

struct Codes {
    u32 planes[3][4];
};

STB_DEVICE void load_plane(u32 (&to)[4], const u8 *from, u32 shift) {
    const uint4 v = __ldg(reinterpret_cast<const uint4 *>(from));
    to[0] = v.x >> shift, to[1] = v.y >> shift, to[2] = v.z >> shift, to[3] = v.w >> shift;
}

STB_DEVICE Codes load_codes(const u8 *tile, const Place &p) {
    Codes codes = {};
    if (p.exists) {
        load_plane(codes.planes[0], tile + p.at[0], 0);
        if constexpr (WIDTH_1 != 0)
            load_plane(codes.planes[1], tile + p.at[1], p.shift_1);
        if constexpr (WIDTH_2 != 0)
            load_plane(codes.planes[2], tile + p.at[2], p.shift_2);
    }
    return codes;
}

// Computes the indices into table q of the lane for the 16 rows of the tile, one byte each. The planes are joined for
// four rows at once. A single plane is not changed.
STB_DEVICE void join(u32 (&to)[4], const Codes &c, u32 q) {
    constexpr u32 EACH = 0x01010101, MASK_0 = EACH * ((1u << BITS_0) - 1), MASK_1 = EACH * ((1u << BITS_1) - 1) << BITS_0;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        to[i] = c.planes[0][i];
        if constexpr (WIDTH_1 != 0) {
            const u32 word = c.planes[1][i], from = q * BITS_1;
            const u32 upper = from > BITS_0 ? word >> (from - BITS_0) : word << (BITS_0 - from);
            to[i] = (to[i] >> q * BITS_0 & MASK_0) | (upper & MASK_1);
        }
    }
}
// The index of row r in units of 1 / 2^UNIT entries: the shift that extracts the index also scales it. `base` has
// none of these bits.
template <u32 UNIT> STB_DEVICE u32 index_of(const u32 (&joined)[4], u32 r, u32 q, u32 base) {
    const u32 word = joined[r / 4], from = 8 * (r % 4) + (WIDTH_1 == 0 ? q * BITS_0 : 0);
    const u32 moved = from >= UNIT ? word >> (from - UNIT) : word << (UNIT - from);
    return (moved & (ENTRIES - 1) << UNIT) | base;
}
// Applies the code's sign to a looked-up value, unless the table includes the signs.
STB_DEVICE float with_sign(const Codes &c, u32 r, u32 q, float v) {
    if constexpr (!SIGN_APART)
        return v;
    const u32 sign = c.planes[2][r / 4] << (31 - 8 * (r % 4) - q * WIDTH_2);
    return __uint_as_float(__float_as_uint(v) ^ (sign & 0x80000000));
}

// The block scales of a tile: multipliers of 16 rows for a block of columns, times 2^bits.
struct Multipliers {
    const u8 *from;
    // Bytes of the scales of a block, the last block, and 2^32 / columns of a block, rounded up, so that
    // column · inverse / 2^32 is the block of a column.
    u32 bytes, last, inverse;

    STB_DEVICE explicit Multipliers(const PackedMatrix &m)
        : from(m.payload + m.segments[2]), bytes((m.kind & 255) * 2), last(0), inverse(0) {
        if (bytes != 0) {
            last = ceil_div(m.cols, m.block) - 1;
            inverse = ALL / m.block + 1;
        }
    }

    STB_DEVICE const u8 *of_tile(u32 tile) const { return from + u64(tile) * (last + 1) * bytes; }

    // With 8 bits there is one byte per row; with 4 bits rows r and r + 8 share a byte. Columns beyond the last
    // have no weights, so any block will do.
    STB_DEVICE void load(float (&to)[TILE], const u8 *of_tile, u32 col) const {
        const u8 *at = of_tile + least(__umulhi(col, inverse), last) * bytes;
        uint4 v;
        if (bytes == 16) {
            v = __ldg(reinterpret_cast<const uint4 *>(at));
        } else {
            const uint2 w = __ldg(reinterpret_cast<const uint2 *>(at));
            v.x = w.x & 0x0f0f0f0f, v.y = w.y & 0x0f0f0f0f;
            v.z = w.x >> 4 & 0x0f0f0f0f, v.w = w.y >> 4 & 0x0f0f0f0f;
        }
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (u32 r = 0; r < TILE; ++r)
            to[r] = __uint_as_float(permute(words[r / 4], 0x4b000000, 0x7440 + r % 4)) - 8388607.0f;
    }
};

// Sums each of 16 values over the warp. In each step, half of the values go to the other half of the lanes. Lane l
// returns the sum of row 8·bit4 + 4·bit3 + 2·bit2 + bit1 of l.
template <u32 H> STB_DEVICE void halve(float (&v)[TILE], u32 lane) {
    const bool upper = lane & 2 * H;
#pragma unroll
    for (u32 i = 0; i < H; ++i) {
        const float keep = upper ? v[i + H] : v[i], send = upper ? v[i] : v[i + H];
        v[i] = keep + __shfl_xor_sync(ALL, send, int(2 * H));
    }
}
STB_DEVICE float sum_rows(float (&v)[TILE], u32 lane) {
    halve<8>(v, lane);
    halve<4>(v, lane);
    halve<2>(v, lane);
    halve<1>(v, lane);
    return v[0] + __shfl_xor_sync(ALL, v[0], 1);
}

// Computes the lookup tables of a slab, [steps][TABLES][ENTRIES][32 lanes] of T floats.
template <u32 T>
STB_DEVICE void make_tables(float *table, const GemvParams &a, const BlockWork &p, float *scratch) {
    constexpr u32 U = vectors_of(T), TABLES = U * LOOKS, LANE_STEP = U * STEP, WARP_STEP = 8 * LANE_STEP;
    const PackedMatrix &m = a.matrices[p.matrix];
    const u32 steps = a.slab / WARP_STEP;
    const Activations<T> activations(a, p, scratch);
    // A thread computes 8 entries, or 16 of large tables, so that all threads have work.
    constexpr u32 SHARE = ENTRIES > 16 ? 16 : 8;
    constexpr u32 SHARES = ENTRIES / SHARE;
    const u16 *factors = reinterpret_cast<const u16 *>(m.payload + m.segments[0]);
    for (u32 i = threadIdx.x; i < steps * TABLES * SHARES * WARP; i += THREADS) {
        const u32 lane = i % WARP, share = i / WARP % SHARES, place = i / WARP / SHARES;
        const u32 q = place % TABLES * PAIR, step = place / TABLES;
        const u32 first =
            p.first_col + step * WARP_STEP + lane / 4 * LANE_STEP + q * QUAD + lane % 4 * M;
        float x[TABLE_COLS][T];
#pragma unroll
        for (u32 k = 0; k < TABLE_COLS; ++k) {
            const u32 col = first + k / M * QUAD + k % M;
            float factor = 1.0f;
            if (m.kind & 256 && col < m.cols)
                factor = f16_to_f32(__ldg(factors + col));
#pragma unroll
            for (u32 t = 0; t < T; ++t)
                x[k][t] = activations(t, col) * factor;
        }
        for (u32 e = share * SHARE; e < (share + 1) * SHARE; ++e) {
            float sum[T];
            entry<T>(x, e, sum);
#pragma unroll
            for (u32 t = 0; t < T; ++t)
                table[((place * ENTRIES + e) * WARP + lane) * T + t] = sum[t];
        }
    }
}

template <u32 T, bool SCALED> STB_DEVICE void gemv(const GemvParams &a) {
    STB_DYNAMIC_SHARED(shared);
    __shared__ u32 flag;
    __shared__ float scratch[WARPS];
    const BlockWork p = block_work<T>(a);
    const PackedMatrix &m = a.matrices[p.matrix];
    // Vectors, tables and columns of a lane in a step, and the columns of a warp.
    constexpr u32 U = vectors_of(T), TABLES = U * LOOKS, LANE_STEP = U * STEP, WARP_STEP = 8 * LANE_STEP;
    const u32 steps = a.slab / WARP_STEP;
    // Lookup tables, [steps][TABLES][ENTRIES][32 lanes] of T floats, then sums, [block_rows][T].
    const u32 start = T == 1 ? (TABLE - shared_address(shared) % TABLE) % TABLE : 0;
    float *table = reinterpret_cast<float *>(shared + start);
    float *sums = table + steps * TABLES * ENTRIES * WARP * T;
    make_tables<T>(table, a, p, scratch);
    __syncthreads();

    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 quads = ceil_div(ceil_div(m.cols, M), 4);
    const u32 bits = m.kind & 255, units = m.units, cols = p.cols;
    const u16 *row_scales = reinterpret_cast<const u16 *>(m.payload + m.segments[1]);
    const u8 *all_codes = m.payload + m.segments[3];
    // A step advances by whole chunks, so the place within a chunk stays the same.
    const u32 position_0 = p.first_col / STEP + lane / 4 * U;
    const Place whole = place_in(8, position_0, lane);
    constexpr u32 STEP_BYTES = 8 * U / VECTORS * 64 * BETA;
    const Multipliers multipliers(m);
    // Blocks are multiples of 32 columns, so a new block can begin only at those columns of a lane's step.
    const bool is_one_block = SCALED && bits != 0 && m.block % LANE_STEP == 0;
    for (u32 first = warp * TILE; first < p.rows; first += WARPS * TILE) {
        const u32 tile = (p.first_row + first) / TILE;
        const u8 *codes_of_tile = all_codes + u64(tile) * units;
        const u8 *scales_of_tile = multipliers.of_tile(tile);
        float acc[T][TILE] = {};
        float multiplier[TILE];
        if (SCALED && bits == 0)
#pragma unroll
            for (u32 r = 0; r < TILE; ++r)
                multiplier[r] = 1.0f;
        u32 base = shared_address(table) + lane * 4 * T;
        u32 position = position_0, at = 0;
        for (u32 col = 0; col < cols; col += WARP_STEP) {
            Codes all[U];
#pragma unroll
            for (u32 u = 0; u < U; ++u) {
                Place here = whole;
                // Neighboring vectors are in one chunk and share the vectors of its narrower planes.
                here.at[0] += at + u * 64, here.at[1] += at, here.at[2] += at;
                here.shift_1 += u * QV * WIDTH_1, here.shift_2 += u * QV * WIDTH_2;
                // The last chunk of a row has fewer vectors.
                if (position / VECTORS * 8 + 8 > quads)
                    here = place(quads, position + u, lane);
                all[u] = load_codes(codes_of_tile, here);
            }
#pragma unroll
            for (u32 k = 0; k < TABLES; ++k) {
                constexpr u32 COLS = PAIR * QUAD;
                const u32 q = k % LOOKS;
                const Codes &codes = all[k / LOOKS];
                if (SCALED && bits != 0 && k * COLS % 32 == 0 && (k == 0 || !is_one_block))
                    multipliers.load(multiplier, scales_of_tile, position * STEP + k * COLS);
                u32 joined[4];
                join(joined, codes, q);
                // log2 of the bytes of an entry, which has T floats for each lane.
                constexpr u32 LOG = T == 1 ? 7 : T == 2 ? 8 : 9;
#pragma unroll
                for (u32 r = 0; r < TILE; ++r) {
                    float found[T];
                    if constexpr (T == 1)
                        load_shared(found, index_of<LOG>(joined, r, q, base));
                    else
                        load_shared(found, index_of<LOG>(joined, r, q, 0) + base);
#pragma unroll
                    for (u32 t = 0; t < T; ++t) {
                        const float v = with_sign(codes, r, q, found[t]);
                        acc[t][r] = SCALED ? fmaf(multiplier[r], v, acc[t][r]) : acc[t][r] + v;
                    }
                }
                base += TABLE * T;
            }
            position += 8 * U, at += STEP_BYTES;
        }
        const u32 row = (lane >> 4 & 1) * 8 + (lane >> 3 & 1) * 4 + (lane >> 2 & 1) * 2 + (lane >> 1 & 1);
#pragma unroll
        for (u32 t = 0; t < T; ++t) {
            const float sum = sum_rows(acc[t], lane);
            if (lane % 2 == 0 && first + row < p.rows) {
                const float scale = f16_to_f32(__ldg(row_scales + p.first_row + first + row));
                sums[(first + row) * T + t] = sum * (scale / float(1u << bits));
            }
        }
    }
    __syncthreads();
    finish<T>(a, p, sums, &flag);
}

// Block (x, y) converts part x of row y, with a thread per group.
STB_DEVICE void dequantize(const DequantizeParams &a) {
    const PackedMatrix &m = a.matrix;
    const u32 group = blockIdx.x * blockDim.x + threadIdx.x;
    const u32 groups = ceil_div(m.cols, M);
    const u32 row = a.ids != nullptr ? a.ids[blockIdx.y] : blockIdx.y;
    if (group >= groups || row >= m.rows)
        return;
    const u32 tile = row / TILE, r = row % TILE, quads = ceil_div(groups, 4);
    const u32 q = group / 4 % QV;
    const Place p = place(quads, group / 4 / QV, group % 4);
    const u8 *codes = m.payload + m.segments[3] + u64(tile) * m.units;
    u32 code = codes[p.at[0] + r] >> q * WIDTH_0 & ((1u << WIDTH_0) - 1);
    if constexpr (WIDTH_1 != 0)
        code |= (codes[p.at[1] + r] >> (p.shift_1 + q * WIDTH_1) & ((1u << WIDTH_1) - 1)) << WIDTH_0;
    if constexpr (WIDTH_2 != 0)
        code |= (codes[p.at[2] + r] >> (p.shift_2 + q * WIDTH_2) & 1) << (WIDTH_0 + WIDTH_1);
    float scale = f16_to_f32(reinterpret_cast<const u16 *>(m.payload + m.segments[1])[row]);
    const u32 bits = m.kind & 255;
    const u16 *factors = reinterpret_cast<const u16 *>(m.payload + m.segments[0]);
    if (bits != 0) {
        float multipliers[TILE];
        const Multipliers all(m);
        all.load(multipliers, all.of_tile(tile), group * M);
        float mine = 0.0f;
#pragma unroll
        for (u32 k = 0; k < TILE; ++k)
            mine = k == r ? multipliers[k] : mine;
        scale *= mine / float(1u << bits);
    }
    const u32 i = code & (M - 1), j = N == 2 ? code >> P & (M - 1) : i;
    const bool negative = code >> (BETA - 1) & 1;
    for (u32 k = 0; k < M; ++k) {
        const u32 c = group * M + k;
        if (c >= m.cols)
            break;
        float w = scale;
        if (m.kind & 256)
            w *= f16_to_f32(factors[c]);
        const bool kept = k == i || k == j;
        const bool minus = k == i ? negative : negative != (i > j);
        a.out[u64(blockIdx.y) * m.cols + c] = kept ? (minus ? -w : w) : 0.0f;
    }
}

// The `scaled` kernels are for launches in which a matrix has block scales.
extern "C" {
__global__ void __launch_bounds__(THREADS) gemv_f32_1(const __grid_constant__ GemvParams a) { gemv<1, false>(a); }
__global__ void __launch_bounds__(THREADS) gemv_f32_2(const __grid_constant__ GemvParams a) { gemv<2, false>(a); }
__global__ void __launch_bounds__(THREADS) gemv_f32_4(const __grid_constant__ GemvParams a) { gemv<4, false>(a); }
__global__ void __launch_bounds__(THREADS) gemv_scaled_1(const __grid_constant__ GemvParams a) { gemv<1, true>(a); }
__global__ void __launch_bounds__(THREADS) gemv_scaled_2(const __grid_constant__ GemvParams a) { gemv<2, true>(a); }
__global__ void __launch_bounds__(THREADS) gemv_scaled_4(const __grid_constant__ GemvParams a) { gemv<4, true>(a); }
__global__ void __launch_bounds__(THREADS) dequantize_rows(const __grid_constant__ DequantizeParams a) { dequantize(a); }
}
