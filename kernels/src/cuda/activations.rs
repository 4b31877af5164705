//! The operations that GEMV kernels fuse into reading their input, as a kernel of their own.

use bytemuck::{Pod, Zeroable};

use super::device::{Buffer, Device};
use super::error::Result;
use super::input::ActivationInput;
use super::launch::{Launch, LaunchShape, to_u32};
use super::module::{Module, module};

/// The module of activations.cu.
pub(super) const MODULE: Module = module!("activations", "activations.cu");

const THREADS: u32 = 256;

/// `ActivationParams` of activations.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct ActivationParams {
    x: u64,
    with: u64,
    out: u64,
    cols: u32,
    input: u32,
    eps: f32,
    padding: u32,
}

/// Plans writing the activations of `input` (addresses) to `out`, [tokens, cols], for products that
/// do not compute them themselves.
///
/// # Errors
/// [`super::Error::Unsupported`] for sizes above 2^30.
///
/// # Panics
/// For [`ActivationInput::Plain`], which needs no operation.
pub fn plan_activations(
    input: ActivationInput<u64>,
    out: u64,
    cols: usize,
    tokens: usize,
) -> Result<Launch> {
    let fields = input.fields();
    assert_ne!(fields.kind, 0, "plain activations need no kernel");
    let params = ActivationParams {
        x: fields.x,
        with: fields.with,
        out,
        cols: to_u32("a matrix with columns", cols)?,
        input: fields.kind,
        eps: fields.eps,
        padding: 0,
    };
    let shape = LaunchShape { blocks: [tokens, 1, 1], threads: THREADS, shared: 0 };
    Ok(Launch::new(MODULE, "compute_activations", shape, &params))
}

/// These operations on one device.
#[derive(Clone, Debug)]
pub struct ActivationOps {
    device: Device,
}

impl ActivationOps {
    /// The operations on `device`.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone() }
    }

    /// Queues writing the activations of `input` to `out`, [tokens, cols].
    ///
    /// # Errors
    /// [`super::Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small, or for [`ActivationInput::Plain`].
    pub fn compute(
        &self,
        input: ActivationInput<&Buffer<f32>>,
        out: &mut Buffer<f32>,
        cols: usize,
        tokens: usize,
    ) -> Result<()> {
        input.check(cols, tokens);
        assert!(out.len() >= tokens * cols, "room for the activations");
        let launch = plan_activations(input.addresses(), out.address(), cols, tokens)?;
        // SAFETY: all buffers have room for the tokens, as checked.
        unsafe { self.device.launch(&launch) }
    }
}
