//! Tuning of a decoder layer as a whole, once its weights have been quantised: what is continuous in it,
//! the scales of joint codes and the weights of norms, moves by gradients until the layer's
//! output comes closer to what the dense model has there. Codes stay.

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::{MatrixView, NmParts};
use stb_runtime::{Layer, Model, Result, Weight};

use crate::backward::{LayerWeights, Matrix, Pass};
use crate::hessian::interrupted;
use crate::quantise::nm::round_scales;
use crate::resume::States;

/// Sequences of a step.
const BATCH: usize = 8;
/// Adam's decay of first and second moments: few steps, so short memories.
const DECAY: [f64; 2] = [0.9, 0.95];

/// How much is tuned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Passes over the calibration sequences.
    pub epochs: usize,
    /// The largest step of a parameter, relative to it; falls to a tenth over the steps.
    pub rate: f64,
}

/// Mean squared error of a layer's output relative to its mean square, before and after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// With the weights as they were quantised.
    pub before: f64,
    /// With what is kept: never more than before.
    pub after: f64,
}

/// A quantised linear layer whose scales move.
struct Tunable {
    part: usize,
    parts: NmParts,
    blocks: usize,
    /// Columns per scale.
    span: usize,
    /// As quantised, [rows, blocks].
    start: Vec<f32>,
    moving: Logarithms,
}

/// Parameters by their logarithm relative to where they started, with Adam's moments.
struct Logarithms {
    now: Vec<f32>,
    moments: Vec<[f32; 2]>,
}

impl Logarithms {
    fn new(n: usize) -> Self {
        Self { now: vec![0.0; n], moments: vec![[0.0; 2]; n] }
    }

    /// One step of Adam, number `step` from 1; `gradient` is with respect to the logarithms.
    fn step(&mut self, gradient: &[f32], step: i32, rate: f64) {
        let [first, second] = DECAY.map(|d| (1.0 - d.powi(step)) as f32);
        let [keep_first, keep_second] = DECAY.map(|d| d as f32);
        let rate = rate as f32;
        for ((now, [m, v]), g) in self.now.iter_mut().zip(&mut self.moments).zip(gradient) {
            *m = keep_first * *m + (1.0 - keep_first) * g;
            *v = keep_second * *v + (1.0 - keep_second) * g * g;
            let (m, v) = (*m / first, *v / second);
            if v > 0.0 {
                *now -= rate * m / v.sqrt();
            }
        }
    }

    fn values(&self, start: &[f32]) -> Vec<f32> {
        start.iter().zip(&self.now).map(|(s, l)| s * l.exp()).collect()
    }
}

impl Tunable {
    /// `None` for a weight without scales that could move.
    fn new(part: usize, weight: &Weight) -> Option<Self> {
        let MatrixView::Nm(view) = weight.view() else { return None };
        let spec = view.spec;
        if spec.has_col_factors() {
            return None;
        }
        let groups = view.groups();
        let codes: Vec<u16> = (0..view.rows)
            .flat_map(|r| (0..groups).map(move |g| (r, g)))
            .map(|(r, g)| view.code(r, g))
            .collect();
        let blocks = view.blocks().max(1);
        let row_scale = |r: usize| half(view.row_scales[r]);
        let start: Vec<f32> = (0..view.rows)
            .flat_map(|r| (0..blocks).map(move |b| (r, b)))
            .map(|(r, b)| match view.blocks() {
                0 => row_scale(r),
                _ => row_scale(r) * view.multiplier(view.block_code(r, b)),
            })
            .collect();
        let span = if spec.block() == 0 { view.cols } else { spec.block() };
        let moving = Logarithms::new(start.len());
        let parts = NmParts {
            spec,
            rows: view.rows,
            cols: view.cols,
            col_factors: Vec::new(),
            row_scales: Vec::new(),
            block_codes: Vec::new(),
            codes,
        };
        Some(Self { part, parts, blocks, span, start, moving })
    }

    /// Rounds the scales as they are now to what can be stored.
    fn store(&mut self) -> Vec<f32> {
        let mut scales = self.moving.values(&self.start);
        let bits = self.parts.spec.scale_bits();
        let mut codes = vec![0; scales.len()];
        self.parts.row_scales = scales
            .chunks_exact_mut(self.blocks)
            .zip(codes.chunks_exact_mut(self.blocks))
            .map(|(scales, codes)| round_scales(scales, codes, bits))
            .collect();
        self.parts.block_codes = if bits == 0 { Vec::new() } else { codes };
        scales
    }

    /// Calls `f` with the block and the sign of each kept weight of a row.
    fn kept(&self, row: usize, mut f: impl FnMut(usize, usize, f32)) {
        let spec = self.parts.spec;
        let groups = self.parts.cols.div_ceil(spec.m());
        for (g, code) in self.parts.codes[row * groups..(row + 1) * groups].iter().enumerate() {
            for (position, negative) in spec.pattern(*code).into_iter().flatten() {
                let column = g * spec.m() + position;
                if column < self.parts.cols {
                    f(column / self.span, column, if negative { -1.0 } else { 1.0 });
                }
            }
        }
    }

