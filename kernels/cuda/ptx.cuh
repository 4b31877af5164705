// The types and PTX instructions of the kernels. Each instruction is inline assembly on the device and a function of the
// emulator on the host. No CUDA header is included, so NVRTC compiles the kernels without an include folder.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef long long i64;

#define STB_DEVICE __device__ __forceinline__

#if defined(STB_EMULATED)
// The dynamic shared memory of a block, which is at least 16-byte aligned.
#define STB_DYNAMIC_SHARED(name) u8 *const name = emulator::dynamic_shared
#define STB_SITE , const char *file = __builtin_FILE(), int line = __builtin_LINE()
#else
#define STB_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]
#define STB_SITE
#endif

// The mode with sorted indices is the fast one from sm_90 on. The compiler supports it since 12.5.
#if defined(__CUDACC_VER_MAJOR__) && (__CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1205)
#define STB_MMA_SP "mma.sp"
#else
#define STB_MMA_SP "mma.sp::ordered_metadata"
#endif

STB_DEVICE u32 shared_address(const void *p) {
#if defined(STB_EMULATED)
    return u32(static_cast<const u8 *>(p) - emulator::dynamic_shared);
#else
    return static_cast<u32>(__cvta_generic_to_shared(p));
#endif
}

// Reads threadIdx.x again, so that values computed from it do not occupy registers throughout a loop.
STB_DEVICE u32 thread_again() {
#if defined(STB_EMULATED)
    return threadIdx.x;
#else
    u32 r;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
    return r;
#endif
}

// Selects bytes of {b, a} by the nibbles of the low 16 bits of `selector`. Bits 0 to 2 are the number of the byte; bit 3
// replicates the sign of the byte instead. (__byte_perm clears bit 3, with an extra instruction.)
STB_DEVICE u32 permute(u32 a, u32 b, u32 selector) {
#if defined(STB_EMULATED)
    return emulator::permute(a, b, selector);
#else
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
#endif
}

// ---- Shared memory ----------------------------------------------------------------------------

// Loads N floats (1, 2 or 4) from an address of `shared_address`, which is a multiple of their size, with a single
// instruction.
template <u32 N> STB_DEVICE void load_shared(float (&to)[N], u32 address) {
    static_assert(N == 1 || N == 2 || N == 4, "a vector");
#if defined(STB_EMULATED)
    const float *from = reinterpret_cast<const float *>(emulator::dynamic_shared + address);
    for (u32 i = 0; i < N; ++i)
        to[i] = from[i];
#else
    if constexpr (N == 1)
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(to[0]) : "r"(address));
    else if constexpr (N == 2)
        asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(address));
    else
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                     : "r"(address));
#endif
}

// ---- Numbers of 16 bits ----------------------------------------------------------------------

