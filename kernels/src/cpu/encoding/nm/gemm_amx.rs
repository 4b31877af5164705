//! Products of N:M codes with many q8 tokens by AMX: expanding codes to bytes takes about 8 instructions for 16 groups.

use stb_format::encoding::NmView;
use stb_format::encoding::nm::QUAD;

use stb_format::nm_rates;

use super::super::expanded_amx::{ExpandedBlock, all_tiles};
use super::super::gemm_task::GemmQ8Task;
use super::codes::{self, CodePlanes, PART};
use crate::cpu::arch::bytes::{Aligned, Bytes, TileTask, TileUnit};
use crate::cpu::arch::simd::Simd;
use crate::cpu::ops::q8::BLOCK;

pub(super) struct AmxGemm<'a, 'y> {
    pub task: GemmQ8Task<'a, 'y, NmView<'a>>,
    /// Scratch for expanded blocks.
    pub expanded: &'a mut Vec<ExpandedBlock>,
}

impl TileTask for AmxGemm<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S, unit: &impl TileUnit) {
        let Self { task, expanded } = self;
        nm_rates!(task.matrix.spec, |N, M, BITS| {
            let (matrix, patterns) = (task.matrix, CodePatterns::<S>::new::<N, M>(s));
            all_tiles(
                s,
                unit,
                task,
                &matrix.scales(),
                expanded,
                #[inline(always)]
                |tile, block, to| patterns.expand::<N, M, BITS>(s, matrix, tile, block, to),
            );
        });
    }
}

/// The bytes that codes expand to, as words of four columns.
struct CodePatterns<S: Simd> {
    /// For the first four columns of a group and for the others, by an index of [`codes::indices`].
    /// 2:8: the word of one weight; the words of both weights are combined by exclusive or.
    tables: [S::F; 2],
    /// 2:4: the same for codes with the negative sign.
    negative: S::F,
}

impl<S: Bytes> CodePatterns<S> {
    #[inline(always)]
    fn new<const N: usize, const M: usize>(s: S) -> Self {
        let change = |negative: bool| u64::from(if negative { -1i8 } else { 1 }.cast_unsigned());
        let (mut low, mut high, mut negative) = ([0u32; 16], [0u32; 16], [0u32; 16]);
        for index in 0..16 {
            if (N, M) == (2, 4) {
                // i + 4j: positive at i; at j positive if i < j, negative if i > j.
                let (i, j) = (index % 4, index / 4);
                let word = |minus: bool| {
                    let at_j = if i == j { 0 } else { change((i > j) != minus) << (8 * j) };
                    (change(minus) << (8 * i) ^ at_j) as u32
                };
                (low[index], negative[index]) = (word(false), word(true));
            } else {
                let bytes = change(index / M % 2 == 1) << (8 * (index % M));
                (low[index], high[index]) = (bytes as u32, (bytes >> 32) as u32);
            }
        }
        let table = |words: &[u32; 16]| {
            let mut floats = [0.0; 16];
            for i in 0..16 {
                floats[i] = f32::from_bits(words[i]);
            }
            s.load(&floats)
        };
        Self { tables: [table(&low), table(&high)], negative: table(&negative) }
    }

    /// Columns `128·block..` of a tile of rows.
    #[inline(always)]
    fn expand<const N: usize, const M: usize, const BITS: usize>(
        &self,
        s: S,
        m: &NmView<'_>,
        tile: usize,
        block: usize,
        to: &mut ExpandedBlock,
    ) {
        let quads = m.groups().div_ceil(QUAD);
        let codes = m.tile_codes(tile).as_chunks::<64>().0;
        let (whole, last) = codes::chunks::<BITS>(codes, quads);
        let words = PART * QUAD * M / 4;
        let parts = BLOCK / 4 / words;
        for (p, to) in to.0.chunks_exact_mut(words).enumerate() {
            let part = block * parts + p;
            if part * PART >= quads {
                // Activations past the last column are zero.
                to.fill([0; 64]);
                continue;
            }
            let chunk = whole.get(part / 2).unwrap_or(&last);
            let planes = CodePlanes { chunk, half: part % 2, arranged: false };
            let (first, second) = if (N, M) == (2, 8) {
                let [first, second] = codes::pairs::<S, 8, BITS>(s, planes);
                (first, second)
            } else {
                let first = codes::indices::<S, N, M, BITS>(s, planes);
                (first, first)
            };
            for (q, to) in to.chunks_exact_mut(QUAD * M / 4).enumerate() {
                // Widening bytes from memory takes fewer operations than widening parts of a vector.
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
                [
                    s.xor(word(low, first), s.and(word(low, second), exists)),
                    s.xor(word(high, first), s.and(word(high, second), exists)),
                ]
            }
            _ => [word(low, first), word(high, first)],
        }
    }
}

// Codes are expanded in whole quads.
const _: () = assert!(BLOCK.is_multiple_of(QUAD * 8));
