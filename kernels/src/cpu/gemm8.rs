//! Matrix × matrix for joint N:M codes with rounded activations: codes expand to bytes in cache, a
//! block of rows and columns at a time, and bytes are multiplied, by tiles where the CPU has a unit
//! for them. Each output is the same chain of operations as in [`super::nm8`], so that a token has
//! the same result alone and among others.
//!
//! Operations per weight and token, AVX2: 1/16 of an instruction; AVX-512 with VNNI: 1/64; AMX:
//! 1/16384. The expansion (about 8 instructions for 16 groups) is shared by all tokens.

use stb_format::encoding::nm::{QUAD, TILE};
use stb_format::encoding::{MatrixView, NmView};
use stb_format::half::f16;

use super::bytes::{Bytes, MAX_SMALL, TileSums};
use super::int8::{self, BLOCK};
use super::nm8::{self, PART, Planes};
use super::{Simd, nm};
use crate::isa::{Isa, Task};

/// Columns expanded at a time; a multiple of [`BLOCK`].
const DEPTH: usize = 512;
/// Row tiles expanded at a time: 64 rows × [`DEPTH`] columns are 32 KiB.
const TILES: usize = 4;
/// Tokens are padded with zeros to a multiple of this.
const TOKENS: usize = 32;

/// Where a cache line begins: vectors that cross lines take twice the time.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C, align(64))]
struct Aligned<T>(T);

/// Bytes of 16 rows × 128 columns: for every four columns, the rows' four bytes side by side.
type Expanded = Aligned<[[u8; 64]; BLOCK / 4]>;

/// Activations of a block of columns, [token][column].
type Codes = Aligned<[[i8; BLOCK]; TOKENS]>;

/// Products of tiles before they are scaled.
type Sums = Aligned<TileSums>;

/// Results of 16 rows for one token.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C, align(64))]
pub struct Lanes(pub [f32; TILE]);

/// Activations of several tokens, rounded to 8 bits with one scale per token and 128 columns, ready
/// for [`matmul_rounded`].
#[derive(Default, Debug)]
pub struct RoundedTokens {
    /// By [`TOKENS`] tokens, for each block: [token][column]. Whole rows of activations would lie at
    /// multiples of a page and so in the same few places of a cache.
    codes: Vec<Codes>,
    /// By [`TOKENS`] tokens, for each block: the scale of each token.
    scales: Vec<[f32; TOKENS]>,
    /// Minus the sums of codes, in the same order.
    sums: Vec<[i32; TOKENS]>,
    tokens: usize,
    cols: usize,
}

/// Whether [`matmul_rounded`] has a kernel for the matrix.
#[must_use]
pub fn has_rounded_matmul(matrix: &MatrixView<'_>) -> bool {
    matches!(matrix, MatrixView::Nm(_)) && int8::supports(matrix)
}

/// Activations of up to 32 tokens on their way into [`RoundedTokens`].
#[derive(Debug)]
pub struct RoundingPart<'a> {
    x: &'a [f32],
    codes: &'a mut [Codes],
    /// For each block.
    scales: &'a mut [[f32; TOKENS]],
    sums: &'a mut [[i32; TOKENS]],
}

