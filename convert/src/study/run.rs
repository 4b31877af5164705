//! Runs a study: converts and evaluates for each missing cell.

use std::cell::OnceCell;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use stb_runtime::{
    Checkpoint, Engine, Error, KeptLogits, OpenOptions, PerplexityOptions, Reference, Result,
    open_to_measure, perplexity, read_text,
};

use super::cell::{Cell, CellInputs, fingerprint};
use super::definition::{Study, StudyModel, StudyRecipe, StudyText};
use crate::calibration::CalibrationText;
use crate::digest::digest;
use crate::interrupt::Interrupted;
use crate::pipeline::Progress;
use crate::plan::plan;
use crate::prepare::{Order, prepare};
use crate::recipe::Recipe;
use crate::report::Report;

/// Receives the progress of a study.
pub trait Events: Progress + Sync {
    /// Cell `done` + 1 of `all` begins.
    fn begin(&self, done: usize, all: usize, model: &str, recipe: &str, text: &str);
    /// `done` of `all` windows of an evaluation are done.
    fn window(&self, done: usize, all: usize);
}

/// A cell of a table.
#[derive(Clone, Debug)]
pub struct StudyCell {
    /// The model's name.
    pub model: String,
    /// The recipe's label.
    pub recipe: String,
    /// The text's name.
    pub text: String,
    /// The measurement or the failure.
    pub outcome: CellOutcome,
}

/// The outcome of a cell.
#[derive(Clone, Debug)]
pub enum CellOutcome {
    /// Measured, now or before.
    Done(Box<Cell>),
    /// Not measured, with the reason.
    Failed(String),
}

/// All cells of a study, in the order models, recipes, texts.
#[derive(Debug)]
pub struct StudyTable {
    /// The cells.
    pub entries: Vec<StudyCell>,
    /// The number of cells measured in this run.
    pub measured: usize,
    /// The first error of a cell.
    pub failure: Option<anyhow::Error>,
}

/// Measures all cells of `study` that are not in `folder` yet.
///
/// If a recipe cannot be applied to a model, its cells fail, not the study; failed cells are not stored.
///
/// # Errors
/// [`Interrupted`]; [`Error`] for models, texts and cells that cannot be read or written.
pub fn run(study: &Study, folder: &Path, events: &dyn Events) -> anyhow::Result<StudyTable> {
    study.check()?;
    let cells = folder.join("cells");
    std::fs::create_dir_all(&cells).map_err(|e| Error::io(&cells, e))?;
    let _lock = lock(&cells)?;
    let mut texts = Vec::new();
    for text in &study.texts {
        let content = read_text(&text.path)?;
        texts.push(LoadedText { entry: text, hash: digest(&content), text: content });
    }
    // Read all texts first, so that a mistake in the last one does not cost hours.
    let mut sources = Vec::new();
    for recipe in &study.recipes {
        sources.push(match &recipe.calibration {
            Some(path) => CalibrationText::file(path)?,
            None => CalibrationText::of(&recipe.recipe.calibration)?,
        });
    }
    for line in &study.left_out {
        events.note(&format!("left out: {line}"));
    }
    let all = study.models.len() * study.recipes.len() * texts.len();
    let mut table = StudyTable { entries: Vec::new(), measured: 0, failure: None };
    for entry in &study.models {
        let model = StudiedModel::open(entry)?;
        for (recipe, source) in study.recipes.iter().zip(&sources) {
            let row = StudyRow { model: &model, recipe, source, cells: &cells, all };
            row.measure(&texts, &mut table, events)?;
        }
    }
    remove_leftovers(&cells)?;
    Ok(table)
}

/// Locks the folder against other studies.
fn lock(cells: &Path) -> Result<std::fs::File> {
    let path = cells.join(".lock");
    let fail = |e: std::io::Error| Error::io(&path, e);
    let file = std::fs::File::create(&path).map_err(fail)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => {
            return Err(Error::usage(format!(
                "another study is running in {}; wait for it or give another folder",
                cells.display()
            )));
        }
        Err(std::fs::TryLockError::Error(e)) => return Err(fail(e)),
    }
    Ok(file)
}

