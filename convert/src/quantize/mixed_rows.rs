//! Tables whose most important rows are stored a second time with more bits.
//!
//! A few frequent tokens carry most of the loss of an lm_head: in SmolLM2-135M at 3 bits, 1 % of the rows carry 45 % of
//! it. Integers of more bits for these rows cost few bytes.

use stb_format::Encoding;
use stb_format::encoding::{CoarseRows, MixedRows, MixedRowsParts};
use stb_runtime::Result;

use super::int_group::IntOptions;
use super::nm::NmOptions;
use super::quantizer::{Input, LinearQuantizer, Packed, Pruned};
use super::trellis::TrellisOptions;

/// The method of all rows of a mixed matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum CoarseOptions {
    /// Integers.
    Int(IntOptions),
    /// The N:M sparse-sign encoding.
    Nm(NmOptions),
    /// The trellis encoding.
    Trellis(TrellisOptions),
}

impl CoarseOptions {
    fn quantizer(&self) -> &dyn LinearQuantizer {
        match self {
            Self::Int(options) => options,
            Self::Nm(options) => options,
            Self::Trellis(options) => options,
        }
    }

    fn rows(&self) -> CoarseRows {
        match self {
            Self::Int(options) => CoarseRows::IntGroup(options.spec),
            Self::Nm(options) => CoarseRows::Nm(options.spec),
            Self::Trellis(options) => CoarseRows::Trellis(options.spec),
        }
    }
}

/// One method for all rows, and integers for the rows that matter most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixedRowsOptions {
    spec: MixedRows,
    fine: IntOptions,
    coarse: CoarseOptions,
}

impl MixedRowsOptions {
    /// `count` rows as `fine`, and all rows as `coarse`. `None` if the format has no such combination.
    #[must_use]
    pub fn new(count: u32, fine: IntOptions, coarse: CoarseOptions) -> Option<Self> {
        Some(Self { spec: MixedRows::new(count, fine.spec, coarse.rows())?, fine, coarse })
    }

    /// Quantizes `weights`, [rows, cols], with `quantize`, which is called for each part with its weights and quantizer.
    /// `losses`, `[rows]`, ranks the rows.
    ///
    /// # Errors
    /// Those of `quantize`.
    pub(crate) fn quantize_ranked<E>(
        &self,
        weights: &[f32],
        cols: usize,
        losses: &[f64],
        mut quantize: impl FnMut(&[f32], &dyn LinearQuantizer) -> std::result::Result<Packed, E>,
    ) -> std::result::Result<Packed, E> {
        let mut ranked: Vec<u32> = (0..losses.len() as u32).collect();
        ranked.sort_by(|a, b| losses[*b as usize].total_cmp(&losses[*a as usize]).then(a.cmp(b)));
        ranked.truncate(self.spec.count() as usize);
        ranked.sort_unstable();
        let row = |r: &u32| &weights[*r as usize * cols..][..cols];
        let listed: Vec<f32> = ranked.iter().flat_map(row).copied().collect();
        let coarse = quantize(weights, self.coarse.quantizer())?;
        let fine = quantize(&listed, &self.fine)?;
        let mut seconds = coarse.seconds;
        seconds.add(&fine.seconds);
        let (fine, coarse) = (fine.payload, coarse.payload);
        let payload = MixedRowsParts { spec: self.spec, listed: ranked, fine, coarse }.pack();
        Ok(Packed { encoding: self.encoding(), payload, salient: None, seconds })
    }
}

impl LinearQuantizer for MixedRowsOptions {
    fn encoding(&self) -> Encoding {
        Encoding::MixedRows(self.spec)
    }

    /// The weights of the listed rows, which are quantized after all rows.
    fn scratch_memory(&self, cols: u64) -> u64 {
        let parts = [self.fine.scratch_memory(cols), self.coarse.quantizer().scratch_memory(cols)];
        u64::from(self.spec.count()) * cols * 4 + parts[0].max(parts[1])
    }

    fn distill_memory(&self, rows: u64, cols: u64) -> u64 {
        let fine = self.fine.distill_memory(u64::from(self.spec.count()), cols);
        fine + self.coarse.quantizer().distill_memory(rows, cols)
    }

    /// Ranks the rows by their squared outputs.
    fn quantize(&self, input: &Input<'_>, _: Option<&Pruned>) -> Result<Packed> {
        let losses = input.compute.output_errors(input.weights, input.hessian)?;
        self.quantize_ranked(input.weights, input.cols, &losses, |weights, quantizer| {
            let rows = weights.len() / input.cols;
            quantizer.quantize(&Input { weights, rows, ..*input }, None)
        })
    }
}
