//! A whole conversion, from paths and options to a measured file: what the program and the Python package do.

use std::path::{Path, PathBuf};

use stb_kernels::cuda::{Device, LinearAlgebra};
use stb_runtime::{Checkpoint, DeviceChoice, Error, Result};

use crate::calibration::{CalibrationText, SELF_WRITTEN};
use crate::check::compare_answers;
use crate::memory::memory_to_choose;
use crate::output::refuse_existing;
use crate::pipeline::Progress;
use crate::plan::plan;
use crate::prepare::{Order, Prepared, prepare};
use crate::recipe::{DEFAULT, Recipe};
use crate::report::Report;
use crate::system::{check_disk, check_memory, folder_of};
use crate::written;

/// What a conversion is to reach.
#[derive(Clone, Debug, PartialEq)]
pub enum ConversionGoal {
    /// What a recipe says: its name, or a `.toml` file.
    Recipe(String),
    /// A size of the whole file, in true bits per parameter.
    Bits(f64),
    /// The smallest file with at most this KL divergence from the source, in nats per token.
    MaxKl(f64),
}

/// A conversion with its options. `None` stands for the value of the recipe.
#[derive(Clone, Debug)]
pub struct ConversionRequest {
    /// A folder in the Hugging Face layout, a `.safetensors` or `.gguf` file, or an index of shards.
    pub source: PathBuf,
    /// What to reach.
    pub goal: ConversionGoal,
    /// Whether the file is measured.
    pub check: bool,
    /// The calibration text; [`SELF_WRITTEN`] for one that the model writes.
    pub calibration: Option<PathBuf>,
    /// Calibration sequences.
    pub samples: Option<u32>,
    /// Tokens per calibration sequence.
    pub length: Option<u32>,
    /// Seed of the calibration windows.
    pub seed: Option<u64>,
    /// Passes over the calibration sequences that distill each layer.
    pub distill_layers: Option<u32>,
    /// Times as many fresh sequences as calibration has that distill the whole model.
    pub distill: Option<u32>,
    /// Whether an existing file may be replaced.
    pub force: bool,
    /// The device for calibration and large products.
    pub device: DeviceChoice,
}

/// A finished conversion.
#[derive(Debug)]
pub struct FinishedConversion {
    /// What was done and measured.
    pub report: Report,
    /// What was planned.
    pub prepared: Prepared,
}

impl ConversionRequest {
    /// The conversion of `source` without options.
    #[must_use]
    pub fn new(source: &Path) -> Self {
        Self {
            source: source.to_owned(),
            goal: ConversionGoal::Recipe(DEFAULT.to_owned()),
            check: true,
            calibration: None,
            samples: None,
            length: None,
            seed: None,
            distill_layers: None,
            distill: None,
            force: false,
            device: DeviceChoice::default(),
        }
    }

    /// Converts to the file `target`, measures it, and lets both models answer a few questions. Runs on the threads of
    /// the present Rayon pool.
    ///
    /// # Errors
    /// [`Error::Usage`] for wrong options, an existing file, and too little memory or disk space; those of
    /// [`Checkpoint::open`], [`prepare`] and [`Prepared::convert`].
    pub fn convert(
        &self,
        target: &Path,
        progress: &dyn Progress,
    ) -> anyhow::Result<FinishedConversion> {
        refuse_existing(target, self.force)?;
        let (checkpoint, calibration, prepared) = self.open(Some(target), false, progress)?;
        let recipe = &prepared.recipe;
        check_memory(prepared.plan.peak_memory(&checkpoint, recipe), "the conversion", || {
            let samples = recipe.calibration.samples;
            format!("use fewer --calib-samples (now {samples}) or shorter ones with --calib-len")
        })?;
        check_disk(target, prepared.plan.disk_space(&checkpoint, recipe, &prepared.meta))?;
        let order = Order {
            checkpoint: &checkpoint,
            calibration: &calibration,
            target,
            force: self.force,
            device: device(self.device, progress)?,
        };
        let mut report = prepared.clone().convert(&order, progress)?;
        if prepared.held_out.is_some() {
            match compare_answers(&checkpoint, target) {
                Ok(answers) => report.answers = answers,
                // The file is complete and measured. The template may be broken, or not fit the context.
                Err(e) => progress.note(&format!("no answers to compare: {e}")),
            }
        }
        Ok(FinishedConversion { report, prepared })
    }

