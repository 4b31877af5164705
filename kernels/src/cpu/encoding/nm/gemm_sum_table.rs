//! Products of N:M codes with many q8 tokens by tables of sums. The signed sum of activations that a code
//! stands for is looked up, for 16 tokens at a time. No weight is expanded and no product computed: each
//! code takes one load and one addition, whatever its number of columns.
//!
//! | | columns of a unit | entries of its table | look-ups for 128 columns |
//! |---|---|---|---|
//! | 1:8 | 8 | 16 | 16 |
//! | 1:4 | 2 × 4 | 64 | 16 |
//! | 2:8 | 8 | 128 | 16 |
//! | 2:4 | 4 | 32 | 32 |
//!
//! Building a table takes an addition and a store for each entry, shared by all rows. Sums of a block fit in
//! 16 bits: 64 weights of ±1 times ±127 are at most ±8128.

use stb_format::encoding::NmView;
use stb_format::encoding::nm::{QUAD, TILE};

use stb_format::nm_rates;

use super::super::gemm_task::{GemmQ8Task, TileLanes, copy_tile};
use super::super::tile_scales::{block_steps, row_scales};
use super::codes::{self, CodePlanes, PART};
use crate::cpu::arch::bytes::{Aligned, Bytes};
use crate::cpu::ops::q8::BLOCK;
use crate::cpu::ops::q8_batch::TOKENS;

/// Rows of a task, which share tables: results for 32 tokens take 128 KiB, about what is left in the L2
/// cache of a core.
pub(super) const ROWS: usize = 1024;

/// Sums for 16 tokens.
type TokenSums = [i16; 16];

/// The tables of all units of a block, one after the other, with room for the rate that needs most; any
/// byte is a valid index into the last table.
type SumTables = Aligned<[TokenSums; 16 * 128 + 128]>;

/// The indices of the rows of a tile: [unit][row].
type UnitIndices<const UNITS: usize> = [[u8; TILE]; UNITS];

/// Groups whose codes form one index: as many as keep tables small.
const fn groups_of_unit(code_bits: usize) -> usize {
    if code_bits < 4 { 2 } else { 1 }
}

#[inline(always)]
pub(super) fn run<S: Bytes>(s: S, task: GemmQ8Task<'_, '_, NmView<'_>>) {
    nm_rates!(task.matrix.spec, |N, M, BITS| {
        const GROUPS: usize = groups_of_unit(BITS);
        const UNITS: usize = BLOCK / (GROUPS * M);
        const ENTRIES: usize = 1 << (GROUPS * BITS);
        all_tiles::<S, N, M, BITS, UNITS, ENTRIES>(s, task)
    });
}

/// Sums are [tile][half of the tokens][row][token] until the end.
#[inline(always)]
fn all_tiles<
    S: Bytes,
    const N: usize,
    const M: usize,
    const BITS: usize,
    const UNITS: usize,
    const ENTRIES: usize,
>(
    s: S,
    task: GemmQ8Task<'_, '_, NmView<'_>>,
) {
    let GemmQ8Task { matrix: m, x, group, first, tiles, y, lanes } = task;
    let first = first / TILE;
    let sums = &mut lanes.as_chunks_mut::<TOKENS>().0[..tiles];
    let mut tables: Vec<SumTables> = vec![Aligned([[0; 16]; 16 * 128 + 128])];
    let mut indices = vec![[[0; TILE]; UNITS]; tiles];
    sums.fill([TileLanes::default(); TOKENS]);
    for block in 0..x.blocks() {
        for (t, to) in indices.iter_mut().enumerate() {
            index::<S, N, M, BITS, UNITS>(s, m, first + t, block, to);
        }
        let at = group * x.blocks() + block;
        let scales = x.scales[at].as_chunks::<16>().0;
        for half in 0..y.len().div_ceil(16) {
            build::<S, N, M, ENTRIES>(s, &x.by_column[at].0[half], &mut tables[0].0);
            let scale = s.load(&scales[half]);
            for (t, (indices, sums)) in indices.iter().zip(&mut *sums).enumerate() {
                let steps = block_steps(s, &m.scales(), first + t, block);
                add_tile::<S, UNITS, ENTRIES>(s, &tables[0], indices, steps, scale, half, sums);
            }
        }
    }
    for (t, sums) in sums.iter_mut().enumerate() {
        finish(s, m, first + t, sums);
        copy_tile(sums, t, y);
    }
}

