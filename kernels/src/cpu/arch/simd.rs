//! Operations on 16 lanes of numbers.

/// Operations on 16 lanes of f32 (`F`) or u32 (`I`). A value of the implementing type proves that
/// the machine has its instructions. Every implementation gives the same bits.
pub(crate) trait Simd: Copy {
    /// 16 × f32.
    type F: Copy;
    /// 16 × u32, two's complement where signed.
    type I: Copy;
    /// Rows of the matrix-multiplication micro-kernel.
    const GEMM_ROWS: usize;
    /// Vectors of 16 activations of the micro-kernel.
    const GEMM_VECTORS: usize;

    fn splat(self, v: f32) -> Self::F;
    fn load(self, v: &[f32; 16]) -> Self::F;
    /// From little-endian binary32.
    fn load_bytes(self, v: &[u8; 64]) -> Self::F;
    fn store(self, v: Self::F, to: &mut [f32; 16]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? a : b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? x : y`.
    fn select_less(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// a × b + c, rounded once.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// The bits of the numbers.
    fn cast_i(self, a: Self::F) -> Self::I;
    /// The numbers with these bits.
    fn cast_f(self, a: Self::I) -> Self::F;
    /// From signed integers, rounded.
    fn to_f32(self, a: Self::I) -> Self::F;
    /// To signed integers, toward zero; the lanes must be in range.
    fn to_i32(self, a: Self::F) -> Self::I;

    fn splat_i(self, v: u32) -> Self::I;
    fn widen_u8(self, v: &[u8; 16]) -> Self::I;
    /// From little-endian 16-bit numbers.
    fn widen_u16(self, v: &[u8; 32]) -> Self::I;
    /// From little-endian binary16.
    fn f16_to_f32(self, v: &[u8; 32]) -> Self::F;
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    /// `by` < 32.
    fn shl(self, a: Self::I, by: u32) -> Self::I;
    /// Logical; `by` < 32.
    fn shr(self, a: Self::I, by: u32) -> Self::I;
    /// Logical, each lane by its own number of bits below 32.
    fn shr_each(self, a: Self::I, by: Self::I) -> Self::I;
    /// All ones where a > b as signed integers, else zero.
    fn gt_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `v` in lane i where bit i is set, else zero.
    fn select_bits(self, bits: u16, v: u32) -> Self::I;
    /// `table[index & 15]` for each lane.
    fn lookup(self, table: Self::F, index: Self::I) -> Self::F;
    /// Low bits of `bits` in order at the set bits of `mask`.
    fn deposit(self, bits: u64, mask: u64) -> u64;

    /// Stores the low 16 bits of each lane, little-endian.
    #[inline(always)]
    fn store_low_u16(self, v: Self::I, to: &mut [u8; 32]) {
        let mut lanes = [0.0; 16];
        self.store(self.cast_f(v), &mut lanes);
        for (to, lane) in to.as_chunks_mut::<2>().0.iter_mut().zip(lanes) {
            *to = (lane.to_bits() as u16).to_le_bytes();
        }
    }

    /// The sum of all lanes, in one fixed order.
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let mut v = [0.0; 16];
        self.store(a, &mut v);
        let mut half = 8;
        while half > 0 {
            for i in 0..half {
                v[i] += v[i + half];
            }
            half /= 2;
        }
        v[0]
    }

    /// [`Simd::sum`] of each vector.
    #[inline(always)]
    fn sums(self, v: [Self::F; 16]) -> [f32; 16] {
        let mut sums = [0.0; 16];
        for i in 0..16 {
            sums[i] = self.sum(v[i]);
        }
        sums
    }
}

/// The 16 floats from `at`.
///
/// # Panics
/// If they are not all inside `v`.
#[inline(always)]
pub(crate) fn lanes(v: &[f32], at: usize) -> &[f32; 16] {
    v[at..at + 16].first_chunk().expect("a slice of 16")
}