impl RoundedTokens {
    /// Makes room for `x`, [tokens, columns] row-major, and splits the work of rounding it for
    /// `matrix` into independent parts; all of them must be given to [`RoundingPart::round`].
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of the matrix' width.
    pub fn parts<'a>(
        &'a mut self,
        matrix: &MatrixView<'_>,
        x: &'a [f32],
    ) -> impl Iterator<Item = RoundingPart<'a>> {
        let cols = matrix.cols();
        assert!(x.len().is_multiple_of(cols), "whole rows of activations");
        self.tokens = x.len() / cols;
        self.cols = cols;
        let (padded, blocks) = (self.tokens.next_multiple_of(TOKENS), cols.div_ceil(BLOCK));
        self.codes.clear();
        self.codes.resize(padded / TOKENS * blocks, Aligned([[0; BLOCK]; TOKENS]));
        self.scales.clear();
        self.scales.resize(padded / TOKENS * blocks, [0.0; TOKENS]);
        self.sums.clear();
        self.sums.resize(padded / TOKENS * blocks, [0; TOKENS]);
        let codes = self.codes.chunks_mut(blocks);
        let scales = self.scales.chunks_mut(blocks);
        let sums = self.sums.chunks_mut(blocks);
        let parts = x.chunks(TOKENS * cols).zip(codes).zip(scales).zip(sums);
        parts.map(|(((x, codes), scales), sums)| RoundingPart { x, codes, scales, sums })
    }

    /// Tokens held.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Lanes that the output of [`matmul_rounded`] takes for one tile of 16 rows: tokens, padded.
    #[must_use]
    pub fn tile_stride(&self) -> usize {
        self.tokens.next_multiple_of(TOKENS)
    }
}

impl RoundingPart<'_> {
    /// Rounds these activations, with the column factors of `matrix`.
    pub fn round(&mut self, isa: Isa, matrix: &MatrixView<'_>) {
        isa.run(Round { part: self, matrix });
    }
}

struct Round<'p, 'a, 'm> {
    part: &'p mut RoundingPart<'a>,
    matrix: &'m MatrixView<'m>,
}

impl Task for Round<'_, '_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { part, matrix } = self;
        let cols = matrix.cols();
        let blocks = cols.div_ceil(BLOCK);
        let mut factored = vec![0.0; blocks * BLOCK];
        for (t, x) in part.x.chunks_exact(cols).enumerate() {
            factored[..cols].copy_from_slice(x);
            if let MatrixView::Nm(m) = matrix {
                nm::multiply_factors(s, m, &mut factored);
            }
            for b in 0..blocks {
                let codes = &mut part.codes[b].0[t];
                let x = &factored[b * BLOCK..(b + 1) * BLOCK];
                part.scales[b][t] = int8::round_block(s, x, codes);
                part.sums[b][t] = -codes.iter().map(|c| i32::from(*c)).sum::<i32>();
            }
        }
    }
}

/// `y[tile, t, r] = Σ_c w[first + 16·tile + r, c] · x[t, c]` with rounded activations: for each tile
/// of 16 rows [`RoundedTokens::tile_stride`] tokens, of which the first count. Rows
/// past the last are zero.
///
/// # Panics
/// If `first` is not a multiple of [`crate::ROW_TILE`], the rows are not inside the matrix, the
/// widths differ, `y` is not whole tiles, or there is no kernel ([`has_rounded_matmul`]).
pub fn matmul_rounded(
    isa: Isa,
    matrix: &MatrixView<'_>,
    x: &RoundedTokens,
    first: usize,
    y: &mut [Lanes],
) {
    assert!(has_rounded_matmul(matrix), "an encoding with a kernel");
    assert!(first.is_multiple_of(TILE), "work is split at row tiles");
    assert_eq!(x.cols, matrix.cols(), "one activation per column");
    let stride = x.tile_stride();
    assert!(stride != 0 && y.len().is_multiple_of(stride), "whole tiles of output");
    assert!(first + (y.len() / stride - 1) * TILE < matrix.rows(), "rows outside the matrix");
    let MatrixView::Nm(matrix) = matrix else { unreachable!("an encoding with a kernel") };
    isa.run(MatMul { matrix, x, first, y });
}

struct MatMul<'a> {
    matrix: &'a NmView<'a>,
    x: &'a RoundedTokens,
    first: usize,
    y: &'a mut [Lanes],
}

impl Task for MatMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        s.with_tiles(InTiles(self));
    }
}

struct InTiles<'a>(MatMul<'a>);