/// The indices of the rows of a tile in a block of columns.
#[inline(always)]
fn index<S: Bytes, const N: usize, const M: usize, const BITS: usize, const UNITS: usize>(
    s: S,
    m: &NmView<'_>,
    tile: usize,
    block: usize,
    to: &mut UnitIndices<UNITS>,
) {
    let quads = m.groups().div_ceil(QUAD);
    let codes = m.tile_codes(tile).as_chunks::<64>().0;
    let (whole, last) = codes::chunks::<BITS>(codes, quads);
    let parts = BLOCK / (PART * QUAD * M);
    let vectors = to.as_flattened_mut().as_chunks_mut::<64>().0;
    for (p, to) in vectors.chunks_exact_mut(UNITS / QUAD / parts).enumerate() {
        let part = block * parts + p;
        if part * PART >= quads {
            // Activations past the last column are zero.
            to.fill([0; 64]);
            continue;
        }
        let chunk = whole.get(part / 2).unwrap_or(&last);
        let planes = CodePlanes { chunk, half: part % 2, arranged: false };
        let quads = match (N, M) {
            (2, 8) => codes::codes_of_8(s, planes),
            _ => codes::indices::<S, N, M, BITS>(s, planes),
        };
        if (N, M) == (1, 4) {
            // Two groups of four columns, from two quads, make an index.
            for (k, to) in to.iter_mut().enumerate() {
                let upper = s.and_b(s.shl_b::<3>(quads[2 * k + 1]), s.splat_b(0x38));
                s.store_b(s.or_b(quads[2 * k], upper), to);
            }
        } else {
            for (quad, to) in quads.into_iter().zip(to) {
                s.store_b(quad, to);
            }
        }
    }
}

/// Builds the tables of all units for the indices of [`index`], from activations [column][token].
#[inline(always)]
fn build<S: Bytes, const N: usize, const M: usize, const ENTRIES: usize>(
    s: S,
    x: &[TokenSums; BLOCK],
    tables: &mut [TokenSums],
) {
    let groups = x.as_chunks::<M>().0;
    let tables = tables.as_chunks_mut::<ENTRIES>().0;
    match (N, M) {
        (1, 8) => {
            for (group, to) in groups.iter().zip(tables) {
                signed::<S, M>(s, group, to);
            }
        }
        (1, 4) => {
            // Of every 4 quads, groups of quads 0 and 1, and of 2 and 3.
            let pairs = groups.chunks_exact(2 * QUAD).flat_map(
                #[inline(always)]
                |quads| quads[..QUAD].iter().zip(&quads[QUAD..]),
            );
            for ((lower, upper), to) in pairs.zip(tables) {
                let (mut low, mut high) = ([[0; 16]; 8], [[0; 16]; 8]);
                signed::<S, M>(s, lower, &mut low);
                signed::<S, M>(s, upper, &mut high);
                for (to, high) in to.as_chunks_mut::<8>().0.iter_mut().zip(&high) {
                    let high = s.load_h(high);
                    for (to, low) in to.iter_mut().zip(&low) {
                        s.store_h(s.add_h(s.load_h(low), high), to);
                    }
                }
            }
        }
        _ => {
            for (group, to) in groups.iter().zip(tables) {
                pairs::<S, M>(s, group, to);
            }
        }
    }
}

