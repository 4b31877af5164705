//! Parameters that gradients move: the scales of quantized linear layers and the weights of norms.

use rayon::prelude::*;
use stb_format::arch::{Linear, LinearMap, NormSite};
use stb_format::encoding::{IntGroupParts, MatrixView, NmParts};
use stb_format::half::f16;
use stb_runtime::{Layer, Weight};

use crate::backward::{DenseLayer, Matrix};
use crate::quantize::nm::round_scales;

/// Adam's decay of first and second moments: few steps, so short memories.
const DECAY: [f64; 2] = [0.9, 0.95];

/// Parameters by their logarithm relative to where they started, with Adam's moments.
pub(super) struct Logarithms {
    start: Vec<f32>,
    now: Vec<f32>,
    moments: Vec<[f32; 2]>,
    /// Steps so far.
    steps: i32,
}

impl Logarithms {
    pub(super) fn new(start: Vec<f32>) -> Self {
        let n = start.len();
        Self { start, now: vec![0.0; n], moments: vec![[0.0; 2]; n], steps: 0 }
    }

    /// One step of Adam; `gradient` is with respect to the parameters, whose values are `values`. What has
    /// smaller gradients than the others moves less than the rate: those of rare tokens are mostly noise.
    pub(super) fn step(&mut self, gradient: &[f32], values: &[f32], rate: f64) {
        self.steps += 1;
        let [first, second] = DECAY.map(|d| (1.0 - d.powi(self.steps)) as f32);
        let [keep_first, keep_second] = DECAY.map(|d| d as f32);
        let mut sum = 0.0;
        for ([m, v], (g, value)) in self.moments.iter_mut().zip(gradient.iter().zip(values)) {
            let g = g * value;
            *m = keep_first * *m + (1.0 - keep_first) * g;
            *v = keep_second * *v + (1.0 - keep_second) * g * g;
            sum += f64::from(*v);
        }
        let mean = (sum / self.moments.len().max(1) as f64) as f32 / second;
        if mean > 0.0 {
            for (now, [m, v]) in self.now.iter_mut().zip(&self.moments) {
                *now -= rate as f32 * (m / first) / (v / second + mean).sqrt();
            }
        }
    }

    pub(super) fn values(&self) -> Vec<f32> {
        self.start.iter().zip(&self.now).map(|(s, l)| s * l.exp()).collect()
    }
}

/// What is stored, without the scales.
enum Codes {
    Nm(NmParts),
    Int(IntGroupParts),
}

/// A quantized linear layer whose scales move.
pub(super) struct MovingScales {
    codes: Codes,
    rows: usize,
    cols: usize,
    /// Scales of a row.
    blocks: usize,
    /// Columns per scale.
    span: usize,
    /// [rows, blocks].
    moving: Logarithms,
}

impl MovingScales {
    /// `None` for a weight without scales that could move.
    pub(super) fn new(weight: &Weight) -> Option<Self> {
        let (codes, span, scales) = match weight.view() {
            MatrixView::Nm(view) if !view.spec.has_col_factors() => {
                let blocks = view.blocks();
                let row_scale = |r: usize| f16::from_le_bytes(view.row_scales[r]).to_f32();
                let scales = (0..view.rows)
                    .flat_map(|r| (0..blocks.max(1)).map(move |b| (r, b)))
                    .map(|(r, b)| match blocks {
                        0 => row_scale(r),
                        _ => row_scale(r) * view.multiplier(view.block_code(r, b)),
                    })
                    .collect();
                let span = if view.spec.block() == 0 { view.cols } else { view.spec.block() };
                (Codes::Nm(view.unpack()), span, scales)
            }
            MatrixView::IntGroup(view) => {
                let parts = view.unpack();
                let scales = parts.scales.iter().map(|s| s.to_f32()).collect();
                (Codes::Int(parts), view.spec.group(), scales)
            }
            _ => return None,
        };
        let (rows, cols) = (weight.rows(), weight.cols());
        let moving = Logarithms::new(scales);
        Some(Self { codes, rows, cols, blocks: cols.div_ceil(span), span, moving })
    }

    /// Rounds the scales as they are now to what can be stored; returns them, [rows, blocks].
    fn store(&mut self) -> Vec<f32> {
        let mut scales = self.moving.values();
        match &mut self.codes {
            Codes::Nm(parts) => {
                let bits = parts.spec.scale_bits();
                let mut codes = vec![0; scales.len()];
                parts.row_scales = scales
                    .chunks_exact_mut(self.blocks)
                    .zip(codes.chunks_exact_mut(self.blocks))
                    .map(|(scales, codes)| round_scales(scales, codes, bits))
                    .collect();
                parts.block_codes = if bits == 0 { Vec::new() } else { codes };
            }
            Codes::Int(parts) => {
                let limit = f16::MAX.to_f32();
                parts.scales =
                    scales.iter().map(|s| f16::from_f32(s.clamp(-limit, limit))).collect();
                scales.iter_mut().zip(&parts.scales).for_each(|(s, h)| *s = h.to_f32());
            }
        }
        scales
    }

