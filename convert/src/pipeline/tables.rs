//! Converts the tensors outside the decoder layers: embeddings, lm_head and norms.

use std::time::Instant;

use stb_format::arch::Role;
use stb_runtime::{Engine, Weight};

use super::run::{QuantizedTensor, Run};
use super::tensor::{decode_finite, pack_uncalibrated, squared_error};
use crate::backward::backpropagate;
use crate::interrupt::check_interrupt;
use crate::plan::{TensorMethod, TensorPlan};
use crate::quantize::Packed;
use crate::tables::{TableHessian, TableUse, sequences};

impl Run<'_> {
    /// Runs the dense model, forward and backward, if a table is quantized with a Hessian.
    pub(super) fn measure_tables(&mut self) -> anyhow::Result<()> {
        let job = self.job;
        let mut outside = job.plan.tensors.iter().filter(|t| t.tensor.layer.is_none());
        if outside.any(TensorPlan::is_calibrated) {
            let engine = Engine::from_checkpoint(job.checkpoint)?;
            let sequences = sequences(&engine, job.recipe, job.calibration)?;
            let statistics = backpropagate(&engine, &sequences, |_, _| check_interrupt())?;
            self.tables.statistics = Some(statistics);
        }
        Ok(())
    }

    /// The embeddings as they will be stored; `None` if layers are calibrated with those of the checkpoint.
    pub(super) fn stored_embeddings(&mut self) -> anyhow::Result<Option<Weight>> {
        let job = self.job;
        let plan = job.plan.tensors.iter().find(|t| t.tensor.role == Role::TokenEmbedding);
        let Some(plan) = plan.filter(|_| job.recipe.calibration.refreshed) else {
            return Ok(None);
        };
        let name = &plan.tensor.name;
        let weight = job.checkpoint.weight(name)?;
        let packed = self.pack_global(plan, &weight, &decode_finite(&weight, name)?)?;
        let (rows, cols) = (weight.rows() as u64, weight.cols() as u64);
        let stored = Weight::from_payload(&packed.payload, packed.encoding.clone(), rows, cols)?;
        self.tables.embeddings = Some(packed);
        Ok(Some(stored))
    }

    /// Converts and writes tensors outside the decoder layers.
    pub(super) fn convert_global_tensors(&mut self, tensors: &[&TensorPlan]) -> anyhow::Result<()> {
        for tensor in tensors {
            check_interrupt()?;
            let started = Instant::now();
            let weight = self.job.checkpoint.weight(&tensor.tensor.name)?;
            let values = decode_finite(&weight, &tensor.tensor.name)?;
            let finished = match tensor.tensor.role {
                Role::TokenEmbedding => self.tables.embeddings.take(),
                _ => None,
            };
            let packed = match finished {
                Some(packed) => packed,
                None => self.pack_global(tensor, &weight, &values)?,
            };
            let error = squared_error(&packed, &weight, &values);
            let seconds = started.elapsed().as_secs_f64();
            self.write(tensor, &QuantizedTensor { packed, error, seconds })?;
        }
        Ok(())
    }

    /// Packs a tensor outside the decoder layers.
    fn pack_global(
        &self,
        tensor: &TensorPlan,
        weight: &Weight,
        values: &[f32],
    ) -> anyhow::Result<Packed> {
        match (tensor.method, &self.tables.statistics) {
            (TensorMethod::Linear(method), Some(statistics)) => {
                let tied = self.job.checkpoint.spec.tied_embeddings;
                let usage = TableUse::new(tensor.tensor.role, tied);
                let damping = self.job.recipe.calibration.damping;
                let hessian = TableHessian::new(statistics, usage, damping)?;
                hessian.quantize(self.compute(), values, method)
            }
            _ => Ok(pack_uncalibrated(tensor, weight, values)),
        }
    }
}
