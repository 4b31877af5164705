//! The two sublayers of a decoder layer.

use stb_format::arch::{Linear, LinearInput, NormSite};

/// One of the two sublayers of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sublayer {
    /// Norm, q, k and v, attention, o, residual sum.
    Attention,
    /// Norm, gate and up, activation, down, residual sum.
    Mlp,
}

impl Sublayer {
    /// The sublayer that reads `input`.
    #[must_use]
    pub fn of(input: LinearInput) -> Self {
        match input {
            LinearInput::Qkv | LinearInput::AttentionOutput => Self::Attention,
            LinearInput::GateUp | LinearInput::Down => Self::Mlp,
        }
    }

    /// The sublayer of a norm. The final norm of a model is assigned to the MLP.
    pub(crate) fn of_norm(site: NormSite) -> Self {
        match site {
            NormSite::Attention | NormSite::AttentionOutput | NormSite::Query | NormSite::Key => {
                Self::Attention
            }
            NormSite::Mlp | NormSite::MlpOutput | NormSite::Final => Self::Mlp,
        }
    }

    /// The linear layer that adds its output to the residual stream.
    #[must_use]
    pub fn last_linear(self) -> Linear {
        match self {
            Self::Attention => Linear::O,
            Self::Mlp => Linear::Down,
        }
    }
}
