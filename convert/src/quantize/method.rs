//! The methods for linear layers: the one list of them.

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
    /// What the method does and costs.
    #[must_use]
    pub fn quantizer(&self) -> &dyn LinearQuantizer {
        match self {
            Self::Stbllm(options) => options,
            Self::Nm(options) => options,
            Self::Int(options) => options,
            Self::PbLlm(options) => options,
        }
    }

    /// The same, to change options that all methods may have.
    pub fn quantizer_mut(&mut self) -> &mut dyn LinearQuantizer {
        match self {
            Self::Stbllm(options) => options,
            Self::Nm(options) => options,
            Self::Int(options) => options,
            Self::PbLlm(options) => options,
        }
    }

    /// The methods that a budget chooses from.
    pub(crate) fn candidates() -> impl Iterator<Item = Self> {
        IntOptions::candidates().map(Self::Int).chain(NmOptions::candidates().map(Self::Nm))
    }
}
