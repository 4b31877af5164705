//! `stb-run perplexity` and `stb-run zero-shot`.

use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value as Json, json};
use stb_runtime::{
    Divergence, Engine, Error, Estimate, Perplexity, PerplexityOptions, Reference, Task,
    TaskResult, TextLayout, ZeroShotOptions, perplexity as measure, read_text, zero_shot as answer,
};

use super::args::{PerplexityArgs, ZeroShotArgs, task_names};
use super::load::open_exact;
use super::terminal;

pub(super) fn perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let text = read_text(&args.text)?;
    let layout = TextLayout::of(Some(&args.text), args.separator.as_deref(), args.rows)?;
    let engine = open_exact(&args.file, &args.load)?;
    let reference =
        args.reference.as_deref().map(|path| open_exact(path, &args.load)).transpose()?;
    let tokenizer = engine.model.tokenizer()?;
    let options = PerplexityOptions {
        context: args.ctx.unwrap_or(engine.model.spec.context_length as usize),
        windows: args.windows,
        layout,
    };
    let progress = Progress::new("window");
    let result = measure(
        &engine,
        reference.as_ref().map(Reference::new),
        &tokenizer,
        &text,
        &options,
        &|done, all| {
            progress.step(done, all);
            ControlFlow::Continue(())
        },
    )?;
    if args.json {
        return Ok(terminal::line(perplexity_json(args, &engine, &text, &result))?);
    }
    let bits = true_bits(&engine);
    terminal::line(format_args!("perplexity {}", plus_minus(result.perplexity, 4)))?;
    if let Some(divergence) = &result.divergence {
        print_divergence(divergence)?;
    }
    terminal::line(format_args!(
        "{} windows of {} tokens without overlap, from a text of {} tokens ({}); loss over the last \
         {} tokens of each window; ± is one standard error over windows\n\
         {} bytes, {bits:.3} true bits per parameter",
        result.windows,
        result.context,
        result.tokens,
        options.layout.describe(),
        result.context - 1,
        engine.model.file_bytes
    ))?;
    Ok(())
}

fn print_divergence(found: &Divergence) -> std::io::Result<()> {
    let percent =
        |e: Estimate| Estimate { value: e.value * 100.0, standard_error: e.standard_error * 100.0 };
    terminal::line(format_args!(
        "reference  {}\n\
         loss minus reference loss {} nats\n\
         KL divergence {} nats\n\
         same best token {} %",
        plus_minus(found.reference_perplexity, 4),
        plus_minus(found.nll_difference, 5),
        plus_minus(found.kl, 5),
        plus_minus(percent(found.top1), 2),
    ))
}

fn perplexity_json(
    args: &PerplexityArgs,
    engine: &Engine,
    text: &str,
    result: &Perplexity,
) -> Json {
    let mut json = json!({
        "perplexity": result.perplexity.value,
        "perplexity_standard_error": result.perplexity.standard_error,
        "mean_nll": result.nll.value,
        "standard_error": result.nll.standard_error,
        "tokens": result.tokens,
        "windows": result.windows,
        "context": result.context,
        "text_bytes": text.len(),
        "separator": args.separator,
        "rows": args.rows,
        "parameters": engine.model.parameters(),
        "file_bytes": engine.model.file_bytes,
        "true_bits_per_parameter": true_bits(engine),
        "isa": engine.isa.name(),
    });
    if let Some(found) = &result.divergence {
        json["reference"] = json!({
            "perplexity": found.reference_perplexity.value,
            "perplexity_standard_error": found.reference_perplexity.standard_error,
            "nll_difference": found.nll_difference.value,
            "nll_difference_standard_error": found.nll_difference.standard_error,
            "kl": found.kl.value,
            "kl_standard_error": found.kl.standard_error,
            "top1": found.top1.value,
            "top1_standard_error": found.top1.standard_error,
        });
    }
    json
}

