//! Structured binarization (paper §3, algorithms 1 and 2) with the options of the paper, its published code, BiLLM and
//! their ablations: an N:8 mask, salient columns with a residual sign, magnitude regions for the rest, and block-wise
//! error compensation.
//!
//! Strict variants without means are stored exactly (spec §6.4): their scales are rounded to binary16 before errors
//! are compensated. No encoding holds the values of the other variants; they are stored as binary16, for comparison of
//! quality only.

use std::time::Instant;

use rayon::prelude::*;
use stb_format::Encoding;
use stb_format::encoding::{Dense, Stbllm, StbllmParts};
use stb_format::half::f16;
use stb_runtime::Result;

use super::compensation::{Compensation, Propagation};
use super::kept::{Allocation, KeptByLayer};
use super::metric::{Metric, Scorer};
use super::prune::{prune_plain, prune_with_compensation};
use super::quantizer::{Input, LinearQuantizer, Packed, Pruned, Seconds};
use super::refit::{self, refit};
use super::search::{Regions, SearchBlock, SearchOptions};

/// Where the N:8 mask is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskPlacement {
    /// In a separate pass that compensates for each removed weight, before binarization.
    Compensated,
    /// In the block loop, on the compensated weights (paper algorithm 1).
    InLoop,
    /// On the original weights, without compensation (published code).
    Before,
}

/// The weights over which an importance metric takes its sums, for masks in the block loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The original matrix.
    Matrix,
    /// The compensated block (paper algorithm 1, line 9).
    Block,
}

/// The order of pruning and binarization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskOrder {
    /// Pruning, then binarization of the kept weights.
    PruneFirst,
    /// Binarization of all weights of a block, then pruning of the result.
    QuantizeFirst,
}

/// Options of structured binarization.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StbllmOptions {
    /// N of N:8 and columns per block.
    pub spec: Stbllm,
    /// How N is allocated to the decoder layers.
    pub allocation: Allocation,
    /// The importance metric of the mask.
    pub metric: Metric,
    /// Where the mask is chosen.
    pub mask: MaskPlacement,
    /// Whether masks that are not chosen in the loop come from a pass over the whole model before the first layer is
    /// binarized (published code), instead of a pass over their own layer.
    pub separate: bool,
    /// The weights over which the metric takes its sums.
    pub scope: Scope,
    /// Whether pruned weights stay zero. In the published code binarization gives them values again.
    pub strict: bool,
    /// The order of pruning and binarization.
    pub order: MaskOrder,
    /// Salient columns and regions.
    pub search: SearchOptions,
    /// Whether binarization subtracts means: one more value per scale.
    pub means: bool,
    /// How errors are compensated.
    pub propagation: Propagation,
    /// Whether scales are refitted at the end, and how often signs and regions are re-chosen, too. Only for
    /// storable options.
    pub sweeps: Option<usize>,
}

impl StbllmOptions {
    /// Whether [`Encoding::Stbllm`] holds the values.
    #[must_use]
    pub fn storable(&self) -> bool {
        self.strict && !self.means
    }
}

impl LinearQuantizer for StbllmOptions {
    fn encoding(&self) -> Encoding {
        if self.storable() { Encoding::Stbllm(self.spec) } else { Encoding::Dense(Dense::F16) }
    }

    fn note(&self) -> Option<String> {
        let note = if !self.strict {
            "pruned weights are forgotten as in the published code: the result is dense, not N:M, \
             and stored as binary16; it is for comparison, its size means nothing"
        } else if self.means {
            "no encoding holds binarized weights with means: they are stored as binary16; \
             the file is for comparison, its size means nothing"
        } else {
            return None;
        };
        Some(note.into())
    }

    fn prunes_first(&self) -> bool {
        self.separate
    }

    fn prune(&self, input: &Input<'_>) -> Result<Option<Pruned>> {
        prune(input, self).map(Some)
    }

    fn nominal_kept(&self) -> Option<usize> {
        self.storable().then(|| self.spec.n())
    }

    fn kept_by_layer(&self) -> Option<KeptByLayer> {
        let n = self.spec.n() as u8;
        Some(KeptByLayer { n, allocation: self.allocation, metric: self.metric })
    }

    fn keep_of_8(&mut self, n: u8) -> bool {
        let spec = Stbllm::new(n, self.spec.block() as u16);
        self.spec = spec.unwrap_or(self.spec);
        spec.is_some()
    }

