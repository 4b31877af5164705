//! Limits of the memory that a conversion needs.

/// Sequences that run through a layer together, one per thread at a time.
pub(crate) const BATCH: usize = 8;

/// Inputs of a linear layer up to this size (bytes of all calibration sequences) are kept until the layer is
/// quantized; larger inputs are computed again.
pub(crate) const KEPT_BYTES: usize = 1 << 30;
