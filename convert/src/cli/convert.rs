//! The conversion itself.

use std::path::Path;

use stb_convert::inspect::printable;
use stb_convert::prepare::Prepared;
use stb_convert::quality::AnswerPair;
use stb_convert::report::Report;
use stb_convert::request::{ConversionGoal, ConversionRequest, FinishedConversion};
use stb_format::Verdict;
use stb_runtime::{Checkpoint, Error};

use super::args::{ConvertArgs, usage};
use super::output::{note, print};
use super::progress::Bar;

pub(super) fn run(args: &ConvertArgs) -> anyhow::Result<()> {
    let Some(src) = &args.src else { usage("give a checkpoint and a file to write") };
    let request = request(args, src);
    let bar = Bar::new(args.quiet);
    if args.dry_run {
        let opened = request.open(args.out.as_deref(), true, &bar);
        bar.finish();
        let (checkpoint, _, prepared) = opened?;
        return dry_run(&checkpoint, &prepared);
    }
    let Some(out) = &args.out else { usage("give a file to write, or --dry-run") };
    let done = request.convert(out, &bar);
    bar.finish();
    let FinishedConversion { report, prepared } = done?;
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

/// The conversion that the arguments ask for.
fn request(args: &ConvertArgs, source: &Path) -> ConversionRequest {
    let goal = match (args.bits, args.max_kl) {
        (Some(bits), _) => ConversionGoal::Bits(bits),
        (None, Some(kl)) => ConversionGoal::MaxKl(kl),
        (None, None) => ConversionGoal::Recipe(args.recipe.clone()),
    };
    ConversionRequest {
        goal,
        check: !args.no_check,
        calibration: args.calib.clone(),
        samples: args.calib_samples,
        length: args.calib_len,
        seed: args.seed,
        distill_layers: args.distill_layers,
        distill: args.distill,
        force: args.force,
        device: args.device.unwrap_or_default(),
        ..ConversionRequest::new(source)
    }
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
