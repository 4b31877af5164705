//! Random tensors of every encoding.

use stb_format::encoding::{
    CoarseRows, IntGroup, IntGroupParts, MixedRows, MixedRowsParts, Nm, NmParts, Stbllm,
    StbllmParts, Trellis, TrellisParts,
};
use stb_format::half::f16;

use stb_random::Rng;

fn scales(rng: &mut Rng, n: usize) -> Vec<f16> {
    (0..n).map(|_| f16::from_f32(rng.float())).collect()
}

pub(crate) fn int_group(rng: &mut Rng, spec: IntGroup, rows: usize, cols: usize) -> IntGroupParts {
    let step = if spec.is_odd() { 2 } else { 1 };
    let low = i32::from(spec.limits().0);
    let codes = (0..rows * cols).map(|_| (low + step * rng.below(1 << spec.bits()) as i32) as i8);
    let codes = codes.collect();
    let scales = scales(rng, rows * cols.div_ceil(spec.group()));
    IntGroupParts { spec, rows, cols, codes, scales }
}

pub(crate) fn stbllm(rng: &mut Rng, spec: Stbllm, rows: usize, cols: usize) -> StbllmParts {
    let salient: Vec<bool> = (0..cols).map(|_| rng.below(5) == 0).collect();
    let mut states = vec![0u8; rows * cols];
    let mut negative = vec![false; rows * cols];
    for row in 0..rows {
        for first in (0..cols).step_by(8) {
            let width = (cols - first).min(8);
            let mut free: Vec<usize> = (first..first + width).collect();
            for _ in 0..spec.kept(width) {
                let col = free.swap_remove(rng.below(free.len()));
                let states_allowed = if salient[col] { 2 } else { 3 };
                states[row * cols + col] = 1 + rng.below(states_allowed) as u8;
                negative[row * cols + col] = rng.below(2) == 0;
            }
        }
    }
    let scales = scales(rng, rows * cols.div_ceil(spec.block()) * 5);
    StbllmParts { spec, rows, cols, salient, states, negative, scales }
}

pub(crate) fn nm(rng: &mut Rng, spec: Nm, rows: usize, cols: usize) -> NmParts {
    let blocks = if spec.block() == 0 { 0 } else { cols.div_ceil(spec.block()) };
    let scale_codes = 1usize << spec.scale_bits();
    let codes = 1usize << spec.code_bits();
    NmParts {
        spec,
        rows,
        cols,
        col_factors: scales(rng, if spec.has_col_factors() { cols } else { 0 }),
        row_scales: scales(rng, rows),
        block_codes: (0..rows * blocks).map(|_| rng.below(scale_codes) as u8).collect(),
        codes: (0..rows * cols.div_ceil(spec.m())).map(|_| rng.below(codes) as u16).collect(),
    }
}

pub(crate) fn trellis(rng: &mut Rng, spec: Trellis, rows: usize, cols: usize) -> TrellisParts {
    let blocks = if spec.block() == 0 { 0 } else { cols.div_ceil(spec.block()) };
    let scale_codes = 1usize << spec.scale_bits();
    let streams = rows.div_ceil(16) * cols.div_ceil(spec.unit_cols()) * spec.unit_bytes();
    let mut table = |end: usize| {
        let mut table = [0; 16];
        table.fill_with(|| rng.below(end) as u8);
        table
    };
    // The largest entries of a pair add up to at most 127.
    let tables = (0..spec.step_weights()).map(|_| [table(75), table(54)]).collect();
    TrellisParts {
        spec,
        rows,
        cols,
        tables,
        col_factors: scales(rng, if spec.has_col_factors() { cols } else { 0 }),
        row_scales: scales(rng, rows),
        block_codes: (0..rows * blocks).map(|_| rng.below(scale_codes) as u8).collect(),
        streams: (0..streams).map(|_| rng.below(256) as u8).collect(),
    }
}

/// The listed rows are spread evenly; the first one is in the middle of the first stretch.
pub(crate) fn mixed_rows(
    rng: &mut Rng,
    spec: MixedRows,
    rows: usize,
    cols: usize,
) -> MixedRowsParts {
    let count = spec.count() as usize;
    let listed = (0..count).map(|i| ((2 * i + 1) * rows / (2 * count)) as u32).collect();
    let fine = int_group(rng, spec.fine(), count, cols).pack();
    let coarse = match spec.coarse() {
        CoarseRows::IntGroup(spec) => int_group(rng, spec, rows, cols).pack(),
        CoarseRows::Nm(spec) => nm(rng, spec, rows, cols).pack(),
        CoarseRows::Trellis(spec) => trellis(rng, spec, rows, cols).pack(),
    };
    MixedRowsParts { spec, listed, fine, coarse }
}