    fn weights(&mut self, out: &mut Matrix) {
        let scales = self.store();
        let (this, cols, blocks) = (&*self, self.parts.cols, self.blocks);
        out.values.par_chunks_exact_mut(cols).enumerate().for_each(|(r, row)| {
            row.fill(0.0);
            this.kept(r, |block, column, sign| row[column] = sign * scales[r * blocks + block]);
        });
    }

    /// From the gradient of the weights, [rows, cols], to that of the logarithms of the scales.
    fn gradient(&self, weights: &Matrix) -> Vec<f32> {
        let scales = self.moving.values(&self.start);
        let mut out = vec![0.0; scales.len()];
        out.par_chunks_exact_mut(self.blocks).enumerate().for_each(|(r, out)| {
            let row = &weights.values[r * self.parts.cols..(r + 1) * self.parts.cols];
            self.kept(r, |block, column, sign| out[block] += sign * row[column]);
            let scales = &scales[r * self.blocks..(r + 1) * self.blocks];
            out.iter_mut().zip(scales).for_each(|(o, s)| *o *= s);
        });
        out
    }
}

fn half(bytes: [u8; 2]) -> f32 {
    stb_format::half::f16::from_le_bytes(bytes).to_f32()
}

/// Tunes `layer`, quantised, so that from `inputs` it comes close to `targets`, sequences of one length
/// each. What can be stored of it is put into `layer`, if it is better on these sequences; norms are
/// not rounded yet.
///
/// # Errors
/// None in practice: what has been packed can be opened.
pub fn tune(
    model: &Model,
    layer: &mut Layer,
    inputs: &States,
    targets: &States,
    options: Options,
) -> Result<Outcome> {
    let hidden = model.norm.len();
    let length = inputs.first().map_or(1, |states| states.len() / hidden).max(1);
    let pass = Pass { model, length };
    let mut weights = LayerWeights::new(layer);
    let norms = weights.norms.clone();
    let batches =
        || inputs.chunks(BATCH).zip(targets.chunks(BATCH)).map(|(x, y)| (x.concat(), y.concat()));
    let energy: f64 = targets.iter().flatten().map(|v| f64::from(*v).powi(2)).sum();
    let error = |weights: &LayerWeights| -> f64 {
        batches().map(|(x, y)| pass.error(weights, x, &y)).sum::<f64>()
            / energy.max(f64::MIN_POSITIVE)
    };
    let before = error(&weights);

    let mut tunable: Vec<Tunable> = (0..Layer::PARTS.len())
        .filter_map(|part| Tunable::new(part, layer.matrices()[part]))
        .collect();
    let mut moving = norms.each_ref().map(|norm| Logarithms::new(norm.len()));
    let steps = options.epochs * inputs.len().div_ceil(BATCH);
    let mut step = 0;
    for _ in 0..options.epochs {
        for (x, y) in batches() {
            if interrupted() {
                return Ok(Outcome { before, after: before });
            }
            let mut gradient = LayerWeights {
                norms: norms.each_ref().map(|n| vec![0.0; n.len()]),
                ..Default::default()
            };
            for t in &tunable {
                gradient.linear[t.part] = Matrix::new(t.parts.rows, t.parts.cols);
            }
            pass.gradient(&weights, x, &y, &mut gradient);
            let done = f64::from(step) / steps as f64;
            let rate = options.rate * (0.55 + 0.45 * (std::f64::consts::PI * done).cos());
            step += 1;
            for t in &mut tunable {
                let slope = t.gradient(&gradient.linear[t.part]);
                t.moving.step(&slope, step, rate);
                t.weights(&mut weights.linear[t.part]);
            }
            for (i, moving) in moving.iter_mut().enumerate() {
                let slope: Vec<f32> =
                    gradient.norms[i].iter().zip(&weights.norms[i]).map(|(g, w)| g * w).collect();
                moving.step(&slope, step, rate);
                weights.norms[i] = moving.values(&norms[i]);
            }
        }
    }
    let after = error(&weights);
    if after.is_nan() || after >= before {
        return Ok(Outcome { before, after: before });
    }
    for t in tunable {
        let (rows, cols) = (t.parts.rows as u64, t.parts.cols as u64);
        let weight = Weight::from_payload(&t.parts.pack(), Encoding::Nm(t.parts.spec), rows, cols)?;
        if let Some(old) = layer.matrix_mut(Layer::PARTS[t.part]) {
            *old = weight;
        }
    }
    let [attention, mlp] = weights.norms;
    (layer.attention_norm, layer.mlp_norm) = (attention, mlp);
    Ok(Outcome { before, after })
}
