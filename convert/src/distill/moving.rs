//! The parameters that distillation trains: the scales of quantized linear layers and the weights of norms.

use rayon::prelude::*;
use stb_format::arch::{NormKind, NormSite};
use stb_format::encoding::{
    IntGroupParts, MatrixView, MixedRows, MixedRowsParts, NmParts, TileScales, TrellisParts,
};
use stb_format::half::f16;
use stb_runtime::{Layer, LayerMatrix, LayerVector, Weight};

use crate::backward::{DenseLayer, DenseMatrix};
use crate::quantize::tile_scales::round_rows;

/// Adam's decay rates of first and second moments. The second is below the usual 0.999 because there are few steps.
const DECAY: [f64; 2] = [0.9, 0.95];

/// Parameters as logarithms relative to their initial values, with Adam's moments.
pub(super) struct Logarithms {
    start: Vec<f32>,
    /// ln(value / start).
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

    /// One step of Adam; `gradient` is with respect to the parameters, whose values are `values`. Parameters with
    /// smaller gradients than the mean change by less than the rate: gradients of rare tokens are mostly noise.
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

    /// The present values.
    pub(super) fn values(&self) -> Vec<f32> {
        self.start.iter().zip(&self.now).map(|(s, l)| s * l.exp()).collect()
    }
}

/// The weight of a norm, trained by its factors: the weight, or 1 + weight where that is the formula of the norm.
pub(super) struct MovingNorm {
    kind: NormKind,
    factors: Logarithms,
}

impl MovingNorm {
    pub(super) fn new(kind: NormKind, weight: &[f32]) -> Self {
        Self { kind, factors: Logarithms::new(factors(kind, weight)) }
    }

    /// One step of Adam; `gradient` is with respect to the weight, whose values are `weight`.
    pub(super) fn step(&mut self, gradient: &[f32], weight: &[f32], rate: f64) {
        self.factors.step(gradient, &factors(self.kind, weight), rate);
    }

    /// The present weight.
    pub(super) fn weight(&self) -> Vec<f32> {
        let mut weight = self.factors.values();
        if self.kind == NormKind::RmsPlusOne {
            weight.iter_mut().for_each(|w| *w -= 1.0);
        }
        weight
    }
}

/// The factors of normalized values in a norm with this weight.
fn factors(kind: NormKind, weight: &[f32]) -> Vec<f32> {
    match kind {
        NormKind::Rms | NormKind::Layer => weight.to_vec(),
        NormKind::RmsPlusOne => weight.iter().map(|w| 1.0 + w).collect(),
    }
}

/// A quantized matrix without its scales.
enum ScaledCodes {
    Nm(NmParts),
    Int(IntGroupParts),
    Trellis {
        parts: TrellisParts,
        /// The weights in units of the scale, [rows, cols].
        units: Vec<i8>,
    },
}

/// A quantized matrix whose scales are trained.
pub(super) struct MovingScales {
    /// All rows.
    all: ScaledRows,
    /// The rows that are stored a second time.
    listed: Option<ListedRows>,
}

/// The rows of a matrix of mixed rows that are stored a second time.
struct ListedRows {
    spec: MixedRows,
    /// Their numbers in the matrix.
    numbers: Vec<u32>,
    rows: ScaledRows,
}

/// Rows of one encoding whose scales are trained.
struct ScaledRows {
    codes: ScaledCodes,
    rows: usize,
    cols: usize,
    /// Scales per row.
    blocks: usize,
    /// Columns per scale.
    span: usize,
    /// The scales, [rows, blocks].
    moving: Logarithms,
}

impl MovingScales {
    /// `None` for a weight without scales that can be trained.
    pub(super) fn new(weight: &Weight) -> Option<Self> {
        match weight.view() {
            MatrixView::MixedRows(view) => {
                let listed = ListedRows {
                    spec: view.spec,
                    numbers: view.listed.iter().map(|r| u32::from_le_bytes(*r)).collect(),
                    rows: ScaledRows::new(MatrixView::IntGroup(view.fine))?,
                };
                Some(Self { all: ScaledRows::new(view.coarse.matrix())?, listed: Some(listed) })
            }
            view => Some(Self { all: ScaledRows::new(view)?, listed: None }),
        }
    }

    /// Writes the weights with the present scales to `out`, [rows, cols], rounded as they would be stored.
    pub(super) fn weights(&mut self, out: &mut DenseMatrix) {
        self.all.weights(out);
        if let Some(ListedRows { numbers, rows, .. }) = &mut self.listed {
            let mut listed = rows.zeros();
            rows.weights(&mut listed);
            for (row, from) in numbers.iter().zip(listed.values.chunks_exact(listed.cols)) {
                out.values[*row as usize * out.cols..][..out.cols].copy_from_slice(from);
            }
        }
    }

