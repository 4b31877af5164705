//! `stb-convert study` and `stb-convert flips`.

use std::path::Path;

use stb_convert::calibration::CalibrationText;
use stb_convert::flips::{self, FlipOptions};
use stb_convert::interrupt::interrupted;
use stb_convert::study::{self, Definition, Events, StudyModel, convert_file, write_whole};
use stb_convert::{Progress, Recipe};
use stb_runtime::{
    Checkpoint, Error, OpenOptions, PerplexityOptions, TextLayout, is_json_lines, open_to_measure,
    read_text,
};

use super::args::{FlipArgs, StudyArgs};
use super::output::{note, print};
use super::progress::Bar;

pub(super) fn study(args: &StudyArgs) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.study).map_err(|e| Error::io(&args.study, e))?;
    let folder = args.study.parent().unwrap_or(Path::new("."));
    let mut study = Definition::parse(&text)?.resolve(folder, &args.define)?;
    for (name, path) in &args.model {
        match study.models.iter_mut().find(|m| m.name == *name) {
            Some(model) => model.path = path.into(),
            None => study.models.push(StudyModel {
                name: name.clone(),
                path: path.into(),
                context: None,
            }),
        }
    }
    study.check()?;
    if args.fresh {
        let cells = args.out.join("cells");
        match std::fs::remove_dir_all(&cells) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(&cells, e).into());
            }
            _ => {}
        }
    }
    let progress = StudyProgress { bar: Bar::new(args.quiet) };
    let table = study::run(&study, &args.out, &progress);
    progress.bar.finish();
    let table = table?;
    let markdown = table.markdown(&study);
    for (suffix, text) in
        [("md", markdown.clone()), ("csv", table.csv()), ("svg", table.svg(&study))]
    {
        write_whole(&args.out.join(format!("{}.{suffix}", study.name)), &text)?;
    }
    if !args.quiet {
        let all = table.entries.len();
        note(format_args!("{} of {all} cells measured now", table.measured));
        if table.builds().len() > 1 {
            note("cells are from several builds of this program; --fresh measures all again");
        }
    }
    print(markdown.trim_end())?;
    match table.failure {
        Some(first) => Err(first.context("not all cells could be measured; the first")),
        None => Ok(()),
    }
}

/// Shows the progress of a study.
struct StudyProgress {
    bar: Bar,
}

impl Progress for StudyProgress {
    fn step(&self, done: u64, all: u64, what: &str) {
        self.bar.step(done, all, what);
    }

    fn layer(&self, _: usize, _: usize, _: f64, _: &str, _: f64) {}

    fn note(&self, text: &str) {
        self.bar.note(text);
    }
}

impl Events for StudyProgress {
    fn begin(&self, done: usize, all: usize, model: &str, recipe: &str, text: &str) {
        self.bar.note(&format!("cell {} of {all}: {model}, {recipe}, {text}", done + 1));
    }

    fn window(&self, done: usize, all: usize) {
        if interrupted() {
            // Finished cells are on disk; nothing of this one is.
            std::process::exit(130);
        }
        self.bar.step(done as u64, all as u64, "windows");
    }
}

pub(super) fn flips(args: &FlipArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.src, true)?;
    let recipe = match &args.recipe {
        Some(name) => Recipe::load(name)?,
        None => flips::binarized()?,
    };
    let source = match &args.calib {
        Some(path) => CalibrationText::file(path)?,
        None => CalibrationText::of(&recipe.calibration)?,
    };
    let text = read_text(&args.text)?;
    let temporary = args.out.join(".work");
    std::fs::create_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
    let file = temporary.join("model.stb");
    let bar = Bar::new(args.quiet);
    let report = convert_file(&checkpoint, &recipe, &source, &file, &bar);
    bar.finish();
    let report = report?;
    let threads = Some(rayon::current_num_threads());
    let mut engine = open_to_measure(&file, &OpenOptions { threads, ..OpenOptions::default() })?;
    // A mapped file can be removed now on Unix; on other systems this fails and is repeated at the end.
    let _ = std::fs::remove_dir_all(&temporary);
    let layout = layout(args);
    let context = args.ctx.map_or(engine.model.spec.context_length as usize, |n| n as usize);
    let options = FlipOptions {
        shares: args.percent.iter().map(|p| p / 100.0).collect(),
        seeds: (0..args.seeds).collect(),
        salient: args.salient,
        evaluation: PerplexityOptions {
            context,
            windows: args.windows.map(|n| n as usize),
            layout,
        },
    };
    let quiet = args.quiet;
    let progress = |done: usize, all: usize, f: &flips::Flipped| {
        if interrupted() {
            std::process::exit(130);
        }
        if !quiet {
            let order = f.order.map_or("nothing flipped".into(), |o| o.to_string());
            let (percent, found, error) = (flips::percent(f.share), f.perplexity, f.standard_error);
            note(format_args!(
                "{done} of {all}: {order}, {percent} %: perplexity {found:.4} ± {error:.4}"
            ));
        }
    };
    let calibration = &recipe.calibration;
    let found =
        flips::flip(&mut engine, &checkpoint, calibration, &source, &text, &options, &progress)?;
    drop(engine);
    let _ = std::fs::remove_dir_all(&temporary);
    let name = args.src.file_name().unwrap_or_default().to_string_lossy();
    let title = format!("Flipped signs: {name}, recipe {}", recipe.name);
    let table = flips::markdown(&title, &found);
    for (file, text) in [
        ("flips.md", table.clone()),
        ("flips.csv", flips::csv(&found)),
        ("flips.svg", flips::plot(&title, &found)),
    ] {
        write_whole(&args.out.join(file), &text)?;
    }
    print(table.trim_end())?;
    print(format_args!(
        "\nThe binarized file has {:.3} true bits per parameter.",
        report.true_bits_per_parameter
    ))?;
    Ok(())
}

/// The layout of the text.
fn layout(args: &FlipArgs) -> TextLayout {
    match &args.separator {
        Some(separator) => TextLayout::Documents(separator.clone()),
        None if is_json_lines(&args.text) => TextLayout::JsonLines,
        None => TextLayout::Whole,
    }
}
