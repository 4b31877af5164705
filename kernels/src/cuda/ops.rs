//! Operations between products that the products do not have built in.

use bytemuck::{Pod, Zeroable};

use super::Result;
use super::compile::Module;
use super::device::{Buffer, Device};
use super::gemv::Input;
use super::launch::{Launch, to_u32};

const THREADS: u32 = 256;

/// `Materialize` of ops.cu.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
struct Params {
    x: u64,
    with: u64,
    out: u64,
    cols: u32,
    source: u32,
    eps: f32,
    padding: u32,
}

/// Writes the activations that `input` (of addresses) stands for to `out`, [tokens, cols]: for products
/// that do not compute them themselves.
///
/// # Errors
/// [`super::Error::Unsupported`] for sizes beyond what kernels count to.
///
/// # Panics
/// For [`Input::Plain`], which needs no operation.
pub fn plan_materialize(input: Input<u64>, out: u64, cols: usize, tokens: usize) -> Result<Launch> {
    let (x, with, source, eps) = input.fields();
    assert_ne!(source, 0, "plain activations are there already");
    let cols = to_u32("a matrix with columns", cols)?;
    let params = Params { x, with, out, cols, source, eps, padding: 0 };
    Ok(Launch::new(Module::OPS, "materialize", [tokens, 1, 1], THREADS, 0, &params))
}

/// These operations on one device.
#[derive(Clone, Debug)]
pub struct Ops {
    device: Device,
}

impl Ops {
    /// On `device`.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone() }
    }

    /// Queues writing the activations that `input` stands for to `out`, [tokens, cols].
    ///
    /// # Errors
    /// [`super::Error::Driver`].
    ///
    /// # Panics
    /// If a buffer is too small, or for [`Input::Plain`].
    pub fn materialize(
        &self,
        input: Input<&Buffer<f32>>,
        out: &mut Buffer<f32>,
        cols: usize,
        tokens: usize,
    ) -> Result<()> {
        input.check(cols, tokens);
        assert!(out.len() >= tokens * cols, "room for the activations");
        let launch = plan_materialize(input.addresses(), out.address(), cols, tokens)?;
        // SAFETY: all buffers have room for the tokens, as checked.
        unsafe { self.device.launch(&launch) }
    }
}
