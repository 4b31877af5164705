//! From a recipe to a plan, the metadata and the file.

use std::path::Path;

use stb_format::{Meta, Quality};
use stb_kernels::cuda::Device;
use stb_runtime::{Checkpoint, Engine, Error};

use crate::allocation::allocate;
use crate::budget::Costs;
use crate::calibration::{CalibrationText, HELD_OUT_TOKENS, HELD_OUT_WINDOW, HeldOut};
use crate::metadata::metadata;
use crate::pipeline::{Job, Progress, convert};
use crate::plan::{Plan, plan};
use crate::recipe::{Goal, Recipe};
use crate::report::Report;

/// A conversion that can begin.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// The recipe. In place of a KL divergence it has the first size of the search.
    pub recipe: Recipe,
    /// The method for each tensor.
    pub plan: Plan,
    /// The metadata, without the hashes of the source files and with room for the figures of the check.
    pub meta: Meta,
    /// The windows on which the file is measured; `None` if it is not.
    pub held_out: Option<HeldOut>,
    /// The costs of the candidate encodings, if encodings are chosen.
    pub costs: Option<Costs>,
    /// The KL divergence that a search for a size may reach, in nats per token; `None` if the size is known.
    pub max_kl: Option<f64>,
}

/// The models and files of a conversion.
#[derive(Clone)]
pub struct Order<'a> {
    /// The dense model.
    pub checkpoint: &'a Checkpoint,
    /// The calibration text.
    pub calibration: &'a CalibrationText,
    /// The file to write.
    pub target: &'a Path,
    /// Whether an existing file may be replaced.
    pub force: bool,
    /// A GPU that computes the large products; results differ from those of the CPU by rounding.
    pub device: Option<Device>,
}

/// Plans the conversion and makes the metadata of the file. Allocates N to the layers or fits all encodings to a
/// size if the recipe has these options. With `check`, the file will be measured on text that is held out from
/// calibration.
///
/// # Errors
/// [`Error::Usage`] for a recipe that searches for a size without `check`; those of [`plan`], [`allocate`],
/// [`metadata`], [`CalibrationText::held_out`] and [`Costs`].
pub fn prepare(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    source: &CalibrationText,
    check: bool,
) -> anyhow::Result<Prepared> {
    let goal = recipe.linear.goal();
    let max_kl = recipe.linear.max_kl();
    if max_kl.is_some() && !check {
        return Err(Error::usage(format!(
            "recipe {} searches for a size by measuring files, which cannot be left out: give --bits or another \
             --recipe with --no-check",
            recipe.name
        ))
        .into());
    }
    let mut plan = plan(checkpoint, recipe)?;
    allocate(&mut plan, checkpoint, recipe, source)?;
    let held_out = match check {
        true => {
            let model = Engine::without_layers(checkpoint)?.model;
            let length = HELD_OUT_WINDOW.min(checkpoint.spec.context_length as usize).max(2);
            let count = HELD_OUT_TOKENS / length;
            Some(source.held_out(&model, &recipe.calibration, length, count)?)
        }
        false => None,
    };
    let recipe = recipe.clone();
    let mut prepared = Prepared { recipe, plan, meta: Meta::new(), held_out, costs: None, max_kl };
    prepared.set_meta(checkpoint, source)?;
    if let Some(goal) = goal {
        let costs = Costs::measure(&prepared.plan, checkpoint, &prepared.recipe, source)?;
        let bits = match goal {
            Goal::Bits(bits) => bits,
            Goal::MaxKl(kl) => costs.first_size(&prepared.plan, &prepared.meta, kl)?,
        };
        prepared.set_size(&costs, checkpoint, source, bits)?;
        prepared.costs = Some(costs);
    }
    Ok(prepared)
}

impl Prepared {
    /// Changes the size of a conversion whose encodings are chosen to `bits` true bits per parameter.
    ///
    /// # Errors
    /// [`Error::Usage`] if no combination is small enough.
    pub(crate) fn set_size(
        &mut self,
        costs: &Costs,
        checkpoint: &Checkpoint,
        source: &CalibrationText,
        bits: f64,
    ) -> anyhow::Result<()> {
        if self.recipe.linear.goal() != Some(Goal::Bits(bits)) {
            self.recipe = self.recipe.changed(|file| file.set_budget(bits))?;
            self.set_meta(checkpoint, source)?;
        }
        costs.fit(&mut self.plan, &self.meta, bits)?;
        Ok(())
    }

    /// Makes the metadata.
    fn set_meta(
        &mut self,
        checkpoint: &Checkpoint,
        source: &CalibrationText,
    ) -> anyhow::Result<()> {
        let Self { recipe, plan, .. } = self;
        let length = recipe.calibration.length.min(checkpoint.spec.context_length as usize);
        let calibration = if plan.needs_calibration() || recipe.linear.goal().is_some() {
            source.describe(&recipe.calibration, length)
        } else {
            String::new()
        };
        let mut meta = metadata(checkpoint, recipe, &calibration, plan.parameters())?;
        let quality = match &self.held_out {
            Some(held_out) => Quality::longest(&held_out.text),
            None => Quality::unchecked(),
        };
        quality.write(&mut meta).map_err(|e| Error::invalid(format!("metadata: {e}")))?;
        self.meta = meta;
        Ok(())
    }

    /// Converts to the present size.
    pub(crate) fn convert_once(
        &self,
        order: &Order<'_>,
        progress: &dyn Progress,
    ) -> anyhow::Result<Report> {
        let job = Job {
            checkpoint: order.checkpoint,
            recipe: &self.recipe,
            plan: self.plan.clone(),
            meta: self.meta.clone(),
            calibration: order.calibration,
            held_out: self.held_out.as_ref(),
            target: order.target,
            force: order.force,
            device: order.device.clone(),
        };
        convert(job, progress)
    }

    /// An estimate of the smallest size, in true bits per parameter, of a file with a KL divergence of at most `kl`,
    /// where the present plan has the divergence `measured`. `None` if encodings are not chosen, or if no size is
    /// expected to do.
    ///
    /// # Errors
    /// None in practice.
    pub fn size_for(&self, kl: f64, measured: f64) -> anyhow::Result<Option<f64>> {
        let (Some(costs), Some(Goal::Bits(bits))) = (&self.costs, self.recipe.linear.goal()) else {
            return Ok(None);
        };
        Ok(Some(costs.scaled_size(&self.plan, &self.meta, (bits, measured), kl)?))
    }
}
