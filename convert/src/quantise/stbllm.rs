//! The strict STBLLM structure (paper §3, algorithms 1 and 2): an N:8 mask, salient columns with a
//! residual sign, three magnitude regions for the rest, and block-wise error compensation. Pruned
//! weights are exactly zero; scales are rounded to binary16 before errors are passed on.

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::{Stbllm, StbllmParts};
use stb_format::half::f16;

use super::metric::{Metric, Scorer};
use super::prune::{prune_plain, prune_with_compensation};
use super::sorted::{Sorted, residual_error};
use super::{Input, Packed, TASK_ROWS, propagate};

/// Where the N:8 mask is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskPlacement {
    /// In a pass of its own that compensates for each removed weight; binarisation follows.
    Compensated,
    /// In the block loop, on the weights as compensated so far (paper algorithm 1).
    InLoop,
    /// On the original weights, without compensation (published code).
    Before,
}

/// Options of the quantiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// N of N:8 and columns per block.
    pub spec: Stbllm,
    /// Chooses the mask.
    pub metric: Metric,
    /// Where the mask is chosen.
    pub mask: MaskPlacement,
    /// The most salient columns of a block, plus one.
    pub salient_limit: usize,
    /// Upper threshold over lower one, on magnitudes.
    pub region_ratio: f32,
}

/// Lower thresholds tried for the three regions: quantiles from 10 % to 90 %.
const THRESHOLDS: usize = 160;

/// The regions of one block, the same for all rows.
struct Regions {
    /// Which columns of the block are salient.
    salient: Vec<bool>,
    /// Magnitudes below are dense.
    p1: f32,
    /// Magnitudes from here on are sparse.
    p2: f32,
}

/// Quantises one linear layer.
#[must_use]
pub fn quantise(input: &Input<'_>, options: &Options) -> Packed {
    let (rows, cols, spec) = (input.rows, input.cols, options.spec);
    let importance = input.factor.importance();
    let scorer = Scorer::new(options.metric, input.weights, input.norms, &importance);
    let kept = |width: usize| spec.kept(width);
    let (mut weights, mut mask) = match options.mask {
        MaskPlacement::InLoop => (input.weights.to_vec(), vec![false; rows * cols]),
        MaskPlacement::Compensated => {
            let pruned = prune_with_compensation(input, &scorer, kept);
            (pruned.weights, pruned.mask)
        }
        MaskPlacement::Before => {
            let pruned = prune_plain(input, &scorer, kept);
            (pruned.weights, pruned.mask)
        }
    };
    let blocks = cols.div_ceil(spec.block());
    let mut parts = StbllmParts {
        spec,
        rows,
        cols,
        salient: vec![false; cols],
        states: vec![0; rows * cols],
        negative: vec![false; rows * cols],
        scales: vec![f16::ZERO; rows * blocks * 5],
    };
    for (index, from) in (0..cols).step_by(spec.block()).enumerate() {
        let width = spec.block().min(cols - from);
        if options.mask == MaskPlacement::InLoop {
            select_block(&scorer, spec, &weights, &mut mask, cols, from, width);
        }
        let block =
            Block { weights: &weights, mask: &mask, importance: &importance, cols, from, width };
        let regions = block.search(options);
        parts.salient[from..from + width].copy_from_slice(&regions.salient);
        let errors = binarise(&block, &regions, index, blocks, &mut parts);
        propagate(input.isa, &mut weights, input.factor, &errors, from, width);
    }
    let salient = parts.salient.iter().filter(|s| **s).count() as f64 / cols as f64;
    Packed { encoding: Encoding::Stbllm(spec), payload: parts.pack(), salient: Some(salient) }
}

/// The N:8 mask of a block on the current weights.
fn select_block(
    scorer: &Scorer,
    spec: Stbllm,
    weights: &[f32],
    mask: &mut [bool],
    cols: usize,
    from: usize,
    width: usize,
) {
    let rows = weights.par_chunks_exact(cols).zip(mask.par_chunks_exact_mut(cols));
    rows.enumerate().for_each(|(r, (row, mask))| {
        for group in (from..from + width).step_by(8) {
            let part = group..(group + 8).min(from + width);
            let kept = spec.kept(part.len());
            scorer.select(r, group, &row[part.clone()], kept, &mut mask[part]);
        }
    });
}

