//! Random matrices of every encoding.

use stb_format::Encoding;
use stb_format::encoding::{
    CoarseRows, Dense, IntGroup, IntGroupParts, MixedRows, MixedRowsParts, Nm, NmParts, Stbllm,
    StbllmParts, Trellis, TrellisParts, TrellisRate,
};
use stb_format::half::f16;
use stb_random::Rng;

/// Encodings with all kinds of parameters.
pub fn encodings() -> Vec<Encoding> {
    let mut all = vec![
        Encoding::Dense(Dense::F32),
        Encoding::Dense(Dense::F16),
        Encoding::Dense(Dense::Bf16),
    ];
    for bits in [1, 2, 3, 4, 8] {
        for group in [32, 64, 128] {
            all.push(Encoding::IntGroup(IntGroup::new(bits, group).unwrap()));
        }
    }
    for n in 1..=8 {
        for block in [32, 96, 128] {
            all.push(Encoding::Stbllm(Stbllm::new(n, block).unwrap()));
        }
    }
    for (n, m) in [(1, 4), (1, 8), (2, 4), (2, 8)] {
        for (bits, block, cols) in [(0, 0, false), (4, 32, true), (4, 128, false), (8, 160, true)] {
            all.push(Encoding::Nm(Nm::new(n, m, bits, block, cols).unwrap()));
        }
    }
    for rate in TrellisRate::ALL {
        let (step_bits, weights) = (rate.step_bits() as u8, rate.step_weights() as u8);
        for (bits, block, cols) in
            [(0, 0, false), (4, 32, true), (4, 128, false), (4, 128, true), (8, 256, true)]
        {
            let spec = Trellis::new(step_bits, weights, bits, block).unwrap();
            all.push(Encoding::Trellis(spec.with_col_factors(cols)));
        }
    }
    let fine = IntGroup::new(4, 64).unwrap();
    let nm = CoarseRows::Nm(Nm::new(2, 8, 4, 128, false).unwrap());
    let int = CoarseRows::IntGroup(IntGroup::new(2, 32).unwrap());
    let trellis = Trellis::new(3, 2, 4, 128).unwrap();
    let [plain, factors] =
        [false, true].map(|cols| CoarseRows::Trellis(trellis.with_col_factors(cols)));
    for (count, coarse) in [(1, nm), (9, nm), (9, int), (9, plain), (9, factors)] {
        all.push(Encoding::MixedRows(MixedRows::new(count, fine, coarse).unwrap()));
    }
    all
}

/// `count` different rows of `rows`, ascending.
fn listed(rng: &mut Rng, rows: usize, count: usize) -> Vec<u32> {
    let mut left: Vec<u32> = (0..rows as u32).collect();
    while left.len() > count {
        left.remove(rng.below(left.len()));
    }
    left
}

/// Random scales, uniform in −1..1.
fn scales(rng: &mut Rng, n: usize) -> Vec<f16> {
    rng.floats(n).into_iter().map(f16::from_f32).collect()
}

/// A random matrix.
pub fn payload(rng: &mut Rng, encoding: &Encoding, rows: usize, cols: usize) -> Vec<u8> {
    match *encoding {
        Encoding::Dense(kind) => kind.encode(&rng.floats(rows * cols)),
        Encoding::IntGroup(spec) => {
            let step = if spec.is_odd() { 2 } else { 1 };
            let low = i32::from(spec.limits().0);
            let mut code = || (low + step * rng.below(1 << spec.bits()) as i32) as i8;
            let codes = (0..rows * cols).map(|_| code()).collect();
            let scales = scales(rng, rows * cols.div_ceil(spec.group()));
            IntGroupParts { spec, rows, cols, codes, scales }.pack()
        }
        Encoding::Stbllm(spec) => stbllm_payload(rng, spec, rows, cols),
        Encoding::Nm(spec) => {
            let blocks = if spec.block() == 0 { 0 } else { cols.div_ceil(spec.block()) };
            let code = 1 << spec.code_bits();
            let scale = 1 << spec.scale_bits();
            NmParts {
                spec,
                rows,
                cols,
                col_factors: scales(rng, if spec.has_col_factors() { cols } else { 0 }),
                row_scales: scales(rng, rows),
                block_codes: (0..rows * blocks).map(|_| rng.below(scale) as u8).collect(),
                codes: (0..rows * cols.div_ceil(spec.m()))
                    .map(|_| rng.below(code) as u16)
                    .collect(),
            }
            .pack()
        }
        Encoding::Trellis(spec) => {
            let blocks = if spec.block() == 0 { 0 } else { cols.div_ceil(spec.block()) };
            let scale = 1 << spec.scale_bits();
            let streams = rows.div_ceil(16) * cols.div_ceil(spec.unit_cols()) * spec.unit_bytes();
            TrellisParts {
                spec,
                rows,
                cols,
                // The largest entries add up to 127.
                tables: (0..spec.step_weights())
                    .map(|_| {
                        let (mut low, mut mixed) = ([0; 16], [0; 16]);
                        low.fill_with(|| rng.below(83) as u8);
                        mixed.fill_with(|| rng.below(46) as u8);
                        (low[3], mixed[5]) = (82, 45);
                        [low, mixed]
                    })
                    .collect(),
                col_factors: scales(rng, if spec.has_col_factors() { cols } else { 0 }),
                row_scales: scales(rng, rows),
                block_codes: (0..rows * blocks).map(|_| rng.below(scale) as u8).collect(),
                streams: (0..streams).map(|_| rng.bits() as u8).collect(),
            }
            .pack()
        }
        Encoding::MixedRows(spec) => {
            let (listed, fine) = (spec.count() as usize, Encoding::IntGroup(spec.fine()));
            MixedRowsParts {
                spec,
                fine: payload(rng, &fine, listed, cols),
                coarse: payload(rng, &spec.coarse().encoding(), rows, cols),
                listed: self::listed(rng, rows, listed),
            }
            .pack()
        }
        Encoding::Unknown { .. } => unreachable!(),
    }
}

fn stbllm_payload(rng: &mut Rng, spec: Stbllm, rows: usize, cols: usize) -> Vec<u8> {
    let salient: Vec<bool> = (0..cols).map(|_| rng.below(4) == 0).collect();
    let mut states = vec![0u8; rows * cols];
    let mut negative = vec![false; rows * cols];
    for row in 0..rows {
        for first in (0..cols).step_by(8) {
            let width = (cols - first).min(8);
            let mut free: Vec<usize> = (first..first + width).collect();
            for _ in 0..spec.kept(width) {
                let col = free.swap_remove(rng.below(free.len()));
                states[row * cols + col] = 1 + rng.below(if salient[col] { 2 } else { 3 }) as u8;
                negative[row * cols + col] = rng.below(2) == 0;
            }
        }
    }
    let scales = scales(rng, rows * cols.div_ceil(spec.block()) * 5);
    StbllmParts { spec, rows, cols, salient, states, negative, scales }.pack()
}
