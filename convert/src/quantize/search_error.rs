//! The error that the searches of a block compare.

/// The values that are binarized and the weight of their errors while a search compares its candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SearchError {
    /// Weights; errors are weighted by 1/d², their cost after compensation.
    Weighted,
    /// Weights; errors are not weighted (paper algorithm 2).
    Weights,
    /// Saliencies w²/d² instead of weights; errors are not weighted (published code).
    Saliency,
}

impl SearchError {
    /// The value to binarize for the weight `w` in a column of the given importance, and the weight of its error.
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
