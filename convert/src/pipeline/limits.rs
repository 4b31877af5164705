//! How much a conversion has in memory at once.

/// Sequences that run through a layer together: threads take whole sequences.
pub(crate) const BATCH: usize = 8;

/// Inputs of linear layers up to this size (bytes of all calibration sequences) are kept until those
/// layers are quantized; larger ones are computed anew.
pub(crate) const KEPT_BYTES: usize = 1 << 30;
