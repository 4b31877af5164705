//! `stb-run perplexity`.

use std::io::{IsTerminal, Write};

use stb_runtime::{Error, PerplexityOptions, perplexity as measure};

use super::{PerplexityArgs, open_exact, terminal};

pub(super) fn perplexity(args: &PerplexityArgs) -> anyhow::Result<()> {
    let text = std::fs::read(&args.text).map_err(|e| Error::io(&args.text, e))?;
    let text = String::from_utf8(text)
        .map_err(|_| Error::invalid(format!("{} is not UTF-8 text", args.text.display())))?;
    let (model, _) = open_exact(&args.file, &args.load)?;
    let tokenizer = model.tokenizer()?;
    let options = PerplexityOptions {
        context: args.ctx.unwrap_or(model.spec.context_length as usize),
        windows: args.windows,
        separator: args.separator.clone(),
    };
    let show = std::io::stderr().is_terminal();
    let progress = |done: usize, all: usize| {
        if terminal::interrupted() {
            std::process::exit(130);
        }
        if show && (done == all || done.is_multiple_of((all / 200).max(1))) {
            let end = if done == all { "\r\x1b[K" } else { "" };
            let _ = write!(std::io::stderr(), "\rwindow {done} of {all}{end}");
        }
    };
    let result = measure(&model, &tokenizer, &text, &options, &progress)?;
    let bits = model.file_bytes as f64 * 8.0 / model.parameters() as f64;
    if args.json {
        let json = serde_json::json!({
            "perplexity": result.perplexity,
            "mean_nll": result.mean_nll,
            "standard_error": result.standard_error,
            "tokens": result.tokens,
            "windows": result.windows,
            "context": result.context,
            "text_bytes": text.len(),
            "separator": args.separator,
            "parameters": model.parameters(),
            "file_bytes": model.file_bytes,
            "true_bits_per_parameter": bits,
            "isa": model.isa.name(),
        });
        terminal::line(json)?;
        return Ok(());
    }
    let documents = match &args.separator {
        Some(s) => format!(", documents split at {s:?}"),
        None => String::new(),
    };
    // One standard error of the mean loss, carried over to the perplexity.
    let spread = result.perplexity * result.standard_error;
    terminal::line(format_args!(
        "perplexity {:.4} ± {spread:.4}\n\
         {} windows of {} tokens, not overlapping, from a text of {} tokens{documents}\n\
         {} bytes, {bits:.3} true bits per parameter",
        result.perplexity, result.windows, result.context, result.tokens, model.file_bytes
    ))?;
    Ok(())
}
