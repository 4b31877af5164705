//! The list of methods for linear layers.

use super::int_group::{IntOptions, fit_group};
use super::mixed_rows::{CoarseOptions, MixedRowsOptions};
use super::nm::NmOptions;
use super::pb_llm::PbLlmOptions;
use super::quantizer::LinearQuantizer;
use super::stbllm::StbllmOptions;
use super::trellis::TrellisOptions;

/// A quantizer for linear layers with its options.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Structured binarization: STBLLM, BiLLM and variants.
    Stbllm(StbllmOptions),
    /// The N:M sparse-sign encoding.
    Nm(NmOptions),
    /// Integers: GPTQ and rounding.
    Int(IntOptions),
    /// Partial binarization.
    PbLlm(PbLlmOptions),
    /// The trellis encoding.
    Trellis(TrellisOptions),
    /// More bits for the rows that matter most.
    MixedRows(MixedRowsOptions),
}

impl Method {
    /// The quantizer with its options.
    #[must_use]
    pub fn quantizer(&self) -> &dyn LinearQuantizer {
        match self {
            Self::Stbllm(options) => options,
            Self::Nm(options) => options,
            Self::Int(options) => options,
            Self::PbLlm(options) => options,
            Self::Trellis(options) => options,
            Self::MixedRows(options) => options,
        }
    }

    /// The quantizer, to change options that methods share.
    pub fn quantizer_mut(&mut self) -> &mut dyn LinearQuantizer {
        match self {
            Self::Stbllm(options) => options,
            Self::Nm(options) => options,
            Self::Int(options) => options,
            Self::PbLlm(options) => options,
            Self::Trellis(options) => options,
            Self::MixedRows(options) => options,
        }
    }

    /// This method as that of all rows of a matrix with mixed rows; `None` if the format does not have it.
    pub(crate) fn coarse(self) -> Option<CoarseOptions> {
        match self {
            Self::Int(options) => Some(CoarseOptions::Int(options)),
            Self::Nm(options) => Some(CoarseOptions::Nm(options)),
            Self::Trellis(options) => Some(CoarseOptions::Trellis(options)),
            _ => None,
        }
    }

    /// The candidate methods of a budget for a matrix of `cols` columns, whose trellis codes have column factors or not.
    pub(crate) fn candidates(cols: usize, col_factors: bool) -> impl Iterator<Item = Self> {
        let integers = IntOptions::candidates(cols).map(Self::Int);
        let nm = NmOptions::candidates().map(Self::Nm);
        let trellis = TrellisOptions::candidates(col_factors).map(Self::Trellis);
        integers.chain(nm).chain(trellis)
    }

    /// Whether column factors lower the loss of trellis codes of a matrix with `rows` rows by more than the bits that they
    /// take would at a higher rate, where a bit per weight divides the loss by 4. `loss` measures a method.
    pub(crate) fn wants_col_factors<E>(
        rows: usize,
        mut loss: impl FnMut(Self) -> Result<f64, E>,
    ) -> Result<bool, E> {
        let Some([plain, factors]) = TrellisOptions::with_and_without_col_factors() else {
            return Ok(false);
        };
        let bits = 16.0 / rows.max(1) as f64;
        Ok(loss(Self::Trellis(factors))? < loss(Self::Trellis(plain))? * 0.25f64.powf(bits))
    }

    /// This method for estimates of its error. The rounds after the first search for trellis codes take two thirds of the
    /// time; estimates leave them out, as if they lowered the error of all rates by the same share.
    pub(crate) fn for_estimates(self) -> Self {
        match self {
            Self::Trellis(options) => Self::Trellis(TrellisOptions { sweeps: 0, ..options }),
            other => other,
        }
    }

    /// This method with the group of integers that fits rows of `cols` columns; see [`fit_group`]. Scales of other
    /// methods cover as many columns as there are in the last block of a row.
    #[must_use]
    pub fn fitted(self, cols: usize) -> Self {
        match self {
            Self::Int(options) => {
                Self::Int(IntOptions { spec: fit_group(options.spec, cols), ..options })
            }
            other => other,
        }
    }
}
