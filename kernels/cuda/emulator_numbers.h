// Conversions between number formats, and permutations of bytes.
#pragma once

namespace emulator {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

// prmt: selector nibbles choose bytes of {b, a}; bit 3 replicates the sign bit of the byte. (CUDA's __byte_perm ignores
// that bit.)
inline unsigned permute(unsigned a, unsigned b, unsigned s) {
    const unsigned long long all = (unsigned long long)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned n = s >> 4 * i & 15, byte = unsigned(all >> 8 * (n & 7)) & 255;
        r |= (n & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return r;
}
inline u32 bits(float v) {
    u32 b;
    std::memcpy(&b, &v, 4);
    return b;
}
inline float from_bits(u32 b) {
    float v;
    std::memcpy(&v, &b, 4);
    return v;
}
inline float f16_to_f32(u16 h) {
    const u32 sign = u32(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31)
        return from_bits(sign | 0x7f800000 | mantissa << 13);
    if (exponent != 0)
        return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    const float v = float(mantissa) * 0x1p-24f;
    return sign ? -v : v;
}
// To nearest, ties to even.
inline u16 f32_to_f16(float v) {
    const u32 b = bits(v);
    const u16 sign = u16(b >> 16 & 0x8000);
    const u32 a = b & 0x7fffffff;
    if (a > 0x7f800000)
        return 0x7fff;
    if (a >= 0x477ff000)
        return sign | 0x7c00;
    if (a < 0x38800000) // Subnormal: the addition rounds to multiples of 2^-24.
        return sign | u16(bits(from_bits(a) + 0.5f) - bits(0.5f));
    const u32 rounded = a + 0xfff + (a >> 13 & 1);
    return sign | u16((rounded >> 13) - (112 << 10));
}
inline float bf16_to_f32(u16 h) { return from_bits(u32(h) << 16); }
inline u16 f32_to_bf16(float v) {
    const u32 b = bits(v);
    if ((b & 0x7fffffff) > 0x7f800000)
        return 0x7fff;
    return u16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
// A fused multiply-add of f16, rounded once. The exact result has far fewer than 53 bits, or its last bits do not
// affect the rounding.
inline u16 f16_fma(u16 a, u16 b, u16 c) {
    const double exact = double(f16_to_f32(a)) * double(f16_to_f32(b)) + double(f16_to_f32(c));
    // Round to odd in f32 first, so that the second rounding is right.
    float f = float(exact);
    if (std::isfinite(f) && double(f) != exact) {
        if (std::fabs(double(f)) > std::fabs(exact))
            f = std::nextafter(f, 0.0f);
        f = from_bits(bits(f) | 1);
    }
    return f32_to_f16(f);
}

} // namespace emulator
