//! Operations on bytes, for products with activations of 8 bits.

use std::ops::{Deref, DerefMut};

use super::simd::Simd;
use super::windows::Windows;

/// A computation that is written once for all instruction sets.
pub(crate) trait Task {
    /// The result.
    type Output;

    /// The computation. `#[inline(always)]` in every implementation, and so is what it calls: only
    /// code inlined into [`Bytes::enter`] is compiled for that instruction set.
    fn run<S: Bytes>(self, s: S) -> Self::Output;
}

/// A computation that needs a unit for products of tiles, see [`Bytes::with_tiles`].
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
pub(crate) trait TileTask {
    /// The result.
    type Output;

    /// The computation, see [`Task::run`]. The reference to `unit` cannot outlive the call, so tiles are
    /// configured whenever it is used.
    fn run<S: Bytes>(self, s: S, unit: &impl TileUnit) -> Self::Output;
}

/// A value that implements this proves that the tiles of this thread are configured.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
pub(crate) trait TileUnit {
    /// `to[i][j][t][r] = Σ_k x[16i + t][k] · w[j][k / 4][4r + k % 4]`, all signed, over [`TILE_COLS`]
    /// columns: 16·`T` tokens, i < `T` ≤ 2, times two tiles of 16 rows.
    fn products<const T: usize>(
        &self,
        w: [&[[u8; 64]; TILE_COLS / 4]; 2],
        x: &[[i8; TILE_COLS]; 32],
        to: &mut TileSums,
    );

    /// `to[j][i][r][t] = Σ_k w[j][k / 64][r][k % 64] · x[i][k / 64][k % 64 / 4][4t + k % 4]`, all signed, over
    /// 64·`H` columns, `H` ≤ 2: two tiles of 16 rows times 16·`T` tokens, i < `T` ≤ 2.
    fn row_products<const T: usize, const H: usize>(
        &self,
        w: [&[TileLines; H]; 2],
        x: [&[TileLines; H]; 2],
        to: &mut TileSums,
    );
}

/// 16 rows of 64 bytes.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
pub(crate) type TileLines = [[u8; 64]; 16];

/// Aligned to a cache line: loads that cross lines take twice the time.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C, align(64))]
pub(crate) struct Aligned<T>(pub T);

impl<T> Deref for Aligned<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

/// A vector of bytes.
pub(crate) type Line = Aligned<[u8; 64]>;

/// Operations on 64 bytes in four *lanes* of 16 (`B`), and sums over them (`Acc`). Every
/// implementation gives the same numbers: all of it is integer arithmetic without overflow.
pub(crate) trait Bytes: Simd {
    /// 4 × 16 bytes.
    type B: Copy;
    /// 16 sums, in a form that depends on the instruction set.
    type Acc: Copy;
    /// 16 sums of products with small factors, in a form that depends on the instruction set.
    type Small: Copy;
    /// 16 × i16.
    type H: Copy;
    /// Whether a `B` is one register, and the set has 32 registers.
    const WIDE: bool = false;
    /// Whether there is a unit for products of tiles: [`Bytes::with_tiles`] runs its task.
    const TILES: bool = false;

    /// Runs a task compiled for this instruction set.
    fn enter<T: Task>(self, task: T) -> T::Output;

    /// Prefetches the cache line at `at`, which may be any address.
    fn prefetch(self, at: *const u8);
    fn load_b(self, v: &[u8; 64]) -> Self::B;
    fn store_b(self, v: Self::B, to: &mut [u8; 64]);
    fn splat_b(self, v: u8) -> Self::B;
    /// The same four bytes in all words.
    fn splat_word(self, v: [u8; 4]) -> Self::B;
    fn and_b(self, a: Self::B, b: Self::B) -> Self::B;
    fn or_b(self, a: Self::B, b: Self::B) -> Self::B;
    fn xor_b(self, a: Self::B, b: Self::B) -> Self::B;
    /// Wrapping.
    fn add_b(self, a: Self::B, b: Self::B) -> Self::B;
    /// Wrapping.
    fn sub_b(self, a: Self::B, b: Self::B) -> Self::B;
    /// Each byte to the right; the `K` high bits of the result are unspecified.
    fn shr_b<const K: u32>(self, a: Self::B) -> Self::B;
    /// Each byte to the left; the `K` low bits of the result are unspecified.
    fn shl_b<const K: u32>(self, a: Self::B) -> Self::B;
    /// Byte by byte `table[index]` within the lane; zero where the index has its top bit set. Other
    /// indices are below 16.
    fn lookup_b(self, table: Self::B, index: Self::B) -> Self::B;

