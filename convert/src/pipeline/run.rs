//! The state of a conversion in progress.

use std::ops::ControlFlow;
use std::time::Instant;

use stb_format::Writer;
use stb_format::arch::{InputMap, LinearInput};
use stb_runtime::{Engine, Error, Observer};

use super::job::Job;
use crate::backward::TableStatistics;
use crate::compute::{Accelerator, Compute};
use crate::output::OutputFile;
use crate::plan::TensorPlan;
use crate::quantize::Packed;
use crate::report::{LayerReport, Stages, TensorReport};
use crate::resume::{States, Workspace};

/// A conversion in progress.
pub(super) struct Run<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) engine: Engine,
    pub(super) accelerator: Option<&'a Accelerator>,
    pub(super) writer: Writer<OutputFile>,
    pub(super) workspace: &'a mut Workspace,
    pub(super) reports: Vec<TensorReport>,
    pub(super) layers: Vec<LayerReport>,
    /// Calibration tokens of each expert of the decoder layer in progress.
    pub(super) expert_tokens: Vec<u64>,
    /// Times of the decoder layer in progress, or of the tensors outside the layers.
    pub(super) stages: Stages,
    /// Layers that an interrupted run had finished.
    pub(super) resumed: usize,
    pub(super) tables: TableState,
}

/// The inputs of a decoder layer, [tokens, hidden] for each sequence.
#[derive(Default)]
pub(super) struct Hidden {
    /// After the layers that have been quantized.
    pub(super) quantized: States,
    /// After the same layers, pruned only: for masks from a pruning pass over the whole model.
    pub(super) pruned: States,
    /// After the same layers of the dense model, for targets from the dense model.
    pub(super) dense: States,
    /// The windows on which the file is measured, after the same layers of the dense model.
    pub(super) check: States,
}

impl Hidden {
    /// What is left after the last layer.
    pub(super) fn after_layers(&mut self) -> Self {
        Self { check: std::mem::take(&mut self.check), ..Self::default() }
    }

    /// All streams, for saving and resuming.
    pub(super) fn fields(&mut self) -> [&mut States; 4] {
        [&mut self.quantized, &mut self.pruned, &mut self.dense, &mut self.check]
    }
}

/// What the embeddings and the lm_head need before the decoder layers are converted.
#[derive(Default)]
pub(super) struct TableState {
    /// Statistics of the dense model, if a table is quantized with a Hessian.
    pub(super) statistics: Option<TableStatistics>,
    /// The embeddings as they will be stored, if the layers are calibrated behind them.
    pub(super) embeddings: Option<Packed>,
}

/// A tensor that has been quantized.
pub(super) struct QuantizedTensor {
    pub(super) packed: Packed,
    /// Its relative error.
    pub(super) error: f64,
    pub(super) seconds: f64,
}

/// Keeps the inputs of the linear layers, [tokens, in].
#[derive(Default)]
pub(super) struct Capture(pub(super) InputMap<Vec<f32>>);

impl Observer for Capture {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        self.0[input] = x.to_vec();
        ControlFlow::Continue(())
    }
}

impl<'a> Run<'a> {
    /// The processor that computes large products.
    pub(super) fn compute(&self) -> Compute<'a> {
        Compute { isa: self.engine.isa, accelerator: self.accelerator }
    }

    /// Writes a finished tensor and reports it.
    pub(super) fn write(
        &mut self,
        tensor: &TensorPlan,
        done: &QuantizedTensor,
    ) -> anyhow::Result<()> {
        let target = self.job.target;
        let QuantizedTensor { packed, error, seconds } = done;
        self.stages.quantizer.add(&packed.seconds);
        let writing = Instant::now();
        self.writer
            .tensor(&tensor.tensor.name, &tensor.tensor.shape, &packed.encoding, &packed.payload)
            .map_err(|e| Error::io(target, e))?;
        self.stages.output += writing.elapsed().as_secs_f64();
        self.reports.push(TensorReport {
            name: tensor.tensor.name.clone(),
            shape: tensor.tensor.shape.clone(),
            encoding: packed.encoding.to_string(),
            bytes: packed.payload.len() as u64,
            stored_bits: tensor.stored_bits(),
            relative_error: *error,
            salient: packed.salient,
            seconds: *seconds,
        });
        Ok(())
    }
}