/// Entries by position, and by the sign in the bit above.
#[inline(always)]
fn signed<S: Bytes, const M: usize>(s: S, x: &[TokenSums; M], to: &mut [TokenSums]) {
    let (plus, minus) = to.split_at_mut(M);
    for ((x, plus), minus) in x.iter().zip(plus).zip(minus) {
        *plus = *x;
        s.store_h(s.sub_h(s.load_h(&[0; 16]), s.load_h(x)), minus);
    }
}

/// Entries by i + M·j, and by the sign s in the bit above: s·x_i, plus s·x_j if i < j, minus s·x_j if i > j
/// (spec/encodings.md, section 5).
#[inline(always)]
fn pairs<S: Bytes, const M: usize>(s: S, x: &[TokenSums; M], to: &mut [TokenSums]) {
    let zero = s.load_h(&[0; 16]);
    let (plus, minus) = to.split_at_mut(M * M);
    let lines = plus.as_chunks_mut::<M>().0.iter_mut().zip(minus.as_chunks_mut::<M>().0);
    for (j, (plus, minus)) in lines.enumerate() {
        let second = s.load_h(&x[j]);
        for (i, (plus, minus)) in plus.iter_mut().zip(minus).enumerate() {
            let first = s.load_h(&x[i]);
            let sum = match i.cmp(&j) {
                std::cmp::Ordering::Less => s.add_h(first, second),
                std::cmp::Ordering::Equal => first,
                std::cmp::Ordering::Greater => s.sub_h(first, second),
            };
            s.store_h(sum, plus);
            s.store_h(s.sub_h(zero, sum), minus);
        }
    }
}

/// Adds the block's sums of 16 rows for 16 tokens, times their scales, to `y`, [half][row].
#[inline(always)]
fn add_tile<S: Bytes, const UNITS: usize, const ENTRIES: usize>(
    s: S,
    tables: &SumTables,
    indices: &UnitIndices<UNITS>,
    steps: Option<(S::F, f32)>,
    scale: S::F,
    half: usize,
    y: &mut [TileLanes; TOKENS],
) {
    let mut of_rows = [1.0; TILE];
    let mut scale = scale;
    if let Some((steps, step)) = steps {
        s.store(steps, &mut of_rows);
        scale = s.mul(scale, s.splat(step));
    }
    for r in 0..TILE {
        let mut sums = s.load_h(&tables.0[usize::from(indices[0][r])]);
        for unit in 1..UNITS {
            let entry = &tables.0[unit * ENTRIES + usize::from(indices[unit][r])];
            sums = s.add_h(sums, s.load_h(entry));
        }
        let scale = if steps.is_some() { s.mul(s.splat(of_rows[r]), scale) } else { scale };
        let TileLanes(y) = &mut y[half * TILE + r];
        s.store(s.mul_add(scale, s.to_f32(s.widen_h(sums)), s.load(y)), y);
    }
}

/// Multiplies by the scales of rows, and from [half][row][token] to [token][row].
#[inline(always)]
fn finish<S: Bytes>(s: S, m: &NmView<'_>, tile: usize, y: &mut [TileLanes; TOKENS]) {
    let mut scales = [0.0; TILE];
    s.store(row_scales(s, &m.scales(), tile), &mut scales);
    for half in y.as_chunks_mut::<TILE>().0 {
        for (TileLanes(y), scale) in half.iter_mut().zip(scales) {
            s.store(s.mul(s.load(y), s.splat(scale)), y);
        }
        transpose(half);
    }
}

/// From [row][token] to [token][row].
#[inline(always)]
fn transpose(lanes: &mut [TileLanes; TILE]) {
    let by_row = *lanes;
    for (t, TileLanes(to)) in lanes.iter_mut().enumerate() {
        for (to, row) in to.iter_mut().zip(&by_row) {
            *to = row.0[t];
        }
    }
}

const _: () = assert!(TOKENS == 2 * 16, "two halves");