    /// Lane l has 16 bytes of the stream that contain the bits from 16·`BITS`·l to 16·`BITS`·(l + 1) + 7; see [`Windows`]
    /// for the order.
    fn load_stream<const BITS: usize>(self, stream: &[[u8; 8]; BITS]) -> Self::B;
    /// Of 16-bit numbers: byte 2i is the high byte of `first[i]` · `factors[0][i]`, and byte 2i + 1 that of
    /// `second[i]` · `factors[1][i]`; products are modulo 2^16.
    fn high_products(self, first: Self::B, second: Self::B, factors: [Self::B; 2]) -> Self::B;
    /// Byte i is the 8 bits from bit `BITS`·i of the stream, which is circular; the lowest bit of a byte is its first.
    /// `BITS` ≤ 5.
    #[inline(always)]
    fn windows<const BITS: usize>(self, stream: &[[u8; 8]; BITS]) -> Self::B {
        windows_of_lanes(self, stream)
    }

    /// Byte r of lane g of vector q is byte 4q + g of `words[r]`, the lowest being byte 0.
    fn transpose(self, words: &[u64; 16]) -> [Self::B; 2];

    /// Moves the bytes to the order in which [`Bytes::dot2`] takes them.
    #[inline(always)]
    fn arrange(self, v: Self::B) -> Self::B {
        v
    }
    /// [`Bytes::lookup_b`] by arranged indices below 16, each in the lane where its byte was; the bytes
    /// found are arranged.
    #[inline(always)]
    fn lookup_arranged(self, table: Self::B, index: Self::B) -> Self::B {
        self.lookup_b(table, index)
    }
    /// The same, and zero where the index has the bits of [`NONE`], which no other one has.
    #[inline(always)]
    fn lookup_arranged_or_zero(self, table: Self::B, index: Self::B) -> Self::B {
        self.lookup_b(table, index)
    }

    /// `acc[k][r] += Σ_lane found[lane, r]`, where `found` is the result of [`Bytes::lookup_arranged`] (with
    /// `OR_ZERO`, of [`Bytes::lookup_arranged_or_zero`]) for `index` in table k. Counts as one [`Bytes::dot2`].
    /// For [`Bytes::WIDE`] sets only.
    #[inline(always)]
    fn add_lookups<const OR_ZERO: bool>(
        self,
        mut acc: [Self::Acc; 8],
        tables: &[[u8; 64]; 8],
        index: Self::B,
    ) -> [Self::Acc; 8] {
        for (acc, table) in acc.iter_mut().zip(tables) {
            let table = self.load_b(table);
            let found = if OR_ZERO {
                self.lookup_arranged_or_zero(table, index)
            } else {
                self.lookup_arranged(table, index)
            };
            *acc = self.dot2(*acc, found, self.splat_b(0));
        }
        acc
    }

    fn zero_acc(self) -> Self::Acc;
    /// `acc[r] += Σ_lane a[lane, r] + b[lane, r]` as signed bytes, for r = 0..16, a and b arranged. At most
    /// [`MAX_DOTS`] calls for one accumulator, or half as many if bytes may be −128. Without −128 the sums of
    /// two lanes are within ±508, and 64 · 508 = 32512 fits 16 bits, the width in which the narrowest
    /// implementation adds.
    fn dot2(self, acc: Self::Acc, a: Self::B, b: Self::B) -> Self::Acc;
    /// The sums of an accumulator.
    fn finish(self, acc: Self::Acc) -> Self::I;