    /// Calls `f` with block, column and what is multiplied by the scale, for all weights of a row that may
    /// be other than zero.
    fn units(&self, row: usize, mut f: impl FnMut(usize, usize, f32)) {
        match &self.codes {
            Codes::Nm(parts) => {
                let spec = parts.spec;
                let groups = self.cols.div_ceil(spec.m());
                for (g, code) in parts.codes[row * groups..(row + 1) * groups].iter().enumerate() {
                    for (position, negative) in spec.pattern(*code).into_iter().flatten() {
                        let column = g * spec.m() + position;
                        if column < self.cols {
                            f(column / self.span, column, if negative { -1.0 } else { 1.0 });
                        }
                    }
                }
            }
            Codes::Int(parts) => {
                let codes = &parts.codes[row * self.cols..(row + 1) * self.cols];
                for (block, codes) in codes.chunks(self.span).enumerate() {
                    for (i, code) in codes.iter().enumerate() {
                        f(block, block * self.span + i, f32::from(*code));
                    }
                }
            }
        }
    }

    /// The weights as they would be stored now, [rows, cols].
    pub(super) fn weights(&mut self, out: &mut Matrix) {
        let scales = self.store();
        let (this, blocks) = (&*self, self.blocks);
        out.values.par_chunks_exact_mut(self.cols).enumerate().for_each(|(r, row)| {
            row.fill(0.0);
            let scales = &scales[r * blocks..(r + 1) * blocks];
            this.units(r, |block, column, unit| row[column] = unit * scales[block]);
        });
    }

    /// A matrix of its shape.
    pub(super) fn zeros(&self) -> Matrix {
        Matrix::new(self.rows, self.cols)
    }

    /// One step of Adam along the gradient of the weights, [rows, cols].
    pub(super) fn step(&mut self, weights: &Matrix, rate: f64) {
        let mut gradient = vec![0.0; self.rows * self.blocks];
        gradient.par_chunks_exact_mut(self.blocks).enumerate().for_each(|(r, out)| {
            let row = &weights.values[r * self.cols..(r + 1) * self.cols];
            self.units(r, |block, column, unit| out[block] += unit * row[column]);
        });
        let values = self.moving.values();
        self.moving.step(&gradient, &values, rate);
    }

    /// The stored bytes, with the scales as they are now.
    pub(super) fn pack(&mut self) -> Vec<u8> {
        self.store();
        match &self.codes {
            Codes::Nm(parts) => parts.pack(),
            Codes::Int(parts) => parts.pack(),
        }
    }
}

/// A decoder layer whose scales and norms move.
pub(super) struct MovingLayer {
    /// The linear layers whose scales can move.
    linears: LinearMap<MovingScales>,
    norms: Vec<(NormSite, Logarithms)>,
}

impl MovingLayer {
    pub(super) fn new(layer: &Layer) -> Self {
        let linears = layer.linears().iter();
        let norms = layer.norms();
        Self {
            linears: linears.filter_map(|(l, w)| Some((l, MovingScales::new(w)?))).collect(),
            norms: norms.map(|(site, norm)| (site, Logarithms::new(norm.clone()))).collect(),
        }
    }

    /// The weights of `layer` as they would be stored now.
    pub(super) fn weights(&mut self, layer: &Layer) -> DenseLayer {
        let mut weights = layer.map(
            |linear, weight| match self.linears.get(linear) {
                Some(moving) => moving.zeros(),
                None => Matrix::decoded(weight),
            },
            |_, _| Vec::new(),
        );
        self.write(&mut weights);
        weights
    }

    /// Writes what moves to `weights`, as it would be stored now.
    pub(super) fn write(&mut self, weights: &mut DenseLayer) {
        for (linear, moving) in self.linears.iter_mut() {
            moving.weights(weights.linear_mut(linear));
        }
        for (site, moving) in &self.norms {
            *weights.norm_mut(*site) = moving.values();
        }
    }

    /// Zeros for the gradients of what moves.
    pub(super) fn zeros(&self, weights: &DenseLayer) -> DenseLayer {
        weights.map(
            |linear, _| self.linears.get(linear).map_or_else(Matrix::default, MovingScales::zeros),
            |_, norm| vec![0.0; norm.len()],
        )
    }

    /// One step of Adam along `gradient` from `weights`.
    pub(super) fn step(&mut self, gradient: &DenseLayer, weights: &DenseLayer, rate: f64) {
        for (linear, moving) in self.linears.iter_mut() {
            moving.step(gradient.linear(linear), rate);
        }
        for (site, moving) in &mut self.norms {
            moving.step(gradient.norm(*site), weights.norm(*site), rate);
        }
    }

    /// The stored bytes of a linear layer, if its scales move.
    pub(super) fn pack(&mut self, linear: Linear) -> Option<Vec<u8>> {
        self.linears.get_mut(linear).map(MovingScales::pack)
    }

    /// The weight of a norm as it is now.
    pub(super) fn norm(&self, site: NormSite) -> Option<Vec<f32>> {
        self.norms.iter().find(|(s, _)| *s == site).map(|(_, moving)| moving.values())
    }
}