    /// Opens the source and plans the conversion. A calibration text that the model writes is kept beside `target`.
    /// With `dry_run` it is written only if the plan depends on it.
    ///
    /// # Errors
    /// [`Error::Usage`] for wrong options and too little memory; those of [`Checkpoint::open`] and [`prepare`].
    pub fn open(
        &self,
        target: Option<&Path>,
        dry_run: bool,
        progress: &dyn Progress,
    ) -> anyhow::Result<(Checkpoint, CalibrationText, Prepared)> {
        let checkpoint = Checkpoint::open(&self.source, true)?;
        let recipe = self.recipe()?;
        let calibration =
            self.calibration_text(&checkpoint, &recipe, (target, dry_run), progress)?;
        if recipe.linear.goal().is_some() {
            check_memory(memory_to_choose(&checkpoint, &recipe), "choosing encodings", || {
                let samples = recipe.calibration.samples;
                format!(
                    "use fewer --calib-samples (now {samples}), or a recipe of one encoding such as --recipe int4"
                )
            })?;
        }
        let prepared = prepare(&checkpoint, &recipe, &calibration, self.check)?;
        Ok((checkpoint, calibration, prepared))
    }

    /// The calibration text of the options or else of the recipe. The model writes it if it is its own and anything
    /// needs it.
    fn calibration_text(
        &self,
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        (target, dry_run): (Option<&Path>, bool),
        progress: &dyn Progress,
    ) -> anyhow::Result<CalibrationText> {
        let of_recipe = recipe.calibration.text.as_deref().map(Path::new);
        if self.calibration.as_deref().or(of_recipe) != Some(Path::new(SELF_WRITTEN)) {
            return Ok(match &self.calibration {
                Some(path) => CalibrationText::file(path)?,
                None => CalibrationText::of(&recipe.calibration)?,
            });
        }
        let chooses = recipe.linear.goal().is_some();
        let needed = chooses || plan(checkpoint, recipe)?.needs_calibration();
        if !needed || dry_run && !chooses {
            return Ok(CalibrationText::unwritten());
        }
        check_memory(written::memory(checkpoint), "writing the calibration text", || {
            "use a machine with more, or another text for --calib".into()
        })?;
        written::write_text(checkpoint, &recipe.calibration, target.map(folder_of), progress)
    }

    /// The recipe with the options applied.
    fn recipe(&self) -> Result<Recipe> {
        let name = match &self.goal {
            ConversionGoal::Recipe(name) => name,
            ConversionGoal::Bits(_) | ConversionGoal::MaxKl(_) => DEFAULT,
        };
        Recipe::load(name)?.changed(|file| {
            match self.goal {
                ConversionGoal::Recipe(_) => {}
                ConversionGoal::Bits(bits) => file.set_budget(bits),
                ConversionGoal::MaxKl(kl) => file.set_max_kl(kl),
            }
            let calibration = &mut file.calibration;
            if let Some(samples) = self.samples {
                calibration.samples = samples as usize;
            }
            if let Some(length) = self.length {
                calibration.length = length as usize;
            }
            if let Some(seed) = self.seed {
                calibration.seed = seed;
            }
            if let Some(passes) = self.distill_layers {
                calibration.distill_layers = Some(passes as usize);
            }
            if let Some(times) = self.distill {
                calibration.distill = Some(times as usize);
            }
        })
    }
}

/// Opens the device of `choice`, and checks that its linear algebra works.
fn device(choice: DeviceChoice, progress: &dyn Progress) -> Result<Option<Device>> {
    let ordinal = match choice {
        DeviceChoice::Cpu => return Ok(None),
        DeviceChoice::Auto => 0,
        DeviceChoice::Cuda(ordinal) => ordinal,
    };
    let usable = |device: Device| LinearAlgebra::new(&device).map(|_| device);
    match Device::open(ordinal).and_then(usable).map_err(Error::from) {
        Ok(device) => Ok(Some(device)),
        // Only a missing device or library is acceptable here; a defect is an error also with `auto`.
        Err(e) if choice == DeviceChoice::Auto && e.kind().is_unsupported() => {
            progress.note(&format!("{e}; the CPU computes"));
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_change_the_recipe() {
        let request = ConversionRequest {
            goal: ConversionGoal::Recipe("int4".into()),
            samples: Some(3),
            length: Some(17),
            seed: Some(5),
            distill: Some(2),
            ..ConversionRequest::new(Path::new("model"))
        };
        let calibration = request.recipe().unwrap().calibration;
        assert_eq!((calibration.samples, calibration.length), (3, 17));
        let passes = calibration.distill.map(|options| options.epochs);
        assert_eq!((calibration.seed, passes), (5, Some(2)));
        let goal = |goal| ConversionRequest { goal, ..request.clone() }.recipe();
        assert!(goal(ConversionGoal::Bits(2.5)).unwrap().linear.goal().is_some());
        assert_eq!(goal(ConversionGoal::MaxKl(0.1)).unwrap().linear.max_kl(), Some(0.1));
        assert!(goal(ConversionGoal::Bits(0.0)).is_err());
        assert!(goal(ConversionGoal::Recipe("int".into())).is_err());
    }
}
