//! The conversion itself.

use std::path::Path;

use stb_convert::Recipe;
use stb_convert::calibration::{CalibrationText, SELF_WRITTEN};
use stb_convert::check::compare_answers;
use stb_convert::inspect::printable;
use stb_convert::memory_to_choose;
use stb_convert::output::refuse_existing;
use stb_convert::prepare::{Order, Prepared, prepare};
use stb_convert::quality::AnswerPair;
use stb_convert::report::Report;
use stb_convert::system::available_memory;
use stb_convert::{plan, written};
use stb_format::Verdict;
use stb_kernels::cuda::{Device, LinearAlgebra};
use stb_runtime::{Checkpoint, DeviceChoice, Error};

use super::args::{ConvertArgs, usage};
use super::output::{note, print};
use super::progress::Bar;

pub(super) fn run(args: &ConvertArgs) -> anyhow::Result<()> {
    let Some(src) = &args.src else { usage("give a checkpoint and a file to write") };
    match &args.out {
        Some(out) if !args.dry_run => refuse_existing(out, args.force)?,
        None if !args.dry_run => usage("give a file to write, or --dry-run"),
        _ => {}
    }
    let checkpoint = Checkpoint::open(src, true)?;
    let recipe = recipe(args)?;
    let source = calibration_text(args, &checkpoint, &recipe)?;
    if recipe.linear.goal().is_some() {
        check_memory(memory_to_choose(&checkpoint, &recipe), "choosing encodings", || {
            let samples = recipe.calibration.samples;
            format!(
                "use fewer --calib-samples (now {samples}), or a recipe of one encoding such as --recipe int4"
            )
        })?;
    }
    let prepared = prepare(&checkpoint, &recipe, &source, !args.no_check)?;
    if args.dry_run {
        return dry_run(&checkpoint, &prepared);
    }
    let Some(out) = &args.out else { usage("give a file to write, or --dry-run") };
    check_memory(prepared.plan.peak_memory(&checkpoint, &recipe), "the conversion", || {
        let samples = recipe.calibration.samples;
        format!("use fewer --calib-samples (now {samples}) or shorter ones with --calib-len")
    })?;
    check_disk(out, prepared.plan.disk_space(&checkpoint, &recipe, &prepared.meta))?;
    let bar = Bar::new(args.quiet);
    let order = Order {
        checkpoint: &checkpoint,
        calibration: &source,
        target: out,
        force: args.force,
        device: device(args.device.unwrap_or_default(), args.quiet)?,
    };
    let result = prepared.clone().convert(&order, &bar);
    bar.finish();
    let mut report = result?;
    if prepared.held_out.is_some() {
        match compare_answers(&checkpoint, out) {
            Ok(answers) => report.answers = answers,
            // The file is complete and measured. The template may be broken, or not fit the context.
            Err(e) => note(format_args!("no answers to compare: {e}")),
        }
    }
    if let Some(path) = &args.report {
        let json = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, json + "\n").map_err(|e| Error::io(path, e))?;
    }
    if !args.quiet {
        summary(out, &report);
        advise(&prepared, &report)?;
    }
    Ok(())
}

/// The calibration text of the arguments or else of the recipe. Writes it if it is the model's own and anything needs it.
fn calibration_text(
    args: &ConvertArgs,
    checkpoint: &Checkpoint,
    recipe: &Recipe,
) -> anyhow::Result<CalibrationText> {
    let of_recipe = recipe.calibration.text.as_deref().map(Path::new);
    if args.calib.as_deref().or(of_recipe) != Some(Path::new(SELF_WRITTEN)) {
        return Ok(match &args.calib {
            Some(path) => CalibrationText::file(path)?,
            None => CalibrationText::of(&recipe.calibration)?,
        });
    }
    let chooses = recipe.linear.goal().is_some();
    let needed = chooses || plan(checkpoint, recipe)?.needs_calibration();
    if !needed || args.dry_run && !chooses {
        return Ok(CalibrationText::unwritten());
    }
    check_memory(written::memory(checkpoint), "writing the calibration text", || {
        "use a machine with more, or another text for --calib".into()
    })?;
    let bar = Bar::new(args.quiet);
    let folder = args.out.as_deref().map(folder_of);
    let text = written::write_text(checkpoint, &recipe.calibration, folder, &bar);
    bar.finish();
    text
}

