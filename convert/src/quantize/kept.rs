//! The number of weights of each group of 8 that the decoder layers keep.

use super::metric::Metric;

/// How N of N:8 is allocated to the decoder layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// The same N everywhere.
    Uniform,
    /// More for layers with more outliers among their weights; the mean is exactly N.
    Outlier,
    /// The paper's §3.3: N_i/M = α_i + (1 − α_i)·N/M, rounded, where α_i is the share of the layer in the sum of
    /// the norms of all layers. The mean is above N.
    Paper,
    /// The rule of the published code: like `Outlier`, but rounded as OWL's code does and with
    /// offsets of 1 raised to 2. The mean is not N.
    PublishedCode,
    /// More in the first half of the model, fewer in the second: one period of a sine with
    /// amplitude 1; the mean is exactly N.
    Sine,
}

/// The number of weights that a method keeps, and its allocation to the decoder layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptByLayer {
    /// N of N:8, before allocation.
    pub n: u8,
    /// How N is allocated.
    pub allocation: Allocation,
    /// The score that defines outliers.
    pub metric: Metric,
}
