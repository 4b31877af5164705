//! The list of methods for linear layers.

use super::int_group::IntOptions;
use super::nm::NmOptions;
use super::pb_llm::PbLlmOptions;
use super::quantizer::LinearQuantizer;
use super::stbllm::StbllmOptions;

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
        }
    }

    /// The quantizer, to change options that methods share.
    pub fn quantizer_mut(&mut self) -> &mut dyn LinearQuantizer {
        match self {
            Self::Stbllm(options) => options,
            Self::Nm(options) => options,
            Self::Int(options) => options,
            Self::PbLlm(options) => options,
        }
    }

    /// The candidate methods of a budget.
    pub(crate) fn candidates() -> impl Iterator<Item = Self> {
        IntOptions::candidates().map(Self::Int).chain(NmOptions::candidates().map(Self::Nm))
    }
}
