//! Quantizes the embeddings and the lm_head: the windows and the Hessian that weigh their errors.
//!
//! An error d of row r of the embeddings changes the output distribution by ½ f_r dᵀ E d nats per token, where f_r is the
//! frequency of token r and E the mean product of the gradients of embedded vectors; one of row r of the lm_head by
//! ½ g_r dᵀ C d, where g_r is the mean squared gradient of logit r and C the mean product of the inputs of the lm_head. All rows share a Hessian. In a tied matrix it is the sum of both over the rows: f_r and g_r are nearly
//! proportional, since both follow the probability of the token. Methods that treat rows differently rank them by the
//! loss without the row, d = −w.

use std::iter::Sum;
use std::ops::{Add, Mul, Sub};

use stb_format::Encoding;
use stb_format::arch::Role;
use stb_format::encoding::{IntGroupParts, MatrixView, NmParts, TrellisParts};
use stb_kernels::{Isa, dense};
use stb_runtime::{Engine, Error, Result};

use crate::backward::{RowWeights, TableStatistics};
use crate::calibration::CalibrationText;
use crate::compute::Compute;
use crate::hessian::{Factor, Hessian, output_errors};
use crate::interrupt::check_interrupt;
use crate::quantize::{Input, LinearQuantizer, Method, Packed, column_spreads};
use crate::recipe::Recipe;
use crate::sensitivity::SEQUENCES;

/// The most tokens in the backward pass, which keeps the inputs of every decoder layer for each token.
pub(crate) const TOKENS: usize = 2048;
/// Weights that are quantized at once, which bounds the memory.
const PIECE: usize = 1 << 22;
/// Rows of a piece are a multiple of the rows that an encoding packs together.
const PIECE_ROWS: usize = 64;

/// The windows of the backward pass.
///
/// # Errors
/// [`stb_runtime::Error::Usage`] if the calibration text is too short.
pub(crate) fn sequences(
    engine: &Engine,
    recipe: &Recipe,
    source: &CalibrationText,
) -> Result<Vec<Vec<u32>>> {
    let context = engine.model.spec.context_length as usize;
    let length = recipe.calibration.length.min(context).min(TOKENS);
    let samples = recipe.calibration.samples.min(SEQUENCES).min(TOKENS / length.max(1)).max(1);
    source.sample(&engine.model, &recipe.calibration, length, samples)
}

/// What the model computes with a matrix outside its decoder layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TableUse {
    /// Its rows are the embeddings of the tokens.
    pub embeds: bool,
    /// It is the lm_head.
    pub is_head: bool,
}

impl TableUse {
    /// The use of the matrix of `role` in a model with `tied` embeddings or not.
    pub(crate) fn new(role: Role, tied: bool) -> Self {
        let embeds = role == Role::TokenEmbedding;
        Self { embeds, is_head: tied || !embeds }
    }
}

/// The expected KL divergence from an error of a row, in nats per token, if it is small.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct RowLoss {
    /// Of the row as one of the lm_head.
    pub head: f64,
    /// Of the row as one of the embeddings.
    pub embedding: f64,
}

impl RowLoss {
    /// Both together.
    pub(crate) fn sum(self) -> f64 {
        self.head + self.embedding
    }
}

impl Add for RowLoss {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { head: self.head + other.head, embedding: self.embedding + other.embedding }
    }
}

impl Sub for RowLoss {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { head: self.head - other.head, embedding: self.embedding - other.embedding }
    }
}

impl Mul<f64> for RowLoss {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self { head: self.head * factor, embedding: self.embedding * factor }
    }
}

impl Sum for RowLoss {
    fn sum<I: Iterator<Item = Self>>(losses: I) -> Self {
        losses.fold(Self::default(), Add::add)
    }
}

impl RowWeights {
    /// The loss of an error of `row` with these mean squares; see [`RowLoss`].
    pub(crate) fn loss(&self, row: usize, squares: RowLoss) -> RowLoss {
        RowLoss {
            head: f64::from(self.logits[row]) * squares.head,
            embedding: f64::from(self.shares[row]) * squares.embedding,
        }
    }
}

/// A row of a table, or what is missing without it.
pub(crate) struct RowWithout {
    /// See [`TableHessian::row_squares`].
    pub squares: RowLoss,
    /// The sum of the squared weights.
    pub norm: f64,
}

/// The sum of the squared weights of a row.
pub(crate) fn squared_norm(row: &[f32]) -> f64 {
    row.iter().map(|w| f64::from(w * w)).sum()
}

