//! Exact weights of the STBLLM structure, in vectors.

use std::ops::Range;

use stb_format::encoding::StbllmView;

use super::super::row_major::{RowMajor, STEP};
use crate::cpu::arch::simd::Simd;

impl RowMajor for StbllmView<'_> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn each<S: Simd>(
        &self,
        s: S,
        row: usize,
        cols: Range<usize>,
        mut sink: impl FnMut(usize, [S::F; 4]),
    ) {
        let mut table = s.splat(0.0);
        let mut block = usize::MAX;
        for unit in cols.start / STEP..cols.end.div_ceil(STEP) {
            let (low, high) = self.state_words(row, unit);
            let negative = s.deposit(self.sign_word(row, unit), low | high);
            let salient = self.salient_word(unit);
            let mut w = [s.splat(0.0); 4];
            for (k, w) in w.iter_mut().enumerate() {
                let col = unit * STEP + 16 * k;
                // Blocks are multiples of 32 columns, so a vector never straddles two.
                if col / self.spec.block() != block {
                    block = col / self.spec.block();
                    table = weight_table(s, self.block_scales(row, block));
                }
                let at = 16 * k;
                let low = s.select_bits((low >> at) as u16, 1);
                let high = s.select_bits((high >> at) as u16, 2);
                let salient = s.select_bits((salient >> at) as u16, 4);
                let negative = s.select_bits((negative >> at) as u16, 8);
                let index = s.or(s.or(low, high), s.or(salient, negative));
                *w = s.lookup(table, index);
            }
            sink(unit * STEP, w);
        }
    }
}

/// The weight for each state (bits 0 and 1), salient flag (bit 2) and sign (bit 3).
#[inline(always)]
fn weight_table<S: Simd>(s: S, scales: [f32; 5]) -> S::F {
    let [d, i, p, a, b] = scales;
    #[rustfmt::skip]
    let table = [
        0.0,  d,  i,  p, 0.0,  a + b,  a - b, 0.0,
        0.0, -d, -i, -p, 0.0, -a + b, -a - b, 0.0,
    ];
    s.load(&table)
}
