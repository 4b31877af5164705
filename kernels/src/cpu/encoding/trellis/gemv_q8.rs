//! Matrix-vector products of trellis codes with q8 activations: levels are multiplied as unsigned bytes, and the level of
//! zero is subtracted as a multiple of the sum of the activations.

use stb_format::encoding::trellis::ZERO;
use stb_format::encoding::{TILE, TrellisView};
use stb_format::trellis_rates;

use super::super::col_factors::multiply_factors;
use super::super::tile_scales::{block_steps, put_tile, row_scales, times};
use super::levels::{BLOCK_WORDS, Levels, units};
use crate::cpu::arch::bytes::{Aligned, Bytes, Task};
use crate::cpu::ops::q8::{BLOCK, TokenQ8};

/// Quantizes `values` times the column factors and adds up the offsets of blocks.
pub(super) struct TrellisPrepareQ8<'a> {
    pub matrix: &'a TrellisView<'a>,
    pub values: &'a [f32],
    pub scaled: &'a mut Vec<f32>,
    pub q8: &'a mut TokenQ8,
}

impl Task for TrellisPrepareQ8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, values, scaled, q8 } = self;
        if matrix.col_factors.is_empty() {
            q8.quantize(s, values);
        } else {
            scaled.clear();
            scaled.extend_from_slice(values);
            multiply_factors(s, matrix.col_factors, scaled);
            q8.quantize(s, scaled);
        }
        q8.offsets.clear();
        let blocks = q8.codes.chunks_exact(BLOCK);
        q8.offsets.extend(blocks.map(
            #[inline(always)]
            |codes| Aligned([block_offset(codes); 16]),
        ));
    }
}

/// What the levels of a block of activations are too large by.
#[inline(always)]
pub(super) fn block_offset(codes: &[i8]) -> i32 {
    let mut sum = 0;
    for code in codes {
        sum += i32::from(*code);
    }
    -i32::from(ZERO) * sum
}

/// See [`PackedMatrix::gemv_batch`](crate::PackedMatrix::gemv_batch): `rows` results for each token; `y` may
/// have room for fewer than `K` tokens.
pub(super) struct TrellisGemvQ8<'a, const K: usize> {
    pub matrix: &'a TrellisView<'a>,
    pub x: [&'a TokenQ8; K],
    pub rows: usize,
    pub first: usize,
    pub y: &'a mut [f32],
}

impl<const K: usize> Task for TrellisGemvQ8<'_, K> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix: m, x, rows, first, y } = self;
        trellis_rates!(m.spec, |BITS, WEIGHTS| {
            let gemv =
                TrellisTokens { m, levels: Levels::<S, WEIGHTS>::new(s, m.tables, false), x };
            let mut done = 0;
            while done < rows {
                let tile = (first + done) / TILE;
                // Tiles that are computed together share the activations; their sums must fit in registers.
                if (S::WIDE || K == 1) && rows - done > TILE {
                    let totals = gemv.tiles::<BITS, 2>(s, tile);
                    put_tile(
                        s,
                        row_scales(s, &m.scales(), tile),
                        totals.map(|t| t[0]),
                        done,
                        rows,
                        y,
                    );
                    put_tile(
                        s,
                        row_scales(s, &m.scales(), tile + 1),
                        totals.map(|t| t[1]),
                        done + TILE,
                        rows,
                        y,
                    );
                    done += 2 * TILE;
                } else {
                    let totals = gemv.tiles::<BITS, 1>(s, tile);
                    put_tile(
                        s,
                        row_scales(s, &m.scales(), tile),
                        totals.map(|t| t[0]),
                        done,
                        rows,
                        y,
                    );
                    done += TILE;
                }
            }
        });
    }
}

/// The products of a matrix with `K` tokens.
struct TrellisTokens<'a, S: Bytes, const WEIGHTS: usize, const K: usize> {
    m: &'a TrellisView<'a>,
    levels: Levels<S, WEIGHTS>,
    x: [&'a TokenQ8; K],
}

impl<S: Bytes, const WEIGHTS: usize, const K: usize> TrellisTokens<'_, S, WEIGHTS, K> {
    /// Sums of `T` tiles from `tile` for each token, without the row scales.
    #[inline(always)]
    fn tiles<const BITS: usize, const T: usize>(&self, s: S, tile: usize) -> [[S::F; T]; K] {
        let scales = self.m.scales();
        let mut streams: [&[[[u8; 8]; BITS]]; T] = [&[]; T];
        for t in 0..T {
            streams[t] = units(self.m, tile + t);
        }
        let mut totals = [[s.splat(0.0); T]; K];
        for block in 0..self.x[0].scales.len() {
            let mut acc = [[s.splat_i(0); T]; K];
            for k in 0..K {
                acc[k] = [s.load_i(&self.x[k].offsets[block]); T];
            }
            let from = block * (BLOCK_WORDS / WEIGHTS);
            let units = streams[0].len().min(from + BLOCK_WORDS / WEIGHTS);
            let words: [&[[i8; 4]]; K] = self.x.map(
                #[inline(always)]
                |x| &x.codes.as_chunks().0[block * BLOCK_WORDS..][..BLOCK_WORDS],
            );
            for u in from..units {
                for t in 0..T {
                    let levels = self.levels.of(s, &streams[t][u]);
                    for v in 0..WEIGHTS {
                        for k in 0..K {
                            let word = words[k][(u - from) * WEIGHTS + v];
                            let word = s.splat_word(word.map(i8::cast_unsigned));
                            acc[k][t] = s.dot4(acc[k][t], levels[v], word);
                        }
                    }
                }
            }
            for t in 0..T {
                let steps = block_steps(s, &scales, tile + t, block);
                for k in 0..K {
                    let scale = times(s, steps, self.x[k].scales[block]);
                    totals[k][t] = s.mul_add(scale, s.to_f32(acc[k][t]), totals[k][t]);
                }
            }
        }
        totals
    }
}
