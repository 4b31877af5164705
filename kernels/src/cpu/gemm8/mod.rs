//! Matrix × matrix with rounded activations. Each output is one chain of operations, whatever the number
//! of tokens, the split and the instruction set; for joint codes the same as in [`super::nm8`], so that
//! a token has the same result alone and among others.
//!
//! Integers are expanded to bytes ([`integers`]). For joint codes, by what the instruction set has, one
//! of three ways: codes are expanded to bytes and multiplied by a unit for tiles ([`tiles`]), looked up
//! in registers for some tokens ([`lookups`]), or they are indices of sums of activations, of many
//! tokens at a time ([`tables`]).

mod integers;
mod lookups;
mod tables;
mod tiles;

use std::cell::RefCell;

use stb_format::encoding::nm::TILE;
use stb_format::encoding::{MatrixView, NmView};

use super::bytes::{Aligned, Bytes};
use super::int8::{self, BLOCK};
use super::nm;
use crate::isa::{Isa, Task};

/// Tokens are padded with zeros to a multiple of this.
const TOKENS: usize = 32;

/// Activations of a block of columns, [token][column].
type ByToken = Aligned<[[i8; BLOCK]; TOKENS]>;

/// Activations of a block of columns, [half of the tokens][column][token].
type ByColumn = Aligned<[[[i16; 16]; BLOCK]; TOKENS / 16]>;

/// Results of 16 rows for one token.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C, align(64))]
struct Lanes([f32; TILE]);

/// Activations of several tokens, rounded to 8 bits with one scale per token and 128 columns, ready
/// for [`gemm_q8`].
#[derive(Default, Debug)]
pub struct ActivationsQ8 {
    /// What the instruction set reads, for each block; but one of these are empty. Whole rows of
    /// activations would lie at multiples of a page and so in the same few places of a cache. By
    /// [`TOKENS`] tokens:
    by_token: Vec<ByToken>,
    by_column: Vec<ByColumn>,
    /// By [`lookups::TOGETHER`] tokens, the quads of each block.
    tables: Vec<lookups::Quad>,
    /// By [`TOKENS`] tokens, for each block: the scale of each token.
    scales: Vec<[f32; TOKENS]>,
    /// The same for integers, by 32 columns: the lowest code times the sum of activations.
    offsets: Vec<[[i32; TOKENS]; integers::UNITS]>,
    tokens: usize,
    cols: usize,
    /// Padded tokens whose products are computed together.
    group: usize,
    task_rows: usize,
}

/// Whether [`gemm_q8`] has a kernel for the matrix.
#[must_use]
pub fn has_gemm_q8(matrix: &MatrixView<'_>) -> bool {
    match matrix {
        MatrixView::Nm(_) => int8::supports(matrix),
        MatrixView::IntGroup(m) => m.spec.bits() <= 4,
        MatrixView::Stbllm(_) | MatrixView::Dense(_) => false,
    }
}

/// From how many tokens on [`gemm_q8`] takes less time than products for a few of them, as
/// measured: the work is done for 16 tokens at a time, or 8, whether they exist or not, and codes are
/// expanded first.
#[must_use]
pub fn gemm_min_batch(isa: Isa, matrix: &MatrixView<'_>) -> usize {
    match (way(isa, matrix, 1), matrix) {
        (Way::Integers, MatrixView::IntGroup(m)) if m.spec.bits() == 4 => 28,
        (Way::Integers, _) => 13,
        (Way::Lookups, _) => 5,
        (_, MatrixView::Nm(m)) if (m.spec.n(), m.spec.m()) == (1, 8) => 11,
        _ => 8,
    }
}

/// Of how many tokens [`gemm_q8`] makes use together: more share nothing that counts. For
/// integers it is the same on every set, because they are added in another order when there are few.
#[must_use]
pub fn prefill_batch(isa: Isa, matrix: &MatrixView<'_>) -> usize {
    match way(isa, matrix, usize::MAX) {
        Way::Tiles => 512,
        Way::Lookups | Way::Tables | Way::Integers => 128,
    }
}

/// Activations of up to 32 tokens on their way into [`ActivationsQ8`].
#[derive(Debug)]
pub struct RoundingPart<'a> {
    x: &'a [f32],
    /// For each block; but one of them are empty.
    by_token: &'a mut [ByToken],
    by_column: &'a mut [ByColumn],
    /// By [`lookups::TOGETHER`] tokens.
    tables: &'a mut [lookups::Quad],
    scales: &'a mut [[f32; TOKENS]],
    offsets: &'a mut [[[i32; TOKENS]; integers::UNITS]],
}

