//! An encoding of a tensor, with its size and its cost.

use stb_runtime::Result;

use crate::plan::{TensorMethod, TensorPlan};

/// A candidate encoding of a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) method: TensorMethod,
    pub(super) bytes: u64,
    /// The expected KL divergence; see [`super::cost`].
    pub(super) error: f64,
}

impl Candidate {
    pub(super) fn new(tensor: &TensorPlan, method: TensorMethod, error: f64) -> Result<Self> {
        let mut copy = tensor.clone();
        copy.set(method)?;
        Ok(Self { method, bytes: copy.bytes, error })
    }
}