impl Task for InTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let m = self.0.matrix;
        match (m.spec.n(), m.spec.m()) {
            (1, 4) => all_tiles::<S, 1, 4>(s, self.0),
            (1, 8) => all_tiles::<S, 1, 8>(s, self.0),
            (2, 4) => all_tiles::<S, 2, 4>(s, self.0),
            (2, 8) => all_tiles::<S, 2, 8>(s, self.0),
            (n, m) => unreachable!("the format has no {n}:{m} codes"),
        }
    }
}

#[inline(always)]
fn all_tiles<S: Bytes, const N: usize, const M: usize>(s: S, job: MatMul<'_>) {
    let MatMul { matrix: m, x, first, y } = job;
    let stride = x.tile_stride();
    let patterns = Patterns::<S>::new::<N, M>(s);
    let mut weights = vec![Aligned([[0; 64]; BLOCK / 4]); TILES * DEPTH / BLOCK];
    let mut sums: [Sums; 2] = [Aligned([[[[0; 16]; 16]; 2]; 2]); 2];
    y.fill(Lanes::default());
    for (i, y) in y.chunks_mut(TILES * stride).enumerate() {
        let tile = first / TILE + i * TILES;
        let tiles = y.len() / stride;
        for from in (0..x.blocks()).step_by(DEPTH / BLOCK) {
            let blocks = from..x.blocks().min(from + DEPTH / BLOCK);
            for t in 0..tiles {
                for (k, block) in blocks.clone().enumerate() {
                    let to = &mut weights[t * (DEPTH / BLOCK) + k];
                    patterns.expand::<N, M>(s, m, tile + t, block, to);
                }
            }
            let part = Part { m, x, tile, blocks, weights: &weights };
            if S::TILES {
                part.multiply_tiles(s, tiles, &mut sums, y);
            } else {
                part.multiply(s, tiles, y);
            }
        }
        for (t, y) in y.chunks_exact_mut(stride).enumerate() {
            scale_rows(s, m, tile + t, y);
        }
    }
}

/// Multiplies the sums of a tile, [token][row], by the scales of its rows.
#[inline(always)]
fn scale_rows<S: Bytes>(s: S, m: &NmView<'_>, tile: usize, y: &mut [Lanes]) {
    let mut scales = [0.0; TILE];
    for (to, scale) in scales.iter_mut().zip(&m.row_scales[tile * TILE..]) {
        *to = f16::from_le_bytes(*scale).to_f32();
    }
    let scales = s.load(&scales);
    for Lanes(y) in y {
        s.store(s.mul(s.load(y), scales), y);
    }
}

/// What the codes expand to: the bytes of a group of columns, four at a time as one word. Bytes are
/// signed for tiles and have an offset of 1 otherwise, because the first operand of
/// [`Bytes::dot4_small`] is unsigned.
struct Patterns<S: Simd> {
    /// For the first four columns of a group and the others, by what [`nm8::first_indices`] gives.
    /// 2:8: what one weight changes, by exclusive or, in four weights of zero.
    tables: [S::F; 2],
    /// 2:4: the same for codes with the negative sign.
    negative: S::F,
    /// Four weights of zero.
    zero: u32,
}

