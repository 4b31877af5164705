//! How many weights of each group of 8 the decoder layers keep.

use super::metric::Metric;

/// How N of N:8 is spread over the decoder layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// The same N everywhere.
    Uniform,
    /// More for layers with more outlying weights, the mean exactly N.
    Outlier,
    /// The paper's §3.3: N_i/M = α_i + (1 − α_i)·N/M with α_i the share of the layer in the sum of
    /// the norms of all layers, rounded. The mean is above N.
    Paper,
    /// The rule of the published code: like `Outlier`, but rounded as OWL's code does and with
    /// offsets of 1 raised to 2. The mean is not N.
    PublishedCode,
    /// More in the first half of the model, fewer in the second: one period of a sine with
    /// amplitude 1, the mean exactly N.
    Sine,
}

/// What a method wants to keep in the decoder layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeptByLayer {
    /// N of N:8, before it is spread over the layers.
    pub n: u8,
    /// How it is spread.
    pub allocation: Allocation,
    /// The score by which weights are outlying.
    pub metric: Metric,
}
