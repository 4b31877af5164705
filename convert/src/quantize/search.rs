//! The searches of a block (paper algorithms 1 and 2): the number of salient columns, and the thresholds that split the
//! magnitudes of the other weights into regions.

use rayon::prelude::*;
use stb_kernels::Isa;

use super::binarize_error::{
    MaskedRow, ThresholdGrid, Values, add_salient_errors, add_threshold_errors,
};
use super::binarize_error_means::{Sorted, binary_error, residual_error};
use super::quantiles::quantiles;
use super::search_error::SearchError;
use crate::products::TASK_ROWS;

/// How the columns of a block are ranked; the first ones are salient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Salient {
    /// By Σ w²/d² over the rows.
    Hessian,
    /// By Σ |w|.
    Magnitude,
    /// No column is salient.
    Off,
}

/// The regions of the weights that are not salient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partition {
    /// Three; the upper threshold is a fixed multiple of the lower (paper §3.4).
    Trisection,
    /// Two: the bell-shaped split of BiLLM.
    Bell,
    /// Three; tries all pairs of thresholds.
    Exhaustive,
    /// One.
    None,
}

/// The values whose quantiles are the candidate thresholds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantiles {
    /// The weights of the regions.
    Members,
    /// All weights of the block, with zeros for pruned weights and salient columns (published code).
    Block,
}

/// Options of the searches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SearchOptions {
    /// The error that candidates are compared by.
    pub error: SearchError,
    /// The ranking of columns.
    pub salient: Salient,
    /// The largest number of salient columns of a block, plus one.
    pub salient_limit: usize,
    /// The regions.
    pub partition: Partition,
    /// Upper threshold divided by the lower, for [`Partition::Trisection`].
    pub region_ratio: f32,
    /// The values whose quantiles are candidate thresholds.
    pub quantiles: Quantiles,
    /// Whether binarization subtracts means while candidates are compared.
    pub means: bool,
}

/// Thresholds tried for three regions: quantiles from 10 % to 90 %.
const THRESHOLDS: usize = 160;
/// Thresholds tried for two regions (BiLLM).
const BELL_THRESHOLDS: usize = 81;
/// The range of quantiles of candidate thresholds.
const LOWEST: f64 = 0.1;
const HIGHEST: f64 = 0.9;

/// The regions of one block, the same for all rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Regions {
    /// Whether each column of the block is salient.
    pub salient: Vec<bool>,
    /// Ascending thresholds between regions (none, one or two), in the values of the [`SearchError`].
    pub thresholds: Vec<f64>,
}

impl Regions {
    /// The region, from 0, of a value in a column that is not salient.
    #[must_use]
    pub fn of(&self, value: f32) -> usize {
        self.thresholds.iter().filter(|p| f64::from(value.abs()) >= **p).count()
    }
}

/// A block of columns with all rows.
#[derive(Clone, Copy, Debug)]
pub struct SearchBlock<'a> {
    /// The instruction set of the searches; results do not depend on it.
    pub isa: Isa,
    /// Weights of the whole matrix, [rows, cols].
    pub weights: &'a [f32],
    /// Whether each weight is kept, [rows, cols].
    pub mask: &'a [bool],
    /// 1/d² per column of the matrix.
    pub importance: &'a [f32],
    /// Columns of the matrix.
    pub cols: usize,
    /// First column of the block.
    pub from: usize,
    /// Columns of the block.
    pub width: usize,
}