/// Removes the files of unfinished work. Called at the end of a study, when all such files are left from killed runs.
fn remove_leftovers(cells: &Path) -> Result<()> {
    for entry in std::fs::read_dir(cells).map_err(|e| Error::io(cells, e))?.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(CONVERSION_PREFIX) {
            let _ = std::fs::remove_dir_all(entry.path());
        } else if name.starts_with('.') && name.ends_with(".partial") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// The prefix of folders of unfinished conversions.
const CONVERSION_PREFIX: &str = ".work-";

/// A text in memory.
struct LoadedText<'a> {
    entry: &'a StudyText,
    text: String,
    hash: String,
}

/// An open checkpoint.
struct StudiedModel<'a> {
    entry: &'a StudyModel,
    checkpoint: Checkpoint,
    hash: String,
    context: usize,
    dense: OnceCell<Engine>,
    logits: KeptLogits,
}

/// Logits of the checkpoint up to this size are kept for the next cell; larger ones are computed again.
const KEPT_BYTES: usize = 1 << 30;

impl<'a> StudiedModel<'a> {
    fn open(entry: &'a StudyModel) -> Result<Self> {
        let checkpoint = Checkpoint::open(&entry.path, true)?;
        let hash = fingerprint(&checkpoint);
        let context = entry.context.unwrap_or(checkpoint.spec.context_length as usize);
        let (dense, logits) = (OnceCell::new(), KeptLogits::new(KEPT_BYTES));
        Ok(Self { entry, checkpoint, hash, context, dense, logits })
    }

    /// The dense model, with which converted models are compared.
    fn reference(&self) -> Result<Reference<'_>> {
        let engine = match self.dense.get() {
            Some(engine) => engine,
            None => {
                let engine = open_to_measure(&self.entry.path, &options())?;
                self.dense.get_or_init(|| engine)
            }
        };
        Ok(Reference { engine, kept: Some(&self.logits) })
    }
}

/// One model and one recipe, converted at most once for all texts.
struct StudyRow<'a> {
    model: &'a StudiedModel<'a>,
    recipe: &'a StudyRecipe,
    source: &'a CalibrationText,
    cells: &'a Path,
    all: usize,
}