/// The Hessian that all rows of a table share, with its factors, and the weight of each row.
pub(crate) struct TableHessian<'a> {
    statistics: &'a TableStatistics,
    usage: TableUse,
    damped: Hessian,
    factor: Factor,
    norms: Vec<f32>,
}

impl<'a> TableHessian<'a> {
    /// The Hessian of a table with this use; see the module.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not positive definite.
    pub(crate) fn new(
        statistics: &'a TableStatistics,
        usage: TableUse,
        damping: f64,
    ) -> Result<Self> {
        let width = statistics.embedded.size;
        let mut matrix = vec![0.0; width * width];
        if usage.is_head {
            let logits: f32 = statistics.rows.logits.iter().sum();
            for (m, h) in matrix.iter_mut().zip(statistics.head_inputs.matrix()) {
                *m = logits * h;
            }
        }
        if usage.embeds {
            // The frequencies add up to 1.
            matrix.iter_mut().zip(statistics.embedded.matrix()).for_each(|(m, e)| *m += e);
        }
        let mut damped = Hessian::from_matrix(matrix, width);
        let norms = damped.diagonal().iter().map(|d| (d / 2.0).sqrt()).collect();
        damped.damp(damping);
        let factor = Factor::new(&damped)?;
        Ok(Self { statistics, usage, damped, factor, norms })
    }

    /// The losses that errors of rows, [rows, cols], cause if each row has a weight of 1: half the mean square of the logit
    /// that they make, and half that of what they change the loss by as embeddings.
    pub(crate) fn row_squares(&self, isa: Isa, errors: &[f32]) -> Vec<RowLoss> {
        let squares = |used: bool, hessian: &Hessian| match used {
            true => output_errors(isa, errors, hessian),
            false => vec![0.0; errors.len() / hessian.size],
        };
        let head = squares(self.usage.is_head, &self.statistics.head_inputs);
        let embedding = squares(self.usage.embeds, &self.statistics.embedded);
        // The Hessians are twice the means.
        let of_row = |(head, embedding)| RowLoss { head: 0.25 * head, embedding: 0.25 * embedding };
        head.into_iter().zip(embedding).map(of_row).collect()
    }

    /// The expected loss of each row of the table if it were zero.
    ///
    /// # Errors
    /// [`crate::interrupt::Interrupted`].
    pub(crate) fn losses_without(
        &self,
        isa: Isa,
        weights: &MatrixView<'_>,
    ) -> anyhow::Result<Vec<RowLoss>> {
        let rows = self.rows_without(isa, weights)?;
        let all = &self.statistics.rows;
        Ok(rows
            .into_iter()
            .enumerate()
            .map(|(row, without)| all.loss(row, without.squares))
            .collect())
    }

    /// What is missing without each row of the table.
    ///
    /// # Errors
    /// [`crate::interrupt::Interrupted`].
    pub(crate) fn rows_without(
        &self,
        isa: Isa,
        weights: &MatrixView<'_>,
    ) -> anyhow::Result<Vec<RowWithout>> {
        let (step, cols) = (self.piece_rows(), weights.cols());
        let mut found = Vec::new();
        for first in (0..weights.rows()).step_by(step) {
            check_interrupt()?;
            let rows = first..(first + step).min(weights.rows());
            let mut values = vec![0.0; rows.len() * cols];
            for (row, out) in rows.zip(values.chunks_exact_mut(cols)) {
                weights.decode_row(row, out);
            }
            let squares = self.row_squares(isa, &values);
            let norms = values.chunks_exact(cols).map(squared_norm);
            found.extend(
                squares.into_iter().zip(norms).map(|(squares, norm)| RowWithout { squares, norm }),
            );
        }
        Ok(found)
    }

    /// The weights of rows in the first and in the second half of the tokens.
    pub(crate) fn halves(&self) -> &[RowWeights; 2] {
        &self.statistics.halves
    }

    /// Rows of a piece.
    fn piece_rows(&self) -> usize {
        (PIECE / self.damped.size.max(1)).next_multiple_of(PIECE_ROWS)
    }

    /// Quantizes `weights`, [rows, cols], piece by piece of rows. With a method that ranks rows, these are all rows of
    /// the table.
    ///
    /// # Errors
    /// Those of the method; [`crate::interrupt::Interrupted`].
    pub(crate) fn quantize(
        &self,
        compute: Compute<'_>,
        weights: &[f32],
        method: Method,
    ) -> anyhow::Result<Packed> {
        let rows = self.piece_rows();
        let Method::MixedRows(options) = method else {
            return self.quantize_pieces(compute, weights, method.quantizer(), rows);
        };
        let cols = self.damped.size;
        let all = MatrixView::Dense(dense(weights, weights.len() / cols, cols));
        let losses = self.losses_without(compute.isa, &all)?;
        let losses: Vec<f64> = losses.into_iter().map(RowLoss::sum).collect();
        options.quantize_ranked(weights, cols, &losses, |weights, quantizer| {
            self.quantize_pieces(compute, weights, quantizer, rows)
        })
    }