impl<S: Bytes> Patterns<S> {
    #[inline(always)]
    fn new<const N: usize, const M: usize>(s: S) -> Self {
        let offset = if S::TILES { 0i8 } else { 1 };
        let zero = offset.cast_unsigned();
        let zeros = u32::from_ne_bytes([zero; 4]);
        let change = |negative: bool| {
            let weight = if negative { -1 } else { 1 };
            u64::from((offset + weight).cast_unsigned() ^ zero)
        };
        let start = if (N, M) == (2, 8) { 0 } else { zeros };
        let (mut low, mut high, mut negative) = ([0u32; 16], [0u32; 16], [0u32; 16]);
        for index in 0..16 {
            if (N, M) == (2, 4) {
                // i + 4j: positive at i; at j positive if i < j, negative if i > j.
                let (i, j) = (index % 4, index / 4);
                let word = |minus: bool| {
                    let at_j = if i == j { 0 } else { change((i > j) != minus) << (8 * j) };
                    (change(minus) << (8 * i) ^ at_j) as u32
                };
                (low[index], negative[index]) = (start ^ word(false), start ^ word(true));
            } else {
                let bytes = change(index / M % 2 == 1) << (8 * (index % M));
                (low[index], high[index]) = (start ^ bytes as u32, start ^ (bytes >> 32) as u32);
            }
        }
        let table = |words: &[u32; 16]| {
            let mut floats = [0.0; 16];
            for i in 0..16 {
                floats[i] = f32::from_bits(words[i]);
            }
            s.load(&floats)
        };
        Self { tables: [table(&low), table(&high)], negative: table(&negative), zero: zeros }
    }

    /// Columns `128·block..` of a tile of rows.
    #[inline(always)]
    fn expand<const N: usize, const M: usize>(
        &self,
        s: S,
        m: &NmView<'_>,
        tile: usize,
        block: usize,
        to: &mut Expanded,
    ) {
        let quads = m.groups().div_ceil(QUAD);
        let codes = m.tile_codes(tile).as_chunks::<64>().0;
        let bits = N * M.trailing_zeros() as usize + 1;
        let words = PART * QUAD * M / 4;
        let parts = BLOCK / 4 / words;
        for (p, to) in to.0.chunks_exact_mut(words).enumerate() {
            let part = block * parts + p;
            if part * PART >= quads {
                // Activations are zero there.
                to.fill([0; 64]);
                continue;
            }
            let planes = Planes::new(codes, 0, bits, quads, part);
            let (first, second) = if (N, M) == (2, 8) {
                let [first, second] = nm8::pairs_of_8(s, &planes);
                (first, second)
            } else {
                let first = nm8::first_indices::<S, N, M>(s, &planes);
                (first, first)
            };
            for (q, to) in to.chunks_exact_mut(QUAD * M / 4).enumerate() {
                // Widening from memory takes fewer operations than from parts of a vector.
                let (mut a, mut b) = (Aligned([0; 64]), Aligned([0; 64]));
                s.store_b(first[q], &mut a.0);
                if (N, M) == (2, 8) {
                    s.store_b(second[q], &mut b.0);
                }
                let lanes = a.0.as_chunks().0.iter().zip(b.0.as_chunks().0);
                for ((a, b), to) in lanes.zip(to.chunks_exact_mut(M / 4)) {
                    let words = self.words::<N, M>(s, s.widen_u8(a), b);
                    for (k, to) in to.iter_mut().enumerate() {
                        s.store_words(words[k], to);
                    }
                }
            }
        }
    }

    /// The first four columns of 16 groups, and the others.
    #[inline(always)]
    fn words<const N: usize, const M: usize>(
        &self,
        s: S,
        first: S::I,
        second: &[u8; 16],
    ) -> [S::I; 2] {
        let word = |table: S::F, index: S::I| s.cast_i(s.lookup(table, index));
        let [low, high] = self.tables;
        match (N, M) {
            (2, 4) => {
                let (plus, minus) = (word(low, first), word(self.negative, first));
                let sign = s.gt_i(first, s.splat_i(15));
                [s.xor(plus, s.and(s.xor(plus, minus), sign)), plus]
            }
            (2, 8) => {
                let second = s.widen_u8(second);
                let exists = s.gt_i(s.splat_i(128), second);
                let zero = s.splat_i(self.zero);
                [
                    s.xor(s.xor(zero, word(low, first)), s.and(word(low, second), exists)),
                    s.xor(s.xor(zero, word(high, first)), s.and(word(high, second), exists)),
                ]
            }
            _ => [word(low, first), word(high, first)],
        }
    }
}