    fn scratch_memory(&self, cols: u64) -> u64 {
        self.sweeps.map_or(0, |_| refit::memory(cols, self.spec.block() as u64))
    }

    fn quantize(&self, input: &Input<'_>, pruned: Option<&Pruned>) -> Result<Packed> {
        quantize(input, self, pruned)
    }
}

/// A binarized layer; matrices are [rows, cols].
#[derive(Clone, Debug)]
pub struct Binarized {
    /// The binarized weights.
    pub values: Vec<f32>,
    /// 0 pruned; 1, 2, 3 dense, intermediate and sparse region; 4 salient.
    pub regions: Vec<u8>,
    /// Whether each column is salient, `[cols]`.
    pub salient: Vec<bool>,
    /// The layer in its stored form, with scales and signs.
    parts: StbllmParts,
    seconds: Seconds,
}

impl Binarized {
    /// A layer of zeros.
    fn new(spec: Stbllm, rows: usize, cols: usize) -> Self {
        let blocks = cols.div_ceil(spec.block());
        Self {
            values: vec![0.0; rows * cols],
            regions: vec![0; rows * cols],
            salient: vec![false; cols],
            parts: StbllmParts {
                spec,
                rows,
                cols,
                salient: Vec::new(),
                states: vec![0; rows * cols],
                negative: vec![false; rows * cols],
                scales: vec![f16::ZERO; rows * blocks * 5],
            },
            seconds: Seconds::default(),
        }
    }
}

/// Quantizes one linear layer. `pruned` is the result of a separate pruning pass, if there is one.
fn quantize(input: &Input<'_>, options: &StbllmOptions, pruned: Option<&Pruned>) -> Result<Packed> {
    let mut layer = binarize(input, options, pruned, options.storable())?;
    if let Some(sweeps) = options.sweeps.filter(|_| options.storable()) {
        let started = Instant::now();
        refit(input, &mut layer.parts, sweeps)?;
        layer.seconds.refit += started.elapsed().as_secs_f64();
    }
    let started = Instant::now();
    let (encoding, payload) = if options.storable() {
        (Encoding::Stbllm(options.spec), layer.parts.pack())
    } else {
        (Encoding::Dense(Dense::F16), Dense::F16.encode(&layer.values))
    };
    let mut seconds = layer.seconds;
    seconds.pack += started.elapsed().as_secs_f64();
    let salient = layer.salient.iter().filter(|s| **s).count() as f64 / input.cols as f64;
    Ok(Packed { encoding, payload, salient: Some(salient), seconds })
}

/// The pruning pass: masks the weights, and compensates if the options ask for it.
///
/// # Errors
/// [`stb_runtime::Error::Device`].
pub fn prune(input: &Input<'_>, options: &StbllmOptions) -> Result<Pruned> {
    let importance = input.factor.importance();
    let scorer = Scorer::new(options.metric, input.weights, input.norms, &importance);
    let kept = |width: usize| options.spec.kept(width);
    match options.mask {
        MaskPlacement::Compensated => prune_with_compensation(input, &scorer, kept),
        MaskPlacement::Before | MaskPlacement::InLoop => Ok(prune_plain(input, &scorer, kept)),
    }
}