    /// [`TableHessian::quantize`] with pieces of `rows` rows, a multiple of [`PIECE_ROWS`].
    fn quantize_pieces(
        &self,
        compute: Compute<'_>,
        weights: &[f32],
        quantizer: &dyn LinearQuantizer,
        rows: usize,
    ) -> anyhow::Result<Packed> {
        let cols = self.damped.size;
        let spreads = column_spreads(weights, cols);
        let mut pieces = Vec::new();
        for weights in weights.chunks(rows * cols) {
            check_interrupt()?;
            let input = Input {
                compute,
                weights,
                rows: weights.len() / cols,
                cols,
                hessian: &self.damped,
                factor: &self.factor,
                norms: &self.norms,
                col_spreads: Some(&spreads),
            };
            pieces.push((input.rows, quantizer.quantize(&input, None)?));
        }
        Ok(join(pieces, cols)?)
    }
}

/// The weights of the largest piece of a table with `weights` weights.
pub(crate) fn piece_weights(weights: u64, cols: u64) -> u64 {
    weights.min(PIECE as u64 + PIECE_ROWS as u64 * cols)
}

/// One matrix of pieces with rows below one another, each with its number of rows.
fn join(mut pieces: Vec<(usize, Packed)>, cols: usize) -> Result<Packed> {
    if pieces.len() == 1 {
        return Ok(pieces.remove(0).1);
    }
    let internal = |what: &str| Error::Internal { what: what.to_owned() };
    let rows = pieces.iter().map(|(rows, _)| rows).sum();
    let Some((_, first)) = pieces.first() else { return Err(internal("a table without rows")) };
    let encoding = first.encoding.clone();
    let mut seconds = first.seconds;
    pieces[1..].iter().for_each(|(_, piece)| seconds.add(&piece.seconds));
    let mut views = Vec::new();
    for (rows, piece) in &pieces {
        let view = piece.encoding.view(*rows as u64, cols as u64, &piece.payload);
        views.push(view.map_err(|e| internal(&e.to_string()))?);
    }
    let payload = match encoding {
        Encoding::IntGroup(spec) => {
            let mut all = IntGroupParts { spec, rows, cols, codes: Vec::new(), scales: Vec::new() };
            for view in views {
                let MatrixView::IntGroup(view) = view else { continue };
                let piece = view.unpack();
                all.codes.extend(piece.codes);
                all.scales.extend(piece.scales);
            }
            all.pack()
        }
        Encoding::Nm(spec) => {
            let mut all = NmParts {
                spec,
                rows,
                cols,
                col_factors: Vec::new(),
                row_scales: Vec::new(),
                block_codes: Vec::new(),
                codes: Vec::new(),
            };
            for view in views {
                let MatrixView::Nm(view) = view else { continue };
                let piece = view.unpack();
                all.row_scales.extend(piece.row_scales);
                all.block_codes.extend(piece.block_codes);
                all.codes.extend(piece.codes);
            }
            all.pack()
        }
        Encoding::Trellis(spec) => {
            let mut all = TrellisParts {
                spec,
                rows,
                cols,
                tables: Vec::new(),
                col_factors: Vec::new(),
                row_scales: Vec::new(),
                block_codes: Vec::new(),
                streams: Vec::new(),
            };
            for view in views {
                let MatrixView::Trellis(view) = view else { continue };
                let piece = view.unpack();
                // The same in all pieces.
                (all.tables, all.col_factors) = (piece.tables, piece.col_factors);
                all.row_scales.extend(piece.row_scales);
                all.block_codes.extend(piece.block_codes);
                all.streams.extend(piece.streams);
            }
            all.pack()
        }
        other => return Err(internal(&format!("a table in pieces of {other}"))),
    };
    Ok(Packed { encoding, payload, salient: None, seconds })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::mixed_rows::MixedRowsOptions;
    use crate::quantize::{decode, relative_error};

    /// A table, [rows, 64], with the Hessian of correlated inputs.
    fn table(rows: usize) -> (TableStatistics, Vec<f32>) {
        let cols = 64;
        let noise = |i: usize| ((i * 7919 + i / 13 * 104_729) % 2003) as f32 / 1001.5 - 1.0;
        let isa = Isa::detect().unwrap();
        let tokens = 256;
        let x: Vec<f32> = (0..tokens * cols)
            .map(|i| noise(i / cols * 31) * (1.0 + (i % cols) as f32 / 16.0) + 0.3 * noise(i))
            .collect();
        let mut head_inputs = Hessian::new(cols);
        head_inputs.add(isa, &x);
        head_inputs.finish_tokens(tokens);
        let embedded =
            (0..cols * cols).map(|i| if i % (cols + 1) == 0 { 0.02 } else { 0.0 }).collect();
        let weights: Vec<f32> = (0..rows).map(|r| 1.0 / (1 + r * 7 % rows) as f32).collect();
        let weights = RowWeights { logits: weights.clone(), shares: weights };
        let statistics = TableStatistics {
            embedded: Hessian::from_matrix(embedded, cols),
            head_inputs,
            halves: [weights.clone(), weights.clone()],
            rows: weights,
        };
        (statistics, (0..rows * cols).map(|i| noise(i * 3 + 1)).collect())
    }

    fn hessian(statistics: &TableStatistics) -> TableHessian<'_> {
        TableHessian::new(statistics, TableUse { embeds: true, is_head: true }, 0.01).unwrap()
    }

    #[test]
    fn pieces_are_the_whole() {
        let (statistics, weights) = table(164);
        let hessian = hessian(&statistics);
        let compute = Isa::detect().unwrap().into();
        let with_factors = Method::candidates(64, true).filter(|m| matches!(m, Method::Trellis(_)));
        for method in Method::candidates(64, false).chain(with_factors) {
            let whole = hessian.quantize(compute, &weights, method).unwrap();
            let joined =
                hessian.quantize_pieces(compute, &weights, method.quantizer(), 64).unwrap();
            assert_eq!(joined.encoding, method.quantizer().encoding());
            assert_eq!(joined.payload, whole.payload, "{}", whole.encoding);
        }
    }

    #[test]
    fn the_hessian_lowers_the_error() {
        let (statistics, weights) = table(256);
        let hessian = hessian(&statistics);
        let isa = Isa::detect().unwrap();
        let input = Input {
            compute: isa.into(),
            weights: &weights,
            rows: 256,
            cols: 64,
            hessian: &hessian.damped,
            factor: &hessian.factor,
            norms: &hessian.norms,
            col_spreads: None,
        };
        for method in Method::candidates(64, false) {
            let Method::Int(options) = method else { continue };
            let packed = hessian.quantize(isa.into(), &weights, method).unwrap();
            let rounded = crate::quantize::int_group::round(&weights, 256, 64, options.spec);
            let error = |packed: &Packed| relative_error(&input, &decode(packed, 256, 64)).unwrap();
            let (own, rounded) = (error(&packed), error(&rounded));
            assert!(own < 0.8 * rounded, "{}: {own}, rounded {rounded}", packed.encoding);
        }
    }

    #[test]
    fn rows_that_matter_most_get_more_bits() {
        let rows = 192;
        let (statistics, weights) = table(rows);
        let hessian = hessian(&statistics);
        let isa = Isa::detect().unwrap();
        let method = |bits| {
            Method::candidates(64, false)
                .find(|m| matches!(m, Method::Int(o) if o.spec.bits() == bits))
        };
        let (Some(Method::Int(fine)), Some(coarse)) = (method(8), method(2)) else {
            panic!("candidates")
        };
        let mixed =
            Method::MixedRows(MixedRowsOptions::new(8, fine, coarse.coarse().unwrap()).unwrap());
        let loss = |method| -> Vec<f64> {
            let stored = decode(&hessian.quantize(isa.into(), &weights, method).unwrap(), rows, 64);
            let errors: Vec<f32> = weights.iter().zip(&stored).map(|(w, q)| w - q).collect();
            let squares = hessian.row_squares(isa, &errors).into_iter().enumerate();
            squares.map(|(row, squares)| statistics.rows.loss(row, squares).sum()).collect()
        };
        let (mixed, coarse) = (loss(mixed), loss(coarse));
        let better: Vec<usize> = (0..rows).filter(|r| mixed[*r] < 0.01 * coarse[*r]).collect();
        let all = MatrixView::Dense(dense(&weights, rows, 64));
        let without = hessian.losses_without(isa, &all).unwrap();
        let mut ranked: Vec<usize> = (0..rows).collect();
        ranked.sort_by(|a, b| without[*b].sum().total_cmp(&without[*a].sum()));
        ranked.truncate(8);
        ranked.sort_unstable();
        assert_eq!(better, ranked);
        assert!((0..rows).filter(|r| !ranked.contains(r)).all(|r| mixed[r] == coarse[r]));
    }
}