/// The product of expanded rows and columns with all tokens.
struct Part<'a> {
    m: &'a NmView<'a>,
    x: &'a RoundedTokens,
    /// First tile of rows.
    tile: usize,
    /// Blocks of columns.
    blocks: std::ops::Range<usize>,
    /// [tile][block].
    weights: &'a [Expanded],
}

impl<'a> Part<'a> {
    #[inline(always)]
    fn expanded(&self, tile: usize, k: usize) -> &'a Expanded {
        &self.weights[tile * (DEPTH / BLOCK) + k]
    }

    /// Adds to `y`, [tile][token][row], with [`Bytes::dot4_small`].
    #[inline(always)]
    fn multiply<S: Bytes>(&self, s: S, tiles: usize, y: &mut [Lanes]) {
        // The trait's sizes as constants that the micro-kernel can be unrolled for.
        match S::GEMM_ROWS {
            8 => self.multiply_sized::<S, 4, 4>(s, tiles, y),
            _ => self.multiply_sized::<S, 2, 2>(s, tiles, y),
        }
    }

    #[inline(always)]
    fn multiply_sized<S: Bytes, const T: usize, const V: usize>(
        &self,
        s: S,
        tiles: usize,
        y: &mut [Lanes],
    ) {
        let stride = self.x.tile_stride();
        for token in (0..self.x.tokens).step_by(T) {
            let mut tile = 0;
            while tile + V <= tiles {
                self.micro::<S, T, V>(s, tile, token, &mut y[tile * stride..]);
                tile += V;
            }
            while tile < tiles {
                self.micro::<S, T, 1>(s, tile, token, &mut y[tile * stride..]);
                tile += 1;
            }
        }
    }

    /// `V` tiles from `tile` × `T` tokens from `token`.
    #[inline(always)]
    fn micro<S: Bytes, const T: usize, const V: usize>(
        &self,
        s: S,
        tile: usize,
        token: usize,
        y: &mut [Lanes],
    ) {
        let (x, all, stride) = (self.x, self.x.blocks(), self.x.tile_stride());
        for (k, block) in self.blocks.clone().enumerate() {
            let mut rows: [&[[i8; 4]]; T] = [&[]; T];
            let mut acc = [[s.zero_small(); V]; T];
            for t in 0..T {
                let (at, t_in) = (token / TOKENS * all + block, token % TOKENS + t);
                rows[t] = &x.codes[at].0[t_in].as_chunks().0[..BLOCK / 4];
            }
            let mut weights: [&[[u8; 64]]; V] = [&[]; V];
            for v in 0..V {
                weights[v] = &self.expanded(tile + v, k).0[..];
            }
            for c in 0..BLOCK / 4 {
                let mut w = [s.splat_b(0); V];
                for v in 0..V {
                    w[v] = s.load_b(&weights[v][c]);
                }
                for t in 0..T {
                    let x = s.splat_4(rows[t][c].map(i8::cast_unsigned));
                    for v in 0..V {
                        acc[t][v] = s.dot4_small(acc[t][v], w[v], x);
                    }
                }
            }
            for v in 0..V {
                let base = Base::new(s, self.m, self.tile + tile + v, block);
                for t in 0..T {
                    let at = v * stride + token + t;
                    let (token_block, t_in) = (token / TOKENS * all + block, token % TOKENS + t);
                    // The offset of the bytes, times the activations, is taken off.
                    let offset = s.splat_i(x.sums[token_block][t_in].cast_unsigned());
                    let sums = s.add_i(s.finish_small(acc[t][v]), offset);
                    let scale = base.times(s, x.scales[token_block][t_in]);
                    add_to(s, scale, sums, &mut y[at]);
                }
            }
        }
    }

    /// Adds to `y`, [tile][token][row], with [`Bytes::tile_products`].
    #[inline(always)]
    fn multiply_tiles<S: Bytes>(&self, s: S, tiles: usize, sums: &mut [Sums; 2], y: &mut [Lanes]) {
        for token in (0..self.x.tokens).step_by(TOKENS) {
            for tile in (0..tiles).step_by(2) {
                if self.x.tokens - token > 16 {
                    self.tiles::<S, 2>(s, tile, tiles, token, sums, y);
                } else {
                    self.tiles::<S, 1>(s, tile, tiles, token, sums, y);
                }
            }
        }
    }

    /// Two tiles of rows (the second perhaps past the last) × `16·T` tokens.
    #[inline(always)]
    fn tiles<S: Bytes, const T: usize>(
        &self,
        s: S,
        tile: usize,
        tiles: usize,
        token: usize,
        sums: &mut [Sums; 2],
        y: &mut [Lanes],
    ) {
        let all = self.x.blocks();
        let second = (tile + 1).min(tiles - 1);
        // Products of one block are computed while those of the block before are added: what a tile
        // has just stored cannot be loaded at once.
        let count = self.blocks.len();
        for k in 0..=count {
            if k < count {
                let w = [&self.expanded(tile, k).0, &self.expanded(second, k).0];
                let x = &self.x.codes[token / TOKENS * all + self.blocks.start + k];
                s.tile_products::<T>(w, &x.0, &mut sums[k % 2].0);
            }
            if k > 0 {
                let block = self.blocks.start + k - 1;
                let sums = &sums[(k - 1) % 2].0;
                for j in 0..(tiles - tile).min(2) {
                    self.add_sums::<S, T>(s, tile + j, block, token, sums, j, y);
                }
            }
        }
    }

    #[inline(always)]
    fn add_sums<S: Bytes, const T: usize>(
        &self,
        s: S,
        tile: usize,
        block: usize,
        token: usize,
        sums: &TileSums,
        j: usize,
        y: &mut [Lanes],
    ) {
        let (x, all) = (self.x, self.x.blocks());
        let base = Base::new(s, self.m, self.tile + tile, block);
        let y = &mut y[tile * x.tile_stride() + token..][..16 * T];
        let scales = x.scales[token / TOKENS * all + block].as_chunks::<16>().0;
        for ((y, scales), sums) in y.as_chunks_mut::<16>().0.iter_mut().zip(scales).zip(sums) {
            for ((y, scale), sums) in y.iter_mut().zip(scales).zip(&sums[j]) {
                add_to(s, base.times(s, *scale), s.load_i(sums), y);
            }
        }
    }
}