impl SearchBlock<'_> {
    /// The weights and the mask of the block in each row of a task.
    fn rows(&self, task: usize) -> impl Iterator<Item = MaskedRow<'_>> {
        let part = self.from..self.from + self.width;
        let span = TASK_ROWS * self.cols;
        let end = self.weights.len().min((task + 1) * span);
        let weights = self.weights[task * span..end].chunks_exact(self.cols);
        let mask = self.mask[task * span..end].chunks_exact(self.cols);
        weights.zip(mask).map(move |(w, m)| (&w[part.clone()], &m[part.clone()]))
    }

    fn tasks(&self) -> usize {
        self.weights.len().div_ceil(TASK_ROWS * self.cols)
    }

    /// 1/d² of the columns of the block.
    #[must_use]
    pub fn importance(&self) -> &[f32] {
        &self.importance[self.from..self.from + self.width]
    }

    /// Sums the costs that `cost` adds for the rows of each task, in an order that does not depend on threads.
    fn sum_tasks(&self, count: usize, cost: impl Fn(usize, &mut [f64]) + Sync) -> Vec<f64> {
        let part = |task: usize| {
            let mut sums = vec![0.0; count];
            self.isa.compiled(
                #[inline(always)]
                || cost(task, &mut sums),
            );
            sums
        };
        let parts: Vec<Vec<f64>> = (0..self.tasks()).into_par_iter().map(part).collect();
        let mut total = vec![0.0; count];
        for sums in parts {
            total.iter_mut().zip(sums).for_each(|(t, s)| *t += s);
        }
        total
    }

    /// [`SearchBlock::sum_tasks`] with a cost function for single rows.
    fn sum_rows(
        &self,
        count: usize,
        cost: impl Fn(&[f32], &[bool], &mut [f64]) + Sync,
    ) -> Vec<f64> {
        self.sum_tasks(
            count,
            #[inline(always)]
            |task, sums| self.rows(task).for_each(|(weights, mask)| cost(weights, mask, sums)),
        )
    }

    /// Finds the salient columns, then the thresholds, each with the least error.
    #[must_use]
    pub fn search(&self, options: &SearchOptions) -> Regions {
        let salient = self.salient_columns(options);
        let thresholds = self.thresholds(options, &salient);
        Regions { salient, thresholds }
    }

    /// Chooses the number of salient columns, in ranked order, with the least error of binarizing both sets twice.
    /// Only salient columns are stored with two binarizations, but comparing with that would always choose the limit.
    fn salient_columns(&self, options: &SearchOptions) -> Vec<bool> {
        let mut salient = vec![false; self.width];
        if options.salient == Salient::Off {
            return salient;
        }
        let importance = self.importance();
        let scores = self.sum_rows(
            self.width,
            #[inline(always)]
            |weights, mask, sums| {
                let columns = sums.iter_mut().zip(weights).zip(mask).zip(importance);
                for (((sum, w), kept), importance) in columns {
                    let score = match options.salient {
                        Salient::Magnitude => w.abs(),
                        _ => w * w * importance,
                    };
                    *sum += if *kept { f64::from(score) } else { 0.0 };
                }
            },
        );
        let mut ranked: Vec<usize> = (0..self.width).collect();
        ranked.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        let counts = options.salient_limit.min(self.width).saturating_sub(1);
        let errors = if options.means {
            self.salient_errors(options, &ranked, counts)
        } else {
            let values = Values { error: options.error, importance };
            self.sum_tasks(
                counts,
                #[inline(always)]
                |task, sums| add_salient_errors(self.rows(task), &ranked, &values, sums),
            )
        };
        let best = (0..counts).min_by(|a, b| errors[*a].total_cmp(&errors[*b]));
        for c in ranked.iter().take(best.map_or(0, |k| k + 1)) {
            salient[*c] = true;
        }
        salient
    }

    /// The error of binarizing both sets twice, with means, for each number of salient columns.
    fn salient_errors(&self, options: &SearchOptions, ranked: &[usize], counts: usize) -> Vec<f64> {
        let importance = self.importance();
        self.sum_rows(counts, |weights, mask, sums| {
            let pair = |c: usize| options.error.value(weights[c], importance[c]);
            let mut all = Sorted::default();
            all.fill((0..weights.len()).filter(|c| mask[*c]).map(pair));
            let mut chosen = Vec::with_capacity(counts);
            let mut error = 0.0;
            for (k, sum) in sums.iter_mut().enumerate() {
                if mask[ranked[k]] || k == 0 {
                    if mask[ranked[k]] {
                        chosen.push(pair(ranked[k]));
                    }
                    error = residual_error(&chosen[..]) + residual_error(&all.without(&chosen));
                }
                *sum += error;
            }
        })
    }

    /// The thresholds of the regions with the least error over kept, non-salient weights.
    fn thresholds(&self, options: &SearchOptions, salient: &[bool]) -> Vec<f64> {
        let grid = match options.partition {
            Partition::None => return Vec::new(),
            Partition::Bell => BELL_THRESHOLDS,
            Partition::Trisection | Partition::Exhaustive => THRESHOLDS,
        };
        let step = (HIGHEST - LOWEST) / (grid - 1) as f64;
        let mut at: Vec<f64> = (0..grid).map(|i| LOWEST + step * i as f64).collect();
        at.push(HIGHEST);
        let Some(mut points) = quantiles(&self.magnitudes(options, salient), &at) else {
            return vec![0.0; if options.partition == Partition::Bell { 1 } else { 2 }];
        };
        let (lowest, highest) = (points[0], points[grid]);
        points.truncate(grid);
        points.dedup();
        let ratio = f64::from(options.region_ratio);
        let candidates: Vec<Vec<f64>> = match options.partition {
            Partition::Bell => points.iter().map(|p| vec![*p]).collect(),
            Partition::Exhaustive => {
                let pairs = |(i, p1): (usize, &f64)| {
                    let p1 = *p1;
                    points[i + 1..].iter().map(move |p2| vec![p1, *p2]).collect::<Vec<_>>()
                };
                points.iter().enumerate().flat_map(pairs).collect()
            }
            _ => {
                let pairs = points.iter().map(|p| vec![*p, p * ratio]);
                pairs.filter(|pair| pair[1] <= highest).collect()
            }
        };
        let best = self.best_thresholds(options, salient, &candidates);
        best.unwrap_or_else(|| vec![lowest, highest])
    }

    /// The magnitudes whose quantiles are candidate thresholds, by task.
    fn magnitudes(&self, options: &SearchOptions, salient: &[bool]) -> Vec<Vec<f32>> {
        let importance = self.importance();
        let whole = options.quantiles == Quantiles::Block;
        let task_magnitudes = |task: usize| {
            let mut magnitudes = Vec::with_capacity(TASK_ROWS * self.width);
            for (weights, mask) in self.rows(task) {
                for c in 0..weights.len() {
                    if mask[c] && !salient[c] {
                        magnitudes.push(options.error.value(weights[c], importance[c]).0.abs());
                    } else if whole {
                        magnitudes.push(0.0);
                    }
                }
            }
            magnitudes
        };
        (0..self.tasks()).into_par_iter().map(task_magnitudes).collect()
    }

    /// The first of the candidates with the least error.
    fn best_thresholds(
        &self,
        options: &SearchOptions,
        salient: &[bool],
        candidates: &[Vec<f64>],
    ) -> Option<Vec<f64>> {
        let errors = if options.means {
            self.threshold_errors(options, salient, candidates)
        } else {
            let values = Values { error: options.error, importance: self.importance() };
            let columns: Vec<usize> = (0..self.width).filter(|c| !salient[*c]).collect();
            let grid = ThresholdGrid::new(candidates);
            self.sum_tasks(
                candidates.len(),
                #[inline(always)]
                |task, sums| add_threshold_errors(self.rows(task), &columns, &values, &grid, sums),
            )
        };
        let best = (0..candidates.len()).min_by(|a, b| errors[*a].total_cmp(&errors[*b]))?;
        candidates.get(best).cloned()
    }

    /// The error of binarizing the regions between thresholds, with means, for each candidate.
    fn threshold_errors(
        &self,
        options: &SearchOptions,
        salient: &[bool],
        candidates: &[Vec<f64>],
    ) -> Vec<f64> {
        let importance = self.importance();
        self.sum_rows(candidates.len(), |weights, mask, sums| {
            let pair = |c: usize| options.error.value(weights[c], importance[c]);
            let mut sorted = Sorted::default();
            let members = (0..weights.len()).filter(|c| mask[*c] && !salient[*c]);
            sorted.fill(members.map(pair));
            let error = |p1: f64, p2: f64| binary_error(&sorted.band(p1, p2));
            // Candidates are ordered by their lower threshold: many share the lowest region.
            let mut lowest = (f64::NAN, 0.0);
            for (sum, thresholds) in sums.iter_mut().zip(candidates) {
                let (first, last) = (thresholds[0], thresholds[thresholds.len() - 1]);
                if first != lowest.0 {
                    lowest = (first, error(0.0, first));
                }
                let middle = if first < last { error(first, last) } else { 0.0 };
                *sum += lowest.1 + middle + error(last, f64::INFINITY);
            }
        })
    }
}