    /// `acc[i] += Σ_k u[4i + k] · v[4i + k]` for i = 0..16, with u unsigned and below 128, v signed:
    /// products of neighbors then fit 16 bits.
    fn dot4(self, acc: Self::I, u: Self::B, v: Self::B) -> Self::I;
    fn zero_small(self) -> Self::Small;
    /// [`Bytes::dot4`] for v above −128 and small u: the largest u of each call, summed over all calls for one
    /// accumulator, is at most [`MAX_SMALL`]. Two neighbors then add up to at most 2 · 128 · 127 = 32512, which
    /// fits 16 bits, so that sets without 32-bit dot products widen only once.
    fn dot4_small(self, acc: Self::Small, u: Self::B, v: Self::B) -> Self::Small;
    /// The sums of an accumulator.
    fn finish_small(self, acc: Self::Small) -> Self::I;
    fn load_h(self, v: &[i16; 16]) -> Self::H;
    fn store_h(self, v: Self::H, to: &mut [i16; 16]);
    /// Wrapping.
    fn add_h(self, a: Self::H, b: Self::H) -> Self::H;
    /// Wrapping.
    fn sub_h(self, a: Self::H, b: Self::H) -> Self::H;
    /// Sign-extends to 32 bits.
    fn widen_h(self, v: Self::H) -> Self::I;
    /// The sums of neighbors: first those of `a`, then those of `b`, in order.
    fn add_pairs(self, a: Self::I, b: Self::I) -> Self::I;
    /// The lanes from four places.
    fn load_lanes(self, v: [&[u8; 16]; 4]) -> Self::B;
    /// Transposes the words of 4 vectors within each lane: word w of vector v becomes word v of vector w.
    fn transpose_words(self, v: [Self::B; 4]) -> [Self::B; 4];
    /// Stores the lanes as little-endian words.
    fn store_words(self, v: Self::I, to: &mut [u8; 64]);
    fn load_i(self, v: &[i32; 16]) -> Self::I;
    /// Stores lanes between −128 and 127 as bytes.
    fn store_low_bytes(self, v: Self::I, to: &mut [i8; 16]);

    /// Runs `task` with the unit for tiles; `None` if the instruction set has none.
    #[inline(always)]
    fn with_tiles<T: TileTask>(self, _task: T) -> Option<T::Output> {
        None
    }
}

/// [`Bytes::windows`] by look-ups within lanes.
#[inline(always)]
pub(super) fn windows_of_lanes<S: Bytes, const BITS: usize>(
    s: S,
    stream: &[[u8; 8]; BITS],
) -> S::B {
    let lanes = s.load_stream(stream);
    let first = s.lookup_b(lanes, s.load_b(&Windows::<BITS>::FIRST_BYTES));
    let second = if Windows::<BITS>::TOGETHER {
        first
    } else {
        s.lookup_b(lanes, s.load_b(&Windows::<BITS>::SECOND_BYTES))
    };
    let factors =
        [s.load_b(&Windows::<BITS>::FIRST_FACTORS), s.load_b(&Windows::<BITS>::SECOND_FACTORS)];
    s.high_products(first, second, factors)
}

/// Columns of a product of tiles.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
pub(crate) const TILE_COLS: usize = 128;

/// Products of tiles, [group of 16 tokens][row tile][token][row], or the other way around.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
pub(crate) type TileSums = [[[[i32; 16]; 16]; 2]; 2];

/// See [`Bytes::dot2`].
pub(crate) const MAX_DOTS: usize = 64;

/// See [`Bytes::dot4_small`].
pub(crate) const MAX_SMALL: usize = 128;

/// An index whose look-up gives zero: the top bit, which byte shuffles test, and another one for sets that test
/// a bit themselves.
pub(crate) const NONE: u8 = 0xc0;