/// `y += scale · sums`.
#[inline(always)]
fn add_to<S: Bytes>(s: S, scale: S::F, sums: S::I, y: &mut Lanes) {
    s.store(s.mul_add(scale, s.to_f32(sums), s.load(&y.0)), &mut y.0);
}

/// The scales of 16 rows in a block of columns, without the rows' own.
struct Base<S: Simd>(Option<(S::F, f32)>);

impl<S: Bytes> Base<S> {
    #[inline(always)]
    fn new(s: S, m: &NmView<'_>, tile: usize, block: usize) -> Self {
        if m.blocks() == 0 {
            return Self(None);
        }
        Self(Some(nm::multiplier_steps(s, m, tile, block * BLOCK / m.spec.block())))
    }

    /// Times the scale of activations: the same operations as [`nm::multipliers`].
    #[inline(always)]
    fn times(&self, s: S, activation: f32) -> S::F {
        match self.0 {
            None => s.splat(activation),
            Some((steps, step)) => s.mul(steps, s.splat(activation * step)),
        }
    }
}

// Blocks of weight scales are whole blocks of activations, and expanded in whole quads.
const _: () = assert!(DEPTH.is_multiple_of(BLOCK) && BLOCK.is_multiple_of(QUAD * 8));
// Of four columns at a time; bytes are at most 2.
const _: () = assert!(BLOCK / 4 * 2 <= MAX_SMALL);