impl StudyRow<'_> {
    fn measure(
        &self,
        texts: &[LoadedText<'_>],
        table: &mut StudyTable,
        events: &dyn Events,
    ) -> anyhow::Result<()> {
        let mut converted = None;
        for text in texts {
            let inputs = self.inputs(text)?;
            let path = inputs.file(self.cells);
            let names = (&self.model.entry.name, &self.recipe.label, &text.entry.name);
            let outcome = match Cell::load(&path, &inputs)? {
                Some(cell) => CellOutcome::Done(Box::new(cell)),
                None => {
                    events.begin(table.entries.len(), self.all, names.0, names.1, names.2);
                    let found = self.measure_cell(text, inputs, &mut converted, events);
                    match found {
                        Ok(cell) => {
                            cell.store(&path)?;
                            table.measured += 1;
                            CellOutcome::Done(Box::new(cell))
                        }
                        Err(e) if e.is::<Interrupted>() => return Err(e),
                        Err(e) => {
                            let what = format!("{e:#}");
                            events.note(&format!("{}, {}: {what}", names.0, names.1));
                            table.failure.get_or_insert(e);
                            CellOutcome::Failed(what)
                        }
                    }
                }
            };
            table.entries.push(StudyCell {
                model: names.0.clone(),
                recipe: names.1.clone(),
                text: names.2.clone(),
                outcome,
            });
        }
        Ok(())
    }

    fn inputs(&self, text: &LoadedText<'_>) -> Result<CellInputs> {
        let needs = plan(&self.model.checkpoint, &self.recipe.recipe)
            .is_ok_and(|plan| plan.needs_calibration())
            || self.recipe.recipe.linear.goal().is_some();
        let calibration = match needs {
            true => format!("{} sha256:{}", self.source.name, self.source.hash()),
            false => String::new(),
        };
        Ok(CellInputs {
            model_hash: self.model.hash.clone(),
            recipe: self.recipe.recipe.to_toml()?,
            calibration,
            text_hash: text.hash.clone(),
            layout: text.entry.layout.describe(),
            context: self.model.context,
            windows: text.entry.windows,
        })
    }

    fn measure_cell(
        &self,
        text: &LoadedText<'_>,
        inputs: CellInputs,
        converted: &mut Option<Converted>,
        events: &dyn Events,
    ) -> anyhow::Result<Cell> {
        let Converted { engine, report } = match converted {
            Some(converted) => converted,
            None => converted.insert(self.convert(&inputs, events)?),
        };
        let started = Instant::now();
        let reference = self.model.reference()?;
        let tokenizer = reference.engine.model.tokenizer()?;
        let options = PerplexityOptions {
            context: inputs.context,
            windows: inputs.windows,
            layout: text.entry.layout.clone(),
        };
        let progress = |done, all| {
            events.window(done, all);
            ControlFlow::Continue(())
        };
        let found =
            perplexity(engine, Some(reference), &tokenizer, &text.text, &options, &progress)?;
        let divergence = found
            .divergence
            .ok_or_else(|| Error::Internal { what: "a comparison without a result".into() })?;
        Ok(Cell {
            inputs,
            build: build(),
            isa: engine.isa.name().to_owned(),
            parameters: report.parameters,
            file_bytes: report.file_bytes,
            true_bits: report.true_bits_per_parameter,
            body_bits: report.body_bits,
            nominal_bits_paper: report.nominal_bits_paper,
            convert_seconds: report.seconds,
            evaluate_seconds: started.elapsed().as_secs_f64(),
            windows: found.windows,
            tokens: found.tokens,
            perplexity: found.perplexity.into(),
            dense_perplexity: divergence.reference_perplexity.into(),
            nll_difference: divergence.nll_difference.into(),
            kl: divergence.kl.into(),
            top1: divergence.top1.into(),
        })
    }

    /// Converts the model, or resumes the conversion of an interrupted study.
    fn convert(&self, inputs: &CellInputs, events: &dyn Events) -> anyhow::Result<Converted> {
        let conversion = [&inputs.model_hash, &inputs.recipe, &inputs.calibration];
        let name = digest(conversion.map(|part| format!("{} {part}", part.len())).concat());
        let folder = self.cells.join(format!("{CONVERSION_PREFIX}{}", &name[..24]));
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
        let file = folder.join("model.stb");
        let (checkpoint, recipe) = (&self.model.checkpoint, &self.recipe.recipe);
        let report = convert_file(checkpoint, recipe, self.source, &file, events)?;
        let engine = open_to_measure(&file, &options())?;
        // A mapped file can be removed now on Unix; on other systems `remove_leftovers` does it at the end of the study.
        let _ = std::fs::remove_dir_all(&folder);
        Ok(Converted { engine, report })
    }
}

/// Options for evaluation with as many threads as the present pool has.
fn options() -> OpenOptions {
    OpenOptions { threads: Some(rayon::current_num_threads()), ..OpenOptions::default() }
}

/// A converted model, mapped.
struct Converted {
    engine: Engine,
    report: Report,
}

/// Converts `checkpoint` by `recipe` into the file `target`; replaces an existing one.
///
/// # Errors
/// As for [`prepare`] and [`Prepared::convert`](crate::prepare::Prepared::convert).
pub fn convert_file(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    source: &CalibrationText,
    target: &Path,
    progress: &dyn Progress,
) -> anyhow::Result<Report> {
    // The study measures the file itself, on texts of its own.
    let check = recipe.linear.max_kl().is_some();
    let order = Order { checkpoint, calibration: source, target, force: true, device: None };
    prepare(checkpoint, recipe, source, check)?.convert(&order, progress)
}

/// Identifies this build: its version and a hash of the program's file. Cells of other builds are used, but the table
/// lists all builds.
fn build() -> String {
    static BUILD: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
        let program = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
        let sum = stb_format::checksum(&program);
        format!("{} {sum:016x}", env!("CARGO_PKG_VERSION"))
    });
    BUILD.clone()
}