pub(super) fn zero_shot(args: &ZeroShotArgs) -> anyhow::Result<()> {
    let mut tasks = args.named.clone();
    for file in &args.tasks {
        let task = Task::from_file(file).ok_or_else(|| {
            Error::usage(format!(
                "the name of {} does not begin with a task's: give it as --task NAME=FILE; {}",
                file.display(),
                task_names()
            ))
        })?;
        tasks.push((task, file.clone()));
    }
    if tasks.is_empty() {
        return Err(Error::usage("give a file of questions").into());
    }
    // All files are read first, so that a mistake in the last one does not cost hours.
    let limit = args.limit.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
    let mut questions = Vec::new();
    for (task, file) in &tasks {
        questions.push(task.read(file, limit)?);
    }
    let engine = open_exact(&args.file, &args.load)?;
    let tokenizer = engine.model.tokenizer()?;
    let context = args.ctx.map_or(engine.model.spec.context_length as usize, |n| n as usize);
    let begin = tokenizer.bos.is_some() && !args.no_begin_token;
    let options = ZeroShotOptions { context, begin };
    let mut results = Vec::new();
    for ((task, file), items) in tasks.iter().zip(&questions) {
        let progress = Progress::new(task.name());
        let step = |done, all| progress.step(done, all);
        let found = answer(&engine, &tokenizer, *task, items, &options, &step)?;
        results.push((file, found));
    }
    if args.json {
        return Ok(terminal::line(zero_shot_json(args, &engine, &options, &results))?);
    }
    print_tasks(&results)?;
    let begin = if begin { "a" } else { "no" };
    terminal::line(format_args!(
        "prompts and scores of lm-evaluation-harness 0.4.13, no examples, {begin} begin token, context \
         {context}; acc: highest likelihood, acc_norm: highest per character; ± is one standard \
         error\n{} bytes, {:.3} true bits per parameter",
        engine.model.file_bytes,
        true_bits(&engine)
    ))?;
    Ok(())
}

fn print_tasks(results: &[(&PathBuf, TaskResult)]) -> std::io::Result<()> {
    let percent = |e: Estimate| {
        plus_minus(Estimate { value: e.value * 100.0, standard_error: e.standard_error * 100.0 }, 2)
    };
    terminal::line(format_args!(
        "{:<14} {:>9}  {:<15} {:<15} {}",
        "task", "questions", "acc %", "acc_norm %", "truncated"
    ))?;
    for (_, result) in results {
        terminal::line(format_args!(
            "{:<14} {:>9}  {:<15} {:<15} {}",
            result.task.name(),
            result.items,
            percent(result.acc),
            result.acc_norm.map_or("-".into(), percent),
            result.truncated
        ))?;
    }
    if results.len() > 1 {
        let mean = results.iter().map(|(_, r)| r.acc.value).sum::<f64>() / results.len() as f64;
        terminal::line(format_args!("{:<14} {:>9}  {:.2}", "mean", "", mean * 100.0))?;
    }
    Ok(())
}

fn zero_shot_json(
    args: &ZeroShotArgs,
    engine: &Engine,
    options: &ZeroShotOptions,
    results: &[(&PathBuf, TaskResult)],
) -> Json {
    let tasks: Vec<Json> = results
        .iter()
        .map(|(file, result)| {
            json!({
                "task": result.task.name(),
                "file": file.file_name().map(|n| n.to_string_lossy()),
                "questions": result.items,
                "acc": result.acc.value,
                "acc_standard_error": result.acc.standard_error,
                "acc_norm": result.acc_norm.map(|e| e.value),
                "acc_norm_standard_error": result.acc_norm.map(|e| e.standard_error),
                "truncated": result.truncated,
            })
        })
        .collect();
    json!({
        "tasks": tasks,
        "context": options.context,
        "begin_token": options.begin,
        "limit": args.limit,
        "parameters": engine.model.parameters(),
        "file_bytes": engine.model.file_bytes,
        "true_bits_per_parameter": true_bits(engine),
        "isa": engine.isa.name(),
    })
}

fn true_bits(engine: &Engine) -> f64 {
    engine.model.file_bytes as f64 * 8.0 / engine.model.parameters() as f64
}

/// `value ± standard error`; without the error if it is unknown.
fn plus_minus(e: Estimate, digits: usize) -> String {
    match e.standard_error.is_nan() {
        true => format!("{:.digits$}", e.value),
        false => format!("{:.digits$} ± {:.digits$}", e.value, e.standard_error),
    }
}

/// Progress on standard error: one rewritten line on a terminal, otherwise a line per minute.
struct Progress {
    what: &'static str,
    terminal: bool,
    started: Instant,
    shown: Mutex<Instant>,
}

impl Progress {
    fn new(what: &'static str) -> Self {
        let now = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        Self { what, terminal, started: now, shown: Mutex::new(now) }
    }

    fn step(&self, done: usize, all: usize) {
        if terminal::interrupted() {
            std::process::exit(130);
        }
        let every = Duration::from_millis(if self.terminal { 200 } else { 60_000 });
        // If another thread holds the lock, that thread shows the progress.
        let Ok(mut shown) = self.shown.try_lock() else { return };
        let last = done == all;
        if last && self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        } else if shown.elapsed() >= every && !last {
            *shown = Instant::now();
            let left = self.started.elapsed().as_secs_f64() * (all - done) as f64 / done as f64;
            let text = format!("{} {done} of {all}, {left:.0} s left", self.what);
            let (before, after) = if self.terminal { ("\r", "\x1b[K") } else { ("", "\n") };
            let _ = write!(std::io::stderr(), "{before}{text}{after}");
        }
    }
}
