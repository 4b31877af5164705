//! [`BlockOps`] on the CPU.

use std::convert::Infallible;
use std::ops::ControlFlow;

use stb_format::arch::LinearInput;
use stb_kernels::{Isa, Pool, ops};

use crate::block::{AttentionBuffers, BlockInput, BlockOps, Flow};
use crate::kv_cache::QkvRows;
use crate::linear::{LinearScratch, apply};
use crate::rope::RopeAngles;
use crate::weights::Weight;

/// Elementwise operations on at most this many values run on one thread.
pub(crate) const MIN_PARALLEL_ELEMENTS: usize = 1 << 15;
/// Values per task of elementwise operations.
const CHUNK: usize = 1 << 14;

/// Observes the inputs of linear layers. Calibration collects its statistics this way.
pub trait Observer {
    /// Called with each input `x`, [tokens, in features], before the linear layers that read it.
    /// `Break` stops before these linear layers run; the residual stream stays unchanged.
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()>;
}

/// Ignores all inputs.
impl Observer for () {
    fn observe(&mut self, _: LinearInput, _: &[f32]) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// The operations of a decoder layer on the CPU. `attend` appends keys and values to the KV cache and
/// computes attention.
pub(crate) struct CpuOps<'a, A> {
    pub isa: Isa,
    pub pool: &'a Pool,
    /// The ε of the norms.
    pub eps: f32,
    pub angles: &'a RopeAngles,
    pub attend: A,
    pub scratch: &'a mut CpuScratch,
    pub observer: &'a mut dyn Observer,
}

/// Reusable buffers for the inputs and outputs of linear layers.
#[derive(Debug, Default)]
pub(crate) struct CpuScratch {
    pub linear: LinearScratch,
    /// The output of a norm, [tokens, hidden].
    normed: Vec<f32>,
    /// The output of a sublayer before it is added to the residual stream, [tokens, hidden].
    out: Vec<f32>,
}

impl CpuScratch {
    /// With `q8`, linear layers may quantize their activations to 8 bits.
    pub(crate) fn new(q8: bool) -> Self {
        Self { linear: LinearScratch::new(q8), ..Self::default() }
    }
}

impl<A: FnMut(QkvRows<'_>)> BlockOps for CpuOps<'_, A> {
    type Matrix = Weight;
    type Vector = Vec<f32>;
    type Buffer = Vec<f32>;
    type Residual = [f32];
    type Error = Infallible;

    fn linear<const N: usize>(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>,
        matrices: [&Weight; N],
        out: [&mut Vec<f32>; N],
    ) -> Flow<Infallible> {
        let CpuScratch { linear, normed, .. } = &mut *self.scratch;
        let x = compute_input(self.isa, self.pool, self.eps, x, normed);
        if self.observer.observe(input, x).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        apply(self.isa, self.pool, linear, matrices, x, out);
        Ok(ControlFlow::Continue(()))
    }

    fn linear_residual(
        &mut self,
        input: LinearInput,
        x: BlockInput<'_, Vec<f32>, Vec<f32>, [f32]>,
        matrix: &Weight,
        residual: &mut [f32],
    ) -> Flow<Infallible> {
        let CpuScratch { linear, normed, out } = &mut *self.scratch;
        let x = compute_input(self.isa, self.pool, self.eps, x, normed);
        if self.observer.observe(input, x).is_break() {
            return Ok(ControlFlow::Break(()));
        }
        apply(self.isa, self.pool, linear, [matrix], x, [out]);
        add(self.pool, residual, out);
        Ok(ControlFlow::Continue(()))
    }

    fn attend(&mut self, x: AttentionBuffers<'_, Vec<f32>>) -> Result<(), Infallible> {
        let AttentionBuffers { q, k, v, attn_out } = x;
        let tokens = self.angles.tokens().max(1);
        for heads in [&mut *q, &mut *k] {
            let width = heads.len() / tokens;
            self.angles.rotate(self.pool, heads, width);
        }
        attn_out.resize(q.len(), 0.0);
        (self.attend)(QkvRows { q, k, v, out: attn_out });
        Ok(())
    }
}

/// Computes the activations that a linear layer reads: a norm into `normed`, the product of gate and
/// up in place.
fn compute_input<'x>(
    isa: Isa,
    pool: &Pool,
    eps: f32,
    x: BlockInput<'x, Vec<f32>, Vec<f32>, [f32]>,
    normed: &'x mut Vec<f32>,
) -> &'x [f32] {
    match x {
        BlockInput::Plain(x) => x,
        BlockInput::Norm { x, weight } => {
            norm_rows(isa, pool, x, weight, eps, normed);
            normed
        }
        BlockInput::Gated { gate, up } => {
            pool.or_serial(gate.len() > MIN_PARALLEL_ELEMENTS).run_chunks(
                gate,
                CHUNK,
                |first, gate| {
                    ops::silu_mul(isa, gate, &up[first..first + gate.len()]);
                },
            );
            gate
        }
    }
}

/// RMSNorm of each row of `x`, [tokens, hidden], into `out`.
pub(crate) fn norm_rows(
    isa: Isa,
    pool: &Pool,
    x: &[f32],
    weight: &[f32],
    eps: f32,
    out: &mut Vec<f32>,
) {
    out.resize(x.len(), 0.0);
    pool.or_serial(x.len() > MIN_PARALLEL_ELEMENTS).run_chunks(out, weight.len(), |first, out| {
        ops::rms_norm(isa, &x[first..first + out.len()], weight, eps, out);
    });
}

/// `x += y`.
pub(crate) fn add(pool: &Pool, x: &mut [f32], y: &[f32]) {
    pool.or_serial(x.len() > MIN_PARALLEL_ELEMENTS).run_chunks(x, CHUNK, |first, x| {
        for (x, y) in x.iter_mut().zip(&y[first..]) {
            *x += y;
        }
    });
}