impl ActivationsQ8 {
    /// Makes room for `x`, [tokens, columns] row-major, and splits the work of rounding it for
    /// `matrix` into independent parts; all of them must be given to [`RoundingPart::round`].
    /// The instruction set is the one that multiplies them.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows of the matrix' width.
    pub fn parts<'a>(
        &'a mut self,
        isa: Isa,
        matrix: &MatrixView<'_>,
        x: &'a [f32],
    ) -> Vec<RoundingPart<'a>> {
        let cols = matrix.cols();
        assert!(x.len().is_multiple_of(cols), "whole rows of activations");
        self.tokens = x.len() / cols;
        self.cols = cols;
        let (padded, blocks) = (self.tokens.next_multiple_of(TOKENS), cols.div_ceil(BLOCK));
        let count = padded / TOKENS * blocks;
        // What is there already is written over, or belongs to no token.
        let way = way(isa, matrix, self.tokens);
        if !matches!(way, Way::Tiles | Way::Integers) {
            self.by_token.clear();
        }
        if !matches!(way, Way::Lookups) {
            self.tables.clear();
        }
        if !matches!(way, Way::Tables) {
            self.by_column.clear();
        }
        let mut tables_of_part = 0;
        match way {
            Way::Tiles => {
                (self.group, self.task_rows) = (padded, tiles::ROWS);
                self.by_token.resize(count, Aligned([[0; BLOCK]; TOKENS]));
            }
            Way::Integers => {
                (self.group, self.task_rows) = (padded.min(integers::GROUP), integers::ROWS);
                self.by_token.resize(count, Aligned([[0; BLOCK]; TOKENS]));
                self.offsets.resize(count, [[0; TOKENS]; integers::UNITS]);
            }
            Way::Lookups => {
                let together = self.tokens.next_multiple_of(lookups::TOGETHER);
                (self.group, self.task_rows) = (together.min(lookups::GROUP), lookups::ROWS);
                let of_token = blocks * lookups::quads(group_columns(matrix));
                tables_of_part = TOKENS / lookups::TOGETHER * of_token;
                let all = together / lookups::TOGETHER * of_token;
                self.tables.resize(all, Aligned([[0; 64]; lookups::TOGETHER]));
            }
            Way::Tables => {
                (self.group, self.task_rows) = (TOKENS, tables::ROWS);
                self.by_column.resize(count, Aligned([[[0; 16]; BLOCK]; TOKENS / 16]));
            }
        }
        self.scales.resize(count, [0.0; TOKENS]);
        let mut by_token = self.by_token.chunks_mut(blocks);
        let mut by_column = self.by_column.chunks_mut(blocks);
        let mut tables = self.tables.chunks_mut(tables_of_part.max(1));
        let mut offsets = self.offsets.chunks_mut(blocks);
        let parts = x.chunks(TOKENS * cols).zip(self.scales.chunks_mut(blocks));
        let part = |(x, scales)| RoundingPart {
            x,
            by_token: by_token.next().unwrap_or_default(),
            by_column: by_column.next().unwrap_or_default(),
            tables: tables.next().unwrap_or_default(),
            scales,
            offsets: offsets.next().unwrap_or_default(),
        };
        parts.map(part).collect()
    }

    /// How many tokens, padding included, [`gemm_q8`] computes at a time.
    #[must_use]
    pub fn group(&self) -> usize {
        self.group
    }

    /// Up to how many rows a call of [`gemm_q8`] does better with more of them.
    #[must_use]
    pub fn task_rows(&self) -> usize {
        self.task_rows
    }

    /// How many times [`ActivationsQ8::group`] tokens there are.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.tokens.div_ceil(self.group.max(1))
    }

    fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }
}

/// From how many tokens on tiles take less time than look-ups, where there are tiles.
const TILES_FROM: usize = 12;

/// See the module.
enum Way {
    Tiles,
    Lookups,
    Tables,
    Integers,
}

fn way(isa: Isa, matrix: &MatrixView<'_>, tokens: usize) -> Way {
    if matches!(matrix, MatrixView::IntGroup(_)) {
        return Way::Integers;
    }
    isa.run(Ways { tokens })
}

/// What a set does with joint codes for so many tokens.
struct Ways {
    tokens: usize,
}

impl Task for Ways {
    type Output = Way;

    #[inline(always)]
    fn run<S: Bytes>(self, _: S) -> Way {
        if S::TILES && self.tokens >= TILES_FROM {
            Way::Tiles
        } else if S::WIDE {
            Way::Lookups
        } else {
            Way::Tables
        }
    }
}

/// M of N:M, 8 if there is none.
fn group_columns(matrix: &MatrixView<'_>) -> usize {
    if let MatrixView::Nm(m) = matrix { m.spec.m() } else { 8 }
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
            for (b, x) in factored.chunks_exact(BLOCK).enumerate() {
                let mut codes = [0; BLOCK];
                part.scales[b][t] = int8::round_block(s, x, &mut codes);
                if let Some(to) = part.by_token.get_mut(b) {
                    to.0[t] = codes;
                    if let MatrixView::IntGroup(m) = matrix {
                        integers::offsets(m.spec.limits().0, &codes, t, &mut part.offsets[b]);
                    }
                } else if let Some(to) = part.by_column.get_mut(b) {
                    for (to, code) in to.0[t / 16].iter_mut().zip(codes) {
                        to[t % 16] = i16::from(code);
                    }
                } else {
                    let (group, t) = (t / lookups::TOGETHER, t % lookups::TOGETHER);
                    let columns = group_columns(matrix);
                    let quads = lookups::quads(columns);
                    let to = &mut part.tables[(group * blocks + b) * quads..][..quads];
                    lookups::arrange(columns, &codes, t, to);
                }
            }
        }
    }
}