    /// Zeros in the shape of the matrix.
    pub(super) fn zeros(&self) -> DenseMatrix {
        self.all.zeros()
    }

    /// One step of Adam along the gradient of the weights, [rows, cols].
    pub(super) fn step(&mut self, d_weights: &DenseMatrix, rate: f64) {
        let mut gradient = self.all.gradient(d_weights);
        if let Some(ListedRows { numbers, rows, .. }) = &mut self.listed {
            let mut d_listed = rows.zeros();
            for (row, to) in numbers.iter().zip(d_listed.values.chunks_exact_mut(d_listed.cols)) {
                let row = *row as usize;
                to.copy_from_slice(&d_weights.values[row * d_weights.cols..][..d_weights.cols]);
                // The copy of a listed row among all rows is not used.
                gradient[row * self.all.blocks..][..self.all.blocks].fill(0.0);
            }
            let d_listed = rows.gradient(&d_listed);
            rows.step(&d_listed, rate);
        }
        self.all.step(&gradient, rate);
    }

    /// The bytes to store, with the present scales.
    pub(super) fn pack(&mut self) -> Vec<u8> {
        let coarse = self.all.pack();
        match &mut self.listed {
            Some(ListedRows { spec, numbers, rows }) => {
                let (spec, listed) = (*spec, numbers.clone());
                MixedRowsParts { spec, listed, fine: rows.pack(), coarse }.pack()
            }
            None => coarse,
        }
    }
}

impl ScaledRows {
    /// `None` for an encoding without scales that can be trained.
    fn new(view: MatrixView<'_>) -> Option<Self> {
        let (rows, cols) = (view.rows(), view.cols());
        let (codes, span, scales) = match view {
            MatrixView::Nm(view) if !view.spec.has_col_factors() => {
                let (span, scales) = stored_scales(&view.scales(), rows, cols);
                (ScaledCodes::Nm(view.unpack()), span, scales)
            }
            MatrixView::Trellis(view) => {
                let (span, scales) = stored_scales(&view.scales(), rows, cols);
                let mut units = vec![0; rows * cols];
                for (row, units) in units.chunks_exact_mut(cols).enumerate() {
                    view.decode_units(row, units);
                }
                (ScaledCodes::Trellis { parts: view.unpack(), units }, span, scales)
            }
            MatrixView::IntGroup(view) => {
                let parts = view.unpack();
                let scales = parts.scales.iter().map(|s| s.to_f32()).collect();
                (ScaledCodes::Int(parts), view.spec.group(), scales)
            }
            _ => return None,
        };
        let moving = Logarithms::new(scales);
        Some(Self { codes, rows, cols, blocks: cols.div_ceil(span), span, moving })
    }

    /// Rounds the present scales to values that the file can store; returns them, [rows, blocks].
    fn round_scales(&mut self) -> Vec<f32> {
        let mut scales = self.moving.values();
        match &mut self.codes {
            ScaledCodes::Nm(parts) => {
                let bits = parts.spec.scale_bits();
                (parts.row_scales, parts.block_codes) = round_rows(&mut scales, self.blocks, bits);
            }
            ScaledCodes::Trellis { parts, .. } => {
                let bits = parts.spec.scale_bits();
                (parts.row_scales, parts.block_codes) = round_rows(&mut scales, self.blocks, bits);
            }
            ScaledCodes::Int(parts) => {
                let limit = f16::MAX.to_f32();
                parts.scales =
                    scales.iter().map(|s| f16::from_f32(s.clamp(-limit, limit))).collect();
                scales.iter_mut().zip(&parts.scales).for_each(|(s, h)| *s = h.to_f32());
            }
        }
        scales
    }

