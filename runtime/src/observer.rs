//! Observers of the inputs of linear layers.

use std::ops::ControlFlow;

use stb_format::arch::LinearInput;

/// Observes the inputs of linear layers. Calibration collects its statistics this way.
pub trait Observer {
    /// Called with each input `x`, [tokens, in features], before the linear layers that read it.
    /// `Break` stops before these linear layers run; the residual stream stays unchanged.
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()>;

    /// Called with the input `x`, [its tokens, in features], of linear layers of one expert, before these run.
    fn observe_expert(&mut self, expert: usize, input: LinearInput, x: &[f32]) {
        let _ = (expert, input, x);
    }
}

/// Ignores all inputs.
impl Observer for () {
    fn observe(&mut self, _: LinearInput, _: &[f32]) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}