/// Binarizes one linear layer; scales are rounded to binary16 if `rounded`.
///
/// # Errors
/// [`stb_runtime::Error::Device`].
pub fn binarize(
    input: &Input<'_>,
    options: &StbllmOptions,
    pruned: Option<&Pruned>,
    rounded: bool,
) -> Result<Binarized> {
    let (rows, cols, spec) = (input.rows, input.cols, options.spec);
    let mut seconds = Seconds::default();
    let clock = Instant::now();
    let importance = input.factor.importance();
    let (mut weights, mut mask) = match (options.mask, pruned) {
        (MaskPlacement::InLoop, _) => (input.weights.to_vec(), vec![true; rows * cols]),
        (_, Some(pruned)) => (pruned.weights.clone(), pruned.mask.clone()),
        (_, None) => {
            let Pruned { weights, mask } = prune(input, options)?;
            (weights, mask)
        }
    };
    if !options.strict {
        mask.fill(true);
    }
    seconds.prune += clock.elapsed().as_secs_f64();
    let blocks = cols.div_ceil(spec.block());
    let mut out = Binarized::new(spec, rows, cols);
    out.seconds = seconds;
    let whole = (options.scope == Scope::Matrix)
        .then(|| Scorer::new(options.metric, input.weights, input.norms, &importance));
    let mode = options.propagation;
    let mut compensation = Compensation::new(input.compute, &weights, input.factor, mode)?;
    for (index, from) in (0..cols).step_by(spec.block()).enumerate() {
        let clock = Instant::now();
        let width = spec.block().min(cols - from);
        let columns = BlockColumns { index, blocks, cols, from, width };
        if options.mask == MaskPlacement::InLoop && options.order == MaskOrder::PruneFirst {
            let selector = columns.selector(input, options, whole.as_ref(), &weights, &importance);
            columns.select(&selector, spec, &weights, &mut mask);
        }
        let pruning = clock.elapsed().as_secs_f64();
        let isa = input.compute.isa;
        let block = SearchBlock {
            isa,
            weights: &weights,
            mask: &mask,
            importance: &importance,
            cols,
            from,
            width,
        };
        let regions = block.search(&options.search);
        out.salient[from..from + width].copy_from_slice(&regions.salient);
        let searching = clock.elapsed().as_secs_f64();
        columns.binarize(&block, &regions, options, rounded, &mut out);
        if options.order == MaskOrder::QuantizeFirst {
            let selector = columns.selector(input, options, whole.as_ref(), &weights, &importance);
            columns.select(&selector, spec, &out.values, &mut mask);
            columns.remove(&mask, &mut out);
        }
        let errors = columns.errors(&weights, &out.values);
        let binarizing = clock.elapsed().as_secs_f64();
        compensation.spread(&mut weights, &errors, from, width, spec.block())?;
        out.seconds.prune += pruning;
        out.seconds.search += searching - pruning;
        out.seconds.quantize += binarizing - searching;
        out.seconds.propagate += clock.elapsed().as_secs_f64() - binarizing;
    }
    out.parts.salient.clone_from(&out.salient);
    Ok(out)
}

/// A block of columns; `index` of `blocks` locates its scales.
#[derive(Clone, Copy)]
struct BlockColumns {
    index: usize,
    blocks: usize,
    cols: usize,
    from: usize,
    width: usize,
}

/// A metric and the first column of its matrix.
struct Selector<'a> {
    scorer: std::borrow::Cow<'a, Scorer>,
    first: usize,
}