    /// Calls `f` with block, column and the factor of the scale, for all weights of a row that may be nonzero.
    fn for_each_unit(&self, row: usize, mut f: impl FnMut(usize, usize, f32)) {
        match &self.codes {
            ScaledCodes::Nm(parts) => {
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
            ScaledCodes::Int(parts) => {
                let codes = &parts.codes[row * self.cols..(row + 1) * self.cols];
                for (column, code) in codes.iter().enumerate() {
                    f(column / self.span, column, f32::from(*code));
                }
            }
            ScaledCodes::Trellis { parts, units } => {
                let units = &units[row * self.cols..(row + 1) * self.cols];
                for (column, unit) in units.iter().enumerate() {
                    let factor = parts.col_factors.get(column).map_or(1.0, |f| f.to_f32());
                    f(column / self.span, column, f32::from(*unit) * factor);
                }
            }
        }
    }

    /// Writes the weights with the present scales to `out`, [rows, cols], rounded as they would be stored.
    fn weights(&mut self, out: &mut DenseMatrix) {
        let scales = self.round_scales();
        let (this, blocks) = (&*self, self.blocks);
        out.values.par_chunks_exact_mut(self.cols).enumerate().for_each(|(r, row)| {
            row.fill(0.0);
            let scales = &scales[r * blocks..(r + 1) * blocks];
            this.for_each_unit(r, |block, column, unit| row[column] = unit * scales[block]);
        });
    }

    /// Zeros in the shape of the matrix.
    fn zeros(&self) -> DenseMatrix {
        DenseMatrix::new(self.rows, self.cols)
    }

    /// The gradient of the scales, [rows, blocks], given that of the weights.
    fn gradient(&self, d_weights: &DenseMatrix) -> Vec<f32> {
        let mut gradient = vec![0.0; self.rows * self.blocks];
        gradient.par_chunks_exact_mut(self.blocks).enumerate().for_each(|(r, out)| {
            let row = &d_weights.values[r * self.cols..(r + 1) * self.cols];
            self.for_each_unit(r, |block, column, unit| out[block] += unit * row[column]);
        });
        gradient
    }

    /// One step of Adam along the gradient of the scales, [rows, blocks].
    fn step(&mut self, gradient: &[f32], rate: f64) {
        let values = self.moving.values();
        self.moving.step(gradient, &values, rate);
    }

    /// The bytes to store, with the present scales.
    fn pack(&mut self) -> Vec<u8> {
        self.round_scales();
        match &self.codes {
            ScaledCodes::Nm(parts) => parts.pack(),
            ScaledCodes::Int(parts) => parts.pack(),
            ScaledCodes::Trellis { parts, .. } => parts.pack(),
        }
    }
}

/// The columns per scale and the scales, [rows, blocks], of a matrix of `rows` × `cols`.
fn stored_scales(stored: &TileScales<'_>, rows: usize, cols: usize) -> (usize, Vec<f32>) {
    let span = if stored.blocks == 0 { cols } else { stored.block };
    let of_row = |r| (0..stored.blocks.max(1)).map(move |b| stored.scale(r, b * span));
    (span, (0..rows).flat_map(of_row).collect())
}

/// The trained scales and norms of a decoder layer.
pub(super) struct MovingLayer {
    /// The linear layers whose scales are trained.
    matrices: Vec<(LayerMatrix, MovingScales)>,
    norms: Vec<(NormSite, MovingNorm)>,
}

impl MovingLayer {
    pub(super) fn new(layer: &Layer) -> Self {
        let (matrices, kind) = (layer.matrices(), layer.block.norm.kind);
        let norms = layer.vectors().filter_map(|(key, vector)| match key {
            LayerVector::Norm(site) => Some((site, vector)),
            LayerVector::NormBias(_) | LayerVector::Bias(_) => None,
        });
        Self {
            matrices: matrices.filter_map(|(key, w)| Some((key, MovingScales::new(w)?))).collect(),
            norms: norms.map(|(site, norm)| (site, MovingNorm::new(kind, norm))).collect(),
        }
    }

    /// The trained scales of a matrix; `None` if they are not trained.
    fn matrix(&self, key: LayerMatrix) -> Option<&MovingScales> {
        self.matrices.iter().find(|(k, _)| *k == key).map(|(_, moving)| moving)
    }

    /// The weights of `layer` with the present parameters, rounded as they would be stored.
    pub(super) fn weights(&mut self, layer: &Layer) -> DenseLayer {
        let mut weights = layer.map(
            |key, weight| match self.matrix(key) {
                Some(moving) => moving.zeros(),
                None => DenseMatrix::decoded(weight),
            },
            |_, vector| vector.clone(),
        );
        self.write(&mut weights);
        weights
    }

    /// Writes the trained linear layers, rounded as they would be stored, and the norms to `weights`.
    pub(super) fn write(&mut self, weights: &mut DenseLayer) {
        for (key, moving) in &mut self.matrices {
            if let Some(matrix) = weights.matrix_mut(*key) {
                moving.weights(matrix);
            }
        }
        for (site, moving) in &self.norms {
            *weights.norm_mut(*site) = moving.weight();
        }
    }

    /// Zero gradients of the trained parts; the matrices of other linear layers are empty.
    pub(super) fn zeros(&self, weights: &DenseLayer) -> DenseLayer {
        weights.map(
            |key, _| self.matrix(key).map_or_else(DenseMatrix::default, MovingScales::zeros),
            |_, vector| vec![0.0; vector.len()],
        )
    }

    /// One step of Adam along `gradient` from `weights`.
    pub(super) fn step(&mut self, gradient: &DenseLayer, weights: &DenseLayer, rate: f64) {
        for (key, moving) in &mut self.matrices {
            if let Some(gradient) = gradient.matrix(*key) {
                moving.step(gradient, rate);
            }
        }
        for (site, moving) in &mut self.norms {
            moving.step(gradient.norm(*site), weights.norm(*site), rate);
        }
    }