STB_DEVICE float f16_to_f32(u16 v) {
#if defined(STB_EMULATED)
    return emulator::f16_to_f32(v);
#else
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
#endif
}
STB_DEVICE u16 f32_to_f16(float v) {
#if defined(STB_EMULATED)
    return emulator::f32_to_f16(v);
#else
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
#endif
}
STB_DEVICE float bf16_to_f32(u16 v) { return __uint_as_float(u32(v) << 16); }
STB_DEVICE u16 f32_to_bf16(float v) {
#if defined(STB_EMULATED)
    return emulator::f32_to_bf16(v);
#else
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
#endif
}
// Two f16 in a register, `low` in the low bits.
STB_DEVICE u32 f16x2(float low, float high) {
#if defined(STB_EMULATED)
    return emulator::f32_to_f16(low) | u32(emulator::f32_to_f16(high)) << 16;
#else
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#endif
}
STB_DEVICE u32 bf16x2(float low, float high) {
#if defined(STB_EMULATED)
    return emulator::f32_to_bf16(low) | u32(emulator::f32_to_bf16(high)) << 16;
#else
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#endif
}
// a · b + c for two f16 each, rounded once.
STB_DEVICE u32 f16x2_fma(u32 a, u32 b, u32 c) {
#if defined(STB_EMULATED)
    return emulator::f16_fma(u16(a), u16(b), u16(c)) |
           u32(emulator::f16_fma(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16;
#else
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
#endif
}
STB_DEVICE u32 f16x2_add(u32 a, u32 b) {
#if defined(STB_EMULATED)
    return f16x2_fma(a, 0x3c003c00, b);
#else
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
#endif
}
STB_DEVICE u32 f16x2_mul(u32 a, u32 b) {
#if defined(STB_EMULATED)
    return f16x2_fma(a, b, 0x80008000);
#else
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
#endif
}
// Rounds to the nearest 8-bit integer, with saturation: cvt.rni.sat.s8.f32.
STB_DEVICE i32 f32_to_s8(float v) {
#if defined(STB_EMULATED)
    const float r = std::nearbyint(v);
    return r < -128 ? -128 : r > 127 ? 127 : i32(r);
#else
    i32 r;
    asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(r) : "f"(v));
    return r;
#endif
}

// 2^v to 2 units in the last place; results below 2^-126 are zero.
STB_DEVICE float exp2_approx(float v) {
#if defined(STB_EMULATED)
    const float r = std::exp2(v);
    return r < 0x1p-126f ? 0.0f : r;
#else
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
#endif
}

// ---- Asynchronous copies into shared memory --------------------------------------------------

// Copies 16 bytes, bypassing the L1 cache: `valid` bytes from `from`, then zeros.
STB_DEVICE void copy_async16(void *to, const void *from, u32 valid = 16) {
#if defined(STB_EMULATED)
    emulator::copy_async(to, from, 16, valid);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
#endif
}
// Copies 8 or 4 bytes.
template <int Bytes> STB_DEVICE void copy_async(void *to, const void *from, u32 valid = Bytes) {
    static_assert(Bytes == 4 || Bytes == 8, "copy_async16 is for 16 bytes");
#if defined(STB_EMULATED)
    emulator::copy_async(to, from, Bytes, valid);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(Bytes), "r"(valid)
                 : "memory");
#endif
}
// Ends a group of copies.
STB_DEVICE void copy_commit() {
#if defined(STB_EMULATED)
    emulator::copy_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `Pending` of this thread's groups are in flight.
template <int Pending> STB_DEVICE void copy_wait() {
#if defined(STB_EMULATED)
    emulator::copy_wait(Pending, false);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// ---- Matrices of a warp ----------------------------------------------------------------------

// Four (two) matrices of 8 × 8 elements of 16 bits; lane 8·j + i has the address of row i of matrix j.
// Lane l gets elements 2·(l % 4) and the next of row l / 4 of each; with `trans` of column l / 4.
STB_DEVICE void load_matrix_x4(u32 (&r)[4], const void *row STB_SITE) {
#if defined(STB_EMULATED)
    emulator::LoadMatrix m{static_cast<const u8 *>(row), {}, 4, false};
    emulator::collective("ldmatrix.x4", 0xffffffff, m, emulator::load_matrix, {file, line});
    for (int i = 0; i < 4; ++i)
        r[i] = m.result[i];
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
STB_DEVICE void load_matrix_x4_trans(u32 (&r)[4], const void *row STB_SITE) {
#if defined(STB_EMULATED)
    emulator::LoadMatrix m{static_cast<const u8 *>(row), {}, 4, true};
    emulator::collective("ldmatrix.x4.trans", 0xffffffff, m, emulator::load_matrix, {file, line});
    for (int i = 0; i < 4; ++i)
        r[i] = m.result[i];
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
STB_DEVICE void load_matrix_x2(u32 (&r)[2], const void *row STB_SITE) {
#if defined(STB_EMULATED)
    emulator::LoadMatrix m{static_cast<const u8 *>(row), {}, 2, false};
    emulator::collective("ldmatrix.x2", 0xffffffff, m, emulator::load_matrix, {file, line});
    r[0] = m.result[0], r[1] = m.result[1];
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// d += A[16, 16] · B[16, 8]. With g = lane / 4, t = lane % 4 the registers hold, two columns (of A)
// or rows (of B) each: a[0] row g, from column 2t; a[1] row g + 8; a[2] row g, from 8 + 2t; a[3]
// row g + 8, from 8 + 2t; b[i] column g, from row 8i + 2t; d[0], d[1] row g, columns 2t, 2t + 1;
// d[2], d[3] row g + 8.
#if defined(STB_EMULATED)
#define STB_MMA_F32(name, n_b, what, type)                                                         \
    STB_DEVICE void name(float (&d)[4], const u32 (&a)[4], const u32 (&b)[n_b] STB_SITE) {         \
        emulator::Mma m{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {}, 0, emulator::Type::type, -1};  \
        for (int i = 0; i < 4; ++i)                                                                \
            m.c[i] = emulator::bits(d[i]);                                                         \
        emulator::mma(what, m, {file, line});                                                      \
        for (int i = 0; i < 4; ++i)                                                                \
            d[i] = emulator::from_bits(m.c[i]);                                                    \
    }
#else
#define STB_MMA_F32(name, n_b, what, type)                                                         \
    STB_DEVICE void name(float (&d)[4], const u32 (&a)[4], const u32 (&b)[n_b]) {                  \
        asm volatile(what " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"       \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));          \
    }
#endif
STB_MMA_F32(mma_f16, 2, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", f16)
STB_MMA_F32(mma_bf16, 2, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", bf16)
#undef STB_MMA_F32

// d += A[16, 32] · B[32, 8], bytes; four to a register: a[0] row g, from column 4t, and so on as above
// with 16 for 8.
STB_DEVICE void mma_s8(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2] STB_SITE) {
#if defined(STB_EMULATED)
    emulator::Mma m{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {}, 0, emulator::Type::s8, -1};
    for (int i = 0; i < 4; ++i)
        m.c[i] = u32(d[i]);
    emulator::mma("mma.m16n8k32.s8", m, {file, line});
    for (int i = 0; i < 4; ++i)
        d[i] = i32(m.c[i]);
#else
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// d += A[16, 32] · B[32, 8], A with two of every four neighbors of a row: a[0] the two kept of row g,
// columns 4t to 4t + 3; a[1] row g + 8; a[2] row g, columns 16 + 4t to 16 + 4t + 3; a[3] row
// g + 8; b[i] column g, rows 8i + 2t and the next. Indices: lane t = 2 · Selector of each group has those of
// columns 0 to 15, the next lane 16 to 31; row g in the low 16 bits, row g + 8 in the high ones,
// four bits for four columns: the lower index in the low two.
#if defined(STB_EMULATED)
#define STB_MMA_SP_F32(name, what, type)                                                           \
    template <int Selector>                                                                        \
    STB_DEVICE void name(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4],                      \
                         u32 metadata STB_SITE) {                                                  \
        static_assert(Selector == 0 || Selector == 1, "pairs of lanes");                           \
        emulator::Mma m{{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, {}, metadata,          \
                        emulator::Type::type, Selector};                                           \
        for (int i = 0; i < 4; ++i)                                                                \
            m.c[i] = emulator::bits(d[i]);                                                         \
        emulator::mma(what, m, {file, line});                                                      \
        for (int i = 0; i < 4; ++i)                                                                \
            d[i] = emulator::from_bits(m.c[i]);                                                    \
    }
#else
#define STB_MMA_SP_F32(name, what, type)                                                           \
    template <int Selector>                                                                        \
    STB_DEVICE void name(float (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata) {      \
        asm volatile(STB_MMA_SP what                                                               \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "                   \
                     "{%0, %1, %2, %3}, %12, %13;"                                                 \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]),           \
                       "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(Selector));                        \
    }
#endif
STB_MMA_SP_F32(mma_sp_f16, ".sync.aligned.m16n8k32.row.col.f32.f16.f16.f32", f16)
STB_MMA_SP_F32(mma_sp_bf16, ".sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32", bf16)
#undef STB_MMA_SP_F32

// d += A[16, 64] · B[64, 8], bytes, A sparse: a[0] the kept of row g, columns 8t to 8t + 7; a[1] row
// g + 8; a[2], a[3] from 32 + 8t; b[i] column g, rows 16i + 4t to 16i + 4t + 3. Indices: lane t = 0
// has those of row g, columns 0 to 31; 1 those of row g + 8; 2 and 3 columns 32 to 63.
STB_DEVICE void mma_sp_s8(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata STB_SITE) {
#if defined(STB_EMULATED)
    emulator::Mma m{{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, {}, metadata,
                    emulator::Type::s8, 0};
    for (int i = 0; i < 4; ++i)
        m.c[i] = u32(d[i]);
    emulator::mma("mma.sp.m16n8k64.s8", m, {file, line});
    for (int i = 0; i < 4; ++i)
        d[i] = i32(m.c[i]);
#else
    asm volatile(STB_MMA_SP ".sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
                            "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]),
                   "r"(b[3]), "r"(metadata));
#endif
}