/// A block of columns with all rows.
struct Block<'a> {
    weights: &'a [f32],
    mask: &'a [bool],
    importance: &'a [f32],
    cols: usize,
    from: usize,
    width: usize,
}

impl Block<'_> {
    /// Weights and mask of the block in each row of a task.
    fn rows(&self, task: usize) -> impl Iterator<Item = (&[f32], &[bool])> {
        let part = self.from..self.from + self.width;
        let span = TASK_ROWS * self.cols;
        let end = self.weights.len().min((task + 1) * span);
        let weights = self.weights[task * span..end].chunks_exact(self.cols);
        let mask = self.mask[task * span..end].chunks_exact(self.cols);
        weights.zip(mask).map(move |(w, m)| (&w[part.clone()], &m[part.clone()]))
    }

    /// Sums what `cost` gives for each row, in an order that does not depend on threads.
    fn sum_rows(
        &self,
        count: usize,
        cost: impl Fn(&[f32], &[bool], &mut [f64]) + Sync,
    ) -> Vec<f64> {
        let tasks = self.weights.len().div_ceil(TASK_ROWS * self.cols);
        let part = |task: usize| {
            let mut sums = vec![0.0; count];
            self.rows(task).for_each(|(weights, mask)| cost(weights, mask, &mut sums));
            sums
        };
        let parts: Vec<Vec<f64>> = (0..tasks).into_par_iter().map(part).collect();
        let mut total = vec![0.0; count];
        for sums in parts {
            total.iter_mut().zip(sums).for_each(|(t, s)| *t += s);
        }
        total
    }

    /// Salient columns, then thresholds, each with the least weighted error.
    fn search(&self, options: &Options) -> Regions {
        let importance = &self.importance[self.from..self.from + self.width];
        let salient = self.salient_columns(importance, options.salient_limit);
        let (p1, p2) = self.thresholds(importance, &salient, options.region_ratio);
        Regions { salient, p1, p2 }
    }

    /// Columns ranked by Σ w²/d²; as many of them are salient as make the error of binarising both
    /// sets twice smallest (equal orders keep the number small; the true orders would always take
    /// the limit).
    fn salient_columns(&self, importance: &[f32], limit: usize) -> Vec<bool> {
        let scores = self.sum_rows(self.width, |weights, mask, sums| {
            for c in 0..weights.len() {
                if mask[c] {
                    sums[c] += f64::from(weights[c] * weights[c] * importance[c]);
                }
            }
        });
        let mut ranked: Vec<usize> = (0..self.width).collect();
        ranked.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        let counts = limit.min(self.width).saturating_sub(1);
        let errors = self.sum_rows(counts, |weights, mask, sums| {
            let pair = |c: usize| (weights[c].abs(), importance[c]);
            let (mut all, mut top) = (Sorted::default(), Sorted::default());
            all.fill((0..weights.len()).filter(|c| mask[*c]).map(pair));
            let mut chosen = Vec::new();
            for (k, sum) in sums.iter_mut().enumerate() {
                if mask[ranked[k]] {
                    chosen.push(pair(ranked[k]));
                    top.fill(chosen.iter().copied());
                }
                *sum += residual_error(&top, &[]) + residual_error(&all, &chosen);
            }
        });
        let best = (0..counts).min_by(|a, b| errors[*a].total_cmp(&errors[*b]));
        let mut salient = vec![false; self.width];
        for c in ranked.iter().take(best.map_or(0, |k| k + 1)) {
            salient[*c] = true;
        }
        salient
    }

    /// The thresholds of the three regions with the least error over kept, non-salient weights.
    fn thresholds(&self, importance: &[f32], salient: &[bool], ratio: f32) -> (f32, f32) {
        let rest = |c: &usize, mask: &[bool]| mask[*c] && !salient[*c];
        let tasks = self.weights.len().div_ceil(TASK_ROWS * self.cols);
        let mut magnitudes: Vec<f32> = (0..tasks)
            .into_par_iter()
            .flat_map_iter(|task| {
                self.rows(task).flat_map(|(weights, mask)| {
                    (0..weights.len()).filter(|c| rest(c, mask)).map(|c| weights[c].abs())
                })
            })
            .collect();
        magnitudes.par_sort_unstable_by(f32::total_cmp);
        let Some(last) = magnitudes.len().checked_sub(1) else { return (0.0, 0.0) };
        let quantile = |q: f64| magnitudes[(q * last as f64).round() as usize];
        let step = 0.8 / (THRESHOLDS - 1) as f64;
        let highest = quantile(0.9);
        let mut candidates: Vec<f32> = (0..THRESHOLDS)
            .map(|i| quantile(0.1 + step * i as f64))
            .filter(|p1| p1 * ratio <= highest)
            .collect();
        candidates.dedup();
        if candidates.is_empty() {
            return (quantile(0.1), highest);
        }
        let errors = self.sum_rows(candidates.len(), |weights, mask, sums| {
            let mut sorted = Sorted::default();
            let kept = (0..weights.len()).filter(|c| rest(c, mask));
            sorted.fill(kept.map(|c| (weights[c].abs(), importance[c])));
            for (sum, p1) in sums.iter_mut().zip(&candidates) {
                *sum += sorted.trisection_error(*p1, p1 * ratio);
            }
        });
        let best = (0..candidates.len()).min_by(|a, b| errors[*a].total_cmp(&errors[*b]));
        let p1 = best.map_or(0.0, |i| candidates[i]);
        (p1, p1 * ratio)
    }
}