/// The folder of a file.
fn folder_of(file: &Path) -> &Path {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Opens the device of `choice`, and checks that its linear algebra works.
fn device(choice: DeviceChoice, quiet: bool) -> Result<Option<Device>, Error> {
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
            if !quiet {
                note(format_args!("{e}; the CPU computes"));
            }
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Fails before hours of work if less than `needed` bytes of memory are available (checked on Linux only). The
/// message begins with `what`, which needs the memory, and ends with `advice`.
fn check_memory(needed: u64, what: &str, advice: impl Fn() -> String) -> Result<(), Error> {
    match available_memory() {
        Some(available) if needed > available => Err(Error::usage(format!(
            "{what} needs up to {} MB of memory, {} MB are available: {}",
            needed / 1_000_000,
            available / 1_000_000,
            advice()
        ))),
        _ => Ok(()),
    }
}

/// Fails before hours of work if the file system of `out` has less than `needed` bytes left.
fn check_disk(out: &Path, needed: u64) -> Result<(), Error> {
    let folder = folder_of(out);
    // A folder that does not exist is reported when the file is created.
    match fs4::available_space(folder) {
        Ok(available) if needed > available => Err(Error::usage(format!(
            "the conversion needs up to {} MB of disk space, {} has {} MB: free some, or write to another disk",
            needed / 1_000_000,
            folder.display(),
            available / 1_000_000
        ))),
        _ => Ok(()),
    }
}

/// The recipe with the options of the command line applied.
fn recipe(args: &ConvertArgs) -> Result<Recipe, Error> {
    Recipe::load(&args.recipe)?.changed(|file| {
        if let Some(bits) = args.bits {
            file.set_budget(bits);
        }
        if let Some(kl) = args.max_kl {
            file.set_max_kl(kl);
        }
        let calibration = &mut file.calibration;
        if let Some(samples) = args.calib_samples {
            calibration.samples = samples as usize;
        }
        if let Some(length) = args.calib_len {
            calibration.length = length as usize;
        }
        if let Some(seed) = args.seed {
            calibration.seed = seed;
        }
        if let Some(epochs) = args.distill_layers {
            calibration.distill_layers = Some(epochs as usize);
        }
        if let Some(epochs) = args.distill {
            calibration.distill = Some(epochs as usize);
        }
    })
}

fn dry_run(checkpoint: &Checkpoint, prepared: &Prepared) -> anyhow::Result<()> {
    let Prepared { recipe, plan, meta, .. } = prepared;
    let width = plan.tensors.iter().map(|t| t.tensor.name.len()).max().unwrap_or(0);
    print(format_args!(
        "{:<width$}  {:>14}  {:<18} {:>6}  {:>12}",
        "tensor", "shape", "encoding", "bits", "bytes"
    ))?;
    for t in &plan.tensors {
        let shape: Vec<String> = t.tensor.shape.iter().map(u64::to_string).collect();
        print(format_args!(
            "{:<width$}  {:>14}  {:<18} {:>6.3}  {:>12}",
            t.tensor.name,
            shape.join(" x "),
            t.method.encoding().to_string(),
            t.stored_bits(),
            t.bytes
        ))?;
    }
    let (bytes, parameters) = (plan.file_bytes(meta), plan.parameters());
    let weights: u64 = plan.tensors.iter().map(|t| t.bytes).sum();
    print(format_args!(
        "\nfile        {bytes} bytes, of which tokenizer, metadata and padding {}",
        bytes - weights
    ))?;
    print(format_args!(
        "true bits   {:.3} per parameter ({parameters} parameters)",
        bytes as f64 * 8.0 / parameters as f64
    ))?;
    for note in plan.notes() {
        print(format_args!("note        {note}"))?;
    }
    if let Some(bits) = plan.nominal_bits(0.0) {
        print(format_args!(
            "nominal     {bits:.3} bits as the paper counts, without salient columns; not what is stored"
        ))?;
    }
    let memory = plan.peak_memory(checkpoint, recipe) as f64 / 1e6;
    print(format_args!("peak memory {memory:.0} MB besides the mapped source, at most"))?;
    let disk = plan.disk_space(checkpoint, recipe, meta) as f64 / 1e6;
    print(format_args!("disk space  {disk:.0} MB, at most"))?;
    if let Some(kl) = prepared.max_kl {
        print(format_args!(
            "This is the first size of the search for a KL divergence of at most {kl} nats per token."
        ))?;
    }
    Ok(())
}

fn summary(out: &Path, report: &Report) {
    note(format_args!(
        "{}: {} bytes for {} parameters = {:.3} true bits per parameter; decoder layers {:.3} stored \
         bits per weight; {:.1} s",
        out.display(),
        report.file_bytes,
        report.parameters,
        report.true_bits_per_parameter,
        report.body_bits,
        report.seconds
    ));
    for text in &report.notes {
        note(format_args!("note: {text}"));
    }
    if let Some(bits) = report.nominal_bits_paper {
        note(format_args!(
            "(nominal, as the paper counts: {bits:.3} bits per weight, without masks, regions, scales \
             and embeddings)"
        ));
    }
    note(printable(&report.quality.line()));
    for AnswerPair { question, source, file } in &report.answers {
        note(printable(&format!("{question}  original: {source}")));
        note(printable(&format!("{:width$}  this file: {file}", "", width = question.len())));
    }
}

/// Says what to do about a broken file.
fn advise(prepared: &Prepared, report: &Report) -> anyhow::Result<()> {
    if !report.quality.is_broken() {
        return Ok(());
    }
    let limit = Verdict::broken_limit();
    let found = match report.quality.kl() {
        Some(kl) => prepared.size_for(limit, kl)?,
        None => None,
    };
    match found {
        Some(bits) => note(format_args!(
            "By the cost model, scaled to this measurement, a file that is not broken needs about --bits {bits:.2}; \
             --max-kl {limit} finds the size."
        )),
        None => note(format_args!(
            "Use a recipe of more bits, or --max-kl X, which finds the smallest file within a divergence."
        )),
    }
    Ok(())
}