    /// The bytes to store for a matrix; `None` if its scales are not trained.
    pub(super) fn pack(&mut self, key: LayerMatrix) -> Option<Vec<u8>> {
        self.matrices.iter_mut().find(|(k, _)| *k == key).map(|(_, moving)| moving.pack())
    }

    /// The present weight of a norm.
    pub(super) fn norm(&self, site: NormSite) -> Option<Vec<f32>> {
        self.norms.iter().find(|(s, _)| *s == site).map(|(_, moving)| moving.weight())
    }
}

#[cfg(test)]
mod tests {
    use stb_format::Encoding;
    use stb_format::encoding::{CoarseRows, IntGroup};

    use super::*;
    use crate::quantize::int_group::round;

    /// The factors of a norm move against the gradient, by at most the rate relative to their size; a weight of zero
    /// moves where 1 + weight is the factor.
    #[test]
    fn norms_move_their_factors() {
        let (weight, gradient, rate) = ([0.0, -0.5, 1.0], [1.0, -1.0, 1.0], 0.1);
        for (kind, offset) in [(NormKind::Rms, 0.0), (NormKind::RmsPlusOne, 1.0)] {
            let mut moving = MovingNorm::new(kind, &weight);
            assert_eq!(moving.weight(), weight, "{kind:?}");
            moving.step(&gradient, &weight, rate);
            for ((before, after), gradient) in weight.iter().zip(moving.weight()).zip(gradient) {
                let change = (after - before) / (before + offset);
                if before + offset == 0.0 {
                    assert_eq!(after, *before, "{kind:?}");
                } else {
                    assert!((after - before) * gradient < 0.0, "{kind:?}: {before} {after}");
                    assert!(change.abs() <= 1.01 * rate as f32, "{kind:?}: {before} {after}");
                }
            }
        }
    }

    /// Of a matrix of mixed rows, the scales of both copies are trained, and the weights are those that a file has.
    #[test]
    fn mixed_rows_move_the_scales_that_count() {
        let (rows, cols, numbers) = (5, 64, vec![1, 4]);
        let values: Vec<f32> =
            (0..rows * cols).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
        let spec = |bits| IntGroup::new(bits, 32).unwrap();
        let listed: Vec<f32> =
            numbers.iter().flat_map(|r| &values[*r as usize * cols..][..cols]).copied().collect();
        let mixed = MixedRows::new(2, spec(4), CoarseRows::IntGroup(spec(2))).unwrap();
        let parts = MixedRowsParts {
            spec: mixed,
            listed: numbers.clone(),
            fine: round(&listed, 2, cols, spec(4)).payload,
            coarse: round(&values, rows, cols, spec(2)).payload,
        };
        let encoding = Encoding::MixedRows(mixed);
        let decoded = |payload: &[u8]| {
            let weight = Weight::from_payload(payload, encoding.clone(), rows as u64, cols as u64);
            weight.unwrap().view().decode()
        };
        let payload = parts.pack();
        let weight =
            Weight::from_payload(&payload, encoding.clone(), rows as u64, cols as u64).unwrap();
        let mut moving = MovingScales::new(&weight).unwrap();
        assert_eq!(moving.pack(), payload);
        // Away from zero: the gradient of the loss −½ Σ w² is −w.
        let mut gradient = moving.zeros();
        moving.weights(&mut gradient);
        let before = gradient.values.clone();
        assert_eq!(before, decoded(&payload));
        gradient.values.iter_mut().for_each(|w| *w = -*w);
        moving.step(&gradient, 0.1);
        let mut after = moving.zeros();
        moving.weights(&mut after);
        let stored = moving.pack();
        assert_eq!(after.values, decoded(&stored));
        let squares = |row: &[f32]| row.iter().map(|w| w * w).sum::<f32>();
        for (before, after) in before.chunks(cols).zip(after.values.chunks(cols)) {
            assert!(squares(after) > 1.02 * squares(before));
        }
        // The unused copies stay.
        let view = encoding.view(rows as u64, cols as u64, &stored).unwrap();
        let MatrixView::MixedRows(view) = view else { panic!("mixed rows") };
        let (mut old, mut new) = (vec![0.0; cols], vec![0.0; cols]);
        let coarse = Encoding::IntGroup(spec(2));
        let all = coarse.view(rows as u64, cols as u64, &parts.coarse).unwrap();
        for row in numbers {
            all.decode_row(row as usize, &mut old);
            view.coarse.matrix().decode_row(row as usize, &mut new);
            assert_eq!(old, new);
        }
    }
}
