// Matrix instructions of a warp, after the fragment layouts of the PTX ISA (sections "Matrix
// fragments for mma.m16n8k…" and "… with sparse matrix A"). Each function receives the data of all lanes,
// assembles the matrices, and multiplies.
//
// group = lane / 4, t = lane % 4 throughout. Elements of less than 32 bits start at the low bits of a register.
#pragma once

namespace emulator {

struct LoadMatrix {
    const u8 *row;
    u32 result[4];
    int matrices;
    bool transposed;
};

// ldmatrix: lane 8·j + i has the address of row i of matrix j, eight elements of 16 bits. Lane l
// gets elements 2·(l % 4) and the next of row l / 4; transposed: of column l / 4.
inline void load_matrix(LoadMatrix **all, u32) {
    for (int j = 0; j < all[0]->matrices; ++j) {
        u16 matrix[8][8];
        for (int i = 0; i < 8; ++i) {
            check_shared(all[8 * j + i]->row, 16, "ldmatrix");
            std::memcpy(matrix[i], all[8 * j + i]->row, 16);
        }
        for (int l = 0; l < 32; ++l) {
            const int row = l / 4, col = l % 4 * 2;
            const bool t = all[0]->transposed;
            const u16 low = t ? matrix[col][row] : matrix[row][col];
            const u16 high = t ? matrix[col + 1][row] : matrix[row][col + 1];
            all[l]->result[j] = low | u32(high) << 16;
        }
    }
}

enum class Type { f16, bf16, s8 };

struct Mma {
    u32 a[4], b[4];
    u32 c[4]; // f32 or s32.
    u32 metadata;
    Type type;
    int selector; // −1: dense.
};

inline u32 element(Type type, const u32 *registers, int i) {
    return type == Type::s8 ? registers[i / 4] >> i % 4 * 8 & 255
                            : registers[i / 2] >> i % 2 * 16 & 65535;
}
inline double value(Type type, u32 bits) {
    switch (type) {
    case Type::f16: return f16_to_f32(u16(bits));
    case Type::bf16: return bf16_to_f32(u16(bits));
    default: return std::int8_t(bits);
    }
}

// D[16][8] = A[16][k] B[k][8] + C. Dense: k = 16 (f16, bf16) or 32 (s8); sparse: twice that, A keeps
// two of each four neighbors of a row.
inline void multiply(Mma **all, u32) {
    const Type type = all[0]->type;
    const int selector = all[0]->selector;
    const bool sparse = selector >= 0;
    const int per = type == Type::s8 ? 4 : 2; // Elements of a register.
    const int kept = 8 * per;                 // Elements of a row of A that are stored.
    const int depth = sparse ? 2 * kept : kept;
    static double a[16][64], b[64][8];
    std::memset(a, 0, sizeof a);
    for (int l = 0; l < 32; ++l) {
        const Mma &m = *all[l];
        if (m.type != type || m.selector != selector)
            fail("mma: lanes disagree about the instruction");
        const int group = l / 4, t = l % 4;
        for (int i = 0; i < 4 * per; ++i) {
            // Registers: 0 row group, 1 row group + 8, 2 and 3 the same for the second half of k.
            const int row = group + (i / per % 2 ? 8 : 0);
            const int stored = t * per + i % per + (i / per >= 2 ? 4 * per : 0);
            a[row][stored] = value(type, element(type, m.a, i));
        }
        for (int i = 0; i < (sparse ? 4 : 2) * per; ++i)
            b[t * per + i % per + i / per * 4 * per][group] = value(type, element(type, m.b, i));
    }
    static double dense[16][64];
    if (sparse) {
        std::memset(dense, 0, sizeof dense);
        for (int row = 0; row < 16; ++row) {
            for (int quad = 0; quad < depth / 4; ++quad) {
                // Indices: 4 bits for each four columns. 16-bit types: lanes t = 2·selector and the
                // next have columns 0..15 and 16..31, row group in the low half, row group + 8 in the
                // high half. s8: t = 0, 1 have columns 0..31 of rows group and group + 8, 2 and 3
                // columns 32..63.
                const int group = row % 8, high = row / 8;
                u32 nibble;
                if (type == Type::s8)
                    nibble = all[4 * group + quad / 8 * 2 + high]->metadata >> quad % 8 * 4 & 15;
                else
                    nibble = all[4 * group + 2 * selector + quad / 4]->metadata >>
                                 (16 * high + quad % 4 * 4) &
                             15;
                const u32 i = nibble & 3, j = nibble >> 2;
                if (i >= j)
                    fail("mma.sp: indices %u, %u of row %d, columns from %d are not in order", i, j,
                         row, 4 * quad);
                dense[row][4 * quad + int(i)] = a[row][2 * quad];
                dense[row][4 * quad + int(j)] = a[row][2 * quad + 1];
            }
        }
    }
    auto &weights = sparse ? dense : a;
    for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < 4; ++i) {
            const int row = l / 4 + (i >= 2 ? 8 : 0), col = l % 4 * 2 + i % 2;
            double sum = 0;
            for (int k = 0; k < depth; ++k)
                sum += weights[row][k] * b[k][col];
            u32 &c = all[l]->c[i];
            if (type == Type::s8)
                c += u32(std::int64_t(sum));
            else
                c = bits(float(double(from_bits(c)) + sum));
        }
    }
}

inline void mma(const char *what, Mma &data, Site site) {
    collective<Mma>(what, 0xffffffff, data, multiply, site);
}

} // namespace emulator