/// `y[t][r] = Σ_c w[first + r, c] · x[t, c]` with rounded activations, for the tokens t of the group
/// `group`; `y` has a piece for each of [`ActivationsQ8::group`] tokens, and those past the last token
/// may be anything.
///
/// # Panics
/// If `first` is not a multiple of [`crate::ROW_TILE`], the rows are not inside the matrix, the
/// widths differ, pieces are missing or empty or differ in length, there is no such group, there is no
/// kernel ([`has_gemm_q8`]), or activations were prepared for another instruction set.
pub fn gemm_q8(
    isa: Isa,
    matrix: &MatrixView<'_>,
    x: &ActivationsQ8,
    group: usize,
    first: usize,
    y: &mut [&mut [f32]],
) {
    assert!(has_gemm_q8(matrix), "an encoding with a kernel");
    assert!(first.is_multiple_of(TILE), "work is split at row tiles");
    assert_eq!(x.cols, matrix.cols(), "one activation per column");
    assert!(group < x.groups(), "a group of tokens");
    let y = &mut y[..(x.tokens - group * x.group).min(x.group)];
    let rows = y[0].len();
    assert!(rows != 0 && y.iter().all(|y| y.len() == rows), "the same rows of every token");
    assert!(rows <= matrix.rows() && first <= matrix.rows() - rows, "rows outside the matrix");
    WORK.with_borrow_mut(|work| {
        let tiles = rows.div_ceil(TILE);
        if work.lanes.len() < tiles * x.group {
            work.lanes.resize(tiles * x.group, Lanes::default());
        }
        match matrix {
            MatrixView::Nm(matrix) => {
                isa.run(GemmTask { matrix, x, group, first, tiles, y, work });
            }
            MatrixView::IntGroup(matrix) => {
                isa.run(GemmTask { matrix, x, group, first, tiles, y, work });
            }
            MatrixView::Stbllm(_) | MatrixView::Dense(_) => unreachable!("a kernel, see above"),
        }
    });
}

thread_local! {
    /// Kept from task to task: it is in cache then.
    static WORK: RefCell<Work> = RefCell::default();
}

/// What a task needs, at least as long as it says.
#[derive(Default)]
struct Work {
    /// Sums of tiles of rows, [tile][token][row] or what suits: tiles times tokens of a group.
    lanes: Vec<Lanes>,
    lookups: lookups::Work,
}

struct GemmTask<'a, 'y, M> {
    matrix: &'a M,
    x: &'a ActivationsQ8,
    group: usize,
    /// First row, and how many tiles of rows.
    first: usize,
    tiles: usize,
    /// [token][row].
    y: &'a mut [&'y mut [f32]],
    work: &'a mut Work,
}

impl Task for GemmTask<'_, '_, NmView<'_>> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        if S::TILES && !self.x.by_token.is_empty() {
            s.with_tiles(tiles::InTiles(self));
        } else if S::WIDE {
            lookups::run(s, self);
        } else {
            tables::run(s, self);
        }
    }
}

/// Copies the results of a tile, [token][row], to the tokens' rows; the last tile may have fewer.
#[inline(always)]
fn copy_tile(lanes: &[Lanes], tile: usize, y: &mut [&mut [f32]]) {
    for (Lanes(lanes), y) in lanes.iter().zip(y) {
        let y = &mut y[tile * TILE..];
        match y.first_chunk_mut() {
            Some(y) => *y = *lanes,
            None => y.copy_from_slice(&lanes[..y.len()]),
        }
    }
}

/// The scales of 16 rows in a block of columns, without the rows' own: code + 1 of each row and the
/// size of a step, or nothing where all of them are 1.
#[inline(always)]
fn steps<S: Bytes>(s: S, m: &NmView<'_>, tile: usize, block: usize) -> Option<(S::F, f32)> {
    (m.blocks() != 0).then(
        #[inline(always)]
        || {
            let steps = nm::Steps::of(m, tile);
            (steps.at(s, block * BLOCK / m.spec.block()), steps.size)
        },
    )
}

/// Multiplies the sums of a tile, [token][row], by the scales of its rows.
#[inline(always)]
fn scale_rows<S: Bytes>(s: S, m: &NmView<'_>, tile: usize, y: &mut [Lanes]) {
    let scales = nm::row_scales(s, m, tile);
    for Lanes(y) in y {
        s.store(s.mul(s.load(y), scales), y);
    }
}

/// From [row][token] to [token][row].
#[inline(always)]
fn transpose(lanes: &mut [Lanes; TILE]) {
    let by_row = *lanes;
    for (t, Lanes(to)) in lanes.iter_mut().enumerate() {
        for (to, row) in to.iter_mut().zip(&by_row) {
            *to = row.0[t];
        }
    }
}
