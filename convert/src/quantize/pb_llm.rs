//! Partial binarization (PB-LLM): a share of the weights, chosen one by one, keeps several bits; the others become a
//! sign and a scale. Columns are quantized one after another with error compensation.

use std::time::Instant;

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::Dense;
use stb_runtime::Result;

use super::compensation::{Compensation, Propagation};
use super::quantizer::{Input, LinearQuantizer, Packed, Pruned, Seconds};
use super::search::Salient;
use crate::products::TASK_ROWS;

/// Options of the PB-LLM quantizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PbLlmOptions {
    /// Share of the weights of a matrix that are salient.
    pub share: f64,
    /// Bits of a salient weight.
    pub bits: u8,
    /// What makes a weight salient: w²/d² or |w|.
    pub salient: Salient,
    /// Columns that share scales.
    pub block: u16,
}

impl LinearQuantizer for PbLlmOptions {
    fn encoding(&self) -> Encoding {
        Encoding::Dense(Dense::F16)
    }

    fn note(&self) -> Option<String> {
        Some(
            "no encoding mixes bits within a row: the weights are stored as binary16; the \
             file is for comparison, its size means nothing"
                .into(),
        )
    }

    fn quantize(&self, input: &Input<'_>, _: Option<&Pruned>) -> Result<Packed> {
        let mut seconds = Seconds::default();
        let clock = Instant::now();
        let salient = salient_weights(input, self);
        seconds.search = clock.elapsed().as_secs_f64();
        let clock = Instant::now();
        let values = compensate(input, self, &salient)?;
        seconds.quantize = clock.elapsed().as_secs_f64();
        let clock = Instant::now();
        let payload = Dense::F16.encode(&values);
        seconds.pack = clock.elapsed().as_secs_f64();
        let share = salient.iter().filter(|s| **s).count() as f64 / salient.len() as f64;
        Ok(Packed { encoding: self.encoding(), payload, salient: Some(share), seconds })
    }
}

/// Marks the weights with the largest scores of the whole matrix.
fn salient_weights(input: &Input<'_>, options: &PbLlmOptions) -> Vec<bool> {
    let importance = input.factor.importance();
    let score = |(i, w): (usize, &f32)| match options.salient {
        Salient::Hessian => w * w * importance[i % input.cols],
        Salient::Magnitude | Salient::Off => w.abs(),
    };
    let scores: Vec<f32> = input.weights.par_iter().enumerate().map(score).collect();
    let count = (options.share * scores.len() as f64).round() as usize;
    let mut salient = vec![false; scores.len()];
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Ties go to the earlier weight, so that the result does not depend on the sort.
    order.par_sort_unstable_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.into_iter().take(count).for_each(|i| salient[i] = true);
    salient
}

fn compensate(input: &Input<'_>, options: &PbLlmOptions, salient: &[bool]) -> Result<Vec<f32>> {
    let (rows, cols, u) = (input.rows, input.cols, &input.factor.u);
    let mut weights = input.weights.to_vec();
    let mut values = vec![0.0; rows * cols];
    let mode = Propagation::Solve;
    let mut compensation = Compensation::new(input.compute, &weights, input.factor, mode)?;
    let span = usize::from(options.block);
    for from in (0..cols).step_by(span) {
        let width = span.min(cols - from);
        let mut errors = vec![0.0; rows * width];
        weights
            .par_chunks_exact_mut(cols)
            .zip(values.par_chunks_exact_mut(cols))
            .zip(salient.par_chunks_exact(cols))
            .zip(errors.par_chunks_exact_mut(width))
            .with_min_len(TASK_ROWS)
            .for_each(|(((row, values), salient), errors)| {
                errors.copy_from_slice(&row[from..from + width]);
                let levels = PbLlmLevels::new(errors, &salient[from..from + width], options.bits);
                for col in from..from + width {
                    let value = levels.nearest(row[col], salient[col]);
                    let line = &u[col * cols..(col + 1) * cols];
                    let error = (row[col] - value) / line[col];
                    for j in col + 1..from + width {
                        row[j] -= error * line[j];
                    }
                    values[col] = value;
                    errors[col - from] -= value;
                }
            });
        compensation.spread(&mut weights, &errors, from, width, span)?;
    }
    Ok(values)
}

/// The values that weights of one row and block can take.
struct PbLlmLevels {
    /// Magnitude of the weights that are not salient: their mean.
    scale: f32,
    /// The lowest value of salient weights.
    lowest: f32,
    /// The distance between values of salient weights.
    step: f32,
    /// The number of values of salient weights minus one.
    steps: f32,
}

impl PbLlmLevels {
    fn new(weights: &[f32], salient: &[bool], bits: u8) -> Self {
        let (mut n, mut sum) = (0.0, 0.0);
        let (mut low, mut high) = (0.0f32, 0.0f32);
        for (w, salient) in weights.iter().zip(salient) {
            if *salient {
                (low, high) = (low.min(*w), high.max(*w));
            } else {
                n += 1.0;
                sum += w.abs();
            }
        }
        let steps = ((1u32 << bits) - 1) as f32;
        let scale = if n > 0.0 { sum / n } else { 0.0 };
        Self { scale, lowest: low, step: (high - low) / steps, steps }
    }

    fn nearest(&self, w: f32, salient: bool) -> f32 {
        if !salient {
            return if w < 0.0 { -self.scale } else { self.scale };
        }
        if self.step == 0.0 {
            return self.lowest;
        }
        let code = ((w - self.lowest) / self.step).round_ties_even().clamp(0.0, self.steps);
        self.lowest + self.step * code
    }
}
