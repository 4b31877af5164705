//! What the searches of a block compare.

/// What is binarized, and with which error, while a search compares its candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SearchError {
    /// The weights, each error weighted by 1/d², what it costs after compensation.
    Weighted,
    /// The weights, all errors alike (paper algorithm 2).
    Weights,
    /// The saliencies w²/d² instead of the weights (published code).
    Saliency,
}

impl SearchError {
    /// What is binarized for weight `w` in a column of this importance, and its cost weight.
    #[must_use]
    #[inline(always)]
    pub fn value(self, w: f32, importance: f32) -> (f32, f32) {
        match self {
            Self::Weighted => (w, importance),
            Self::Weights => (w, 1.0),
            Self::Saliency => (w * w * importance, 1.0),
        }
    }
}