/// Writes states, signs and scales of a block; returns W − Q, [rows, width].
fn binarise(
    block: &Block<'_>,
    regions: &Regions,
    index: usize,
    blocks: usize,
    parts: &mut StbllmParts,
) -> Vec<f32> {
    let (cols, from, width) = (block.cols, block.from, block.width);
    let mut errors = vec![0.0; parts.rows * width];
    parts
        .states
        .par_chunks_exact_mut(cols)
        .zip(parts.negative.par_chunks_exact_mut(cols))
        .zip(parts.scales.par_chunks_exact_mut(blocks * 5))
        .zip(errors.par_chunks_exact_mut(width))
        .enumerate()
        .for_each(|(r, (((states, negative), scales), errors))| {
            let part = r * cols + from..r * cols + from + width;
            let row = Row { weights: &block.weights[part.clone()], mask: &block.mask[part] };
            let part = from..from + width;
            let scales = &mut scales[index * 5..index * 5 + 5];
            let negative = &mut negative[part.clone()];
            row.binarise(regions, &mut states[part], negative, scales, errors);
        });
    errors
}

struct Row<'a> {
    weights: &'a [f32],
    mask: &'a [bool],
}

impl Row<'_> {
    fn binarise(
        &self,
        regions: &Regions,
        states: &mut [u8],
        negative: &mut [bool],
        scales: &mut [f16],
        errors: &mut [f32],
    ) {
        let w = self.weights;
        // Regions 0 to 2 and, as 3, the salient set.
        let region = |c: usize| match (regions.salient[c], w[c].abs()) {
            (true, _) => 3,
            (false, a) if a < regions.p1 => 0,
            (false, a) if a < regions.p2 => 1,
            (false, _) => 2,
        };
        let kept: Vec<usize> = (0..w.len()).filter(|c| self.mask[*c]).collect();
        let mean = |values: &mut dyn Iterator<Item = f32>| {
            let (n, sum) = values.fold((0, 0f64), |(n, sum), v| (n + 1, sum + f64::from(v)));
            f16::from_f64(if n > 0 { sum / f64::from(n) } else { 0.0 })
        };
        for set in 0..4 {
            let part = kept.iter().filter(|c| region(**c) == set);
            scales[set] = mean(&mut part.map(|c| w[*c].abs()));
        }
        let first = scales[3].to_f32();
        let residual = |c: usize| w[c] - if w[c] < 0.0 { -first } else { first };
        let salient = kept.iter().filter(|c| regions.salient[**c]);
        scales[4] = mean(&mut salient.map(|c| residual(*c).abs()));
        let second = scales[4].to_f32();

        errors.copy_from_slice(w);
        for c in kept {
            negative[c] = w[c] < 0.0;
            let (state, value) = match region(c) {
                3 if residual(c) < 0.0 => (2, -second),
                3 => (1, second),
                set => (set as u8 + 1, 0.0),
            };
            states[c] = state;
            let scale = scales[region(c)].to_f32();
            errors[c] -= if negative[c] { -scale } else { scale } + value;
        }
    }
}