impl BlockColumns {
    /// The metric for a mask in the block loop.
    fn selector<'a>(
        &self,
        input: &Input<'_>,
        options: &StbllmOptions,
        whole: Option<&'a Scorer>,
        weights: &[f32],
        importance: &[f32],
    ) -> Selector<'a> {
        use std::borrow::Cow;
        if let Some(scorer) = whole {
            return Selector { scorer: Cow::Borrowed(scorer), first: 0 };
        }
        let part = self.from..self.from + self.width;
        let block: Vec<f32> =
            weights.chunks_exact(self.cols).flat_map(|row| &row[part.clone()]).copied().collect();
        let (norms, importance) = (&input.norms[part.clone()], &importance[part]);
        let scorer = Scorer::new(options.metric, &block, norms, importance);
        Selector { scorer: Cow::Owned(scorer), first: self.from }
    }

    /// Writes the N:8 mask of the block for `values`, [rows, cols].
    fn select(&self, selector: &Selector<'_>, spec: Stbllm, values: &[f32], mask: &mut [bool]) {
        let end = self.from + self.width;
        let rows = values.par_chunks_exact(self.cols).zip(mask.par_chunks_exact_mut(self.cols));
        rows.enumerate().for_each(|(r, (row, mask))| {
            for group in (self.from..end).step_by(8) {
                let part = group..(group + 8).min(end);
                let (kept, first) = (spec.kept(part.len()), group - selector.first);
                selector.scorer.select(r, first, &row[part.clone()], kept, &mut mask[part]);
            }
        });
    }

    /// Writes values, states, signs and scales of the block.
    fn binarize(
        &self,
        block: &SearchBlock<'_>,
        regions: &Regions,
        options: &StbllmOptions,
        rounded: bool,
        out: &mut Binarized,
    ) {
        let Self { index, blocks, cols, from, width } = *self;
        out.parts
            .states
            .par_chunks_exact_mut(cols)
            .zip(out.parts.negative.par_chunks_exact_mut(cols))
            .zip(out.parts.scales.par_chunks_exact_mut(blocks * 5))
            .zip(out.values.par_chunks_exact_mut(cols))
            .zip(out.regions.par_chunks_exact_mut(cols))
            .enumerate()
            .for_each(|(r, ((((states, negative), scales), values), found))| {
                let part = r * cols + from..r * cols + from + width;
                let (w, mask) = (&block.weights[part.clone()], &block.mask[part]);
                let part = from..from + width;
                let found = &mut found[part.clone()];
                for c in 0..width {
                    let (value, _) = options.search.error.value(w[c], block.importance()[c]);
                    found[c] = match (mask[c], regions.salient[c]) {
                        (false, _) => 0,
                        (true, true) => 4,
                        (true, false) => regions.of(value) as u8 + 1,
                    };
                }
                let mut row = BinarizeRow {
                    weights: w,
                    regions: found,
                    states: &mut states[part.clone()],
                    negative: &mut negative[part.clone()],
                    values: &mut values[part],
                    scales: &mut scales[index * 5..index * 5 + 5],
                };
                row.binarize(options.means, rounded);
            });
    }

    /// Zeroes the weights that the mask does not keep.
    fn remove(&self, mask: &[bool], out: &mut Binarized) {
        let part = self.from..self.from + self.width;
        for (r, mask) in mask.chunks_exact(self.cols).enumerate() {
            for c in part.clone().filter(|c| !mask[*c]) {
                let i = r * self.cols + c;
                out.values[i] = 0.0;
                out.regions[i] = 0;
                out.parts.states[i] = 0;
                out.parts.negative[i] = false;
            }
        }
    }

    /// W − Q of the block, [rows, width].
    fn errors(&self, weights: &[f32], values: &[f32]) -> Vec<f32> {
        let mut errors = vec![0.0; weights.len() / self.cols * self.width];
        errors
            .par_chunks_exact_mut(self.width)
            .zip(weights.par_chunks_exact(self.cols))
            .zip(values.par_chunks_exact(self.cols))
            .for_each(|((errors, weights), values)| {
                let pairs = weights[self.from..].iter().zip(&values[self.from..]);
                errors.iter_mut().zip(pairs).for_each(|(e, (w, q))| *e = w - q);
            });
        errors
    }
}

/// One row of a block.
struct BinarizeRow<'a> {
    weights: &'a [f32],
    /// See [`Binarized::regions`].
    regions: &'a [u8],
    states: &'a mut [u8],
    negative: &'a mut [bool],
    values: &'a mut [f32],
    /// The scales of the three regions, of the salient set and of its residual.
    scales: &'a mut [f16],
}

impl BinarizeRow<'_> {
    fn binarize(&mut self, means: bool, rounded: bool) {
        self.values.fill(0.0);
        for set in 1..=3 {
            self.binarize_set(set, usize::from(set) - 1, means, rounded, |row, c, negative| {
                row.states[c] = set;
                row.negative[c] = negative;
            });
        }
        self.binarize_set(4, 3, means, rounded, |row, c, negative| row.negative[c] = negative);
        self.binarize_set(4, 4, means, rounded, |row, c, negative| {
            row.states[c] = 1 + u8::from(negative);
        });
    }

    /// Binarizes the residual of a set: adds μ ± α to its values (paper equation 1). Calls `set_sign` with each column
    /// and whether its sign is negative.
    fn binarize_set(
        &mut self,
        set: u8,
        scale: usize,
        means: bool,
        rounded: bool,
        set_sign: impl Fn(&mut Self, usize, bool),
    ) {
        let members: Vec<usize> =
            (0..self.weights.len()).filter(|c| self.regions[*c] == set).collect();
        if members.is_empty() {
            return;
        }
        let n = members.len() as f64;
        let rest: Vec<f32> = members.iter().map(|c| self.weights[*c] - self.values[*c]).collect();
        let sum = rest.iter().map(|x| f64::from(*x)).sum::<f64>();
        let mean = if means { (sum / n) as f32 } else { 0.0 };
        let alpha = rest.iter().map(|x| f64::from((x - mean).abs())).sum::<f64>() / n;
        self.scales[scale] = f16::from_f64(alpha);
        let alpha = if rounded { self.scales[scale].to_f32() } else { alpha as f32 };
        for (c, x) in members.into_iter().zip(rest) {
            let negative = x < mean;
            self.values[c] += if negative { mean - alpha } else { mean + alpha };
            set_sign(self, c, negative);
        }
    }
}
