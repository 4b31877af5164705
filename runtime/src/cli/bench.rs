//! `stb-run bench`: prefill and decode speed with their spread.

use std::time::Instant;

use stb_runtime::{Error, Model, State};

use super::{BenchArgs, open, terminal};

pub(super) fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let (model, load) = open(&args.file, &args.load)?;
    let longest = args.prompt.max(args.depth + args.tokens);
    if args.prompt < 1 || args.tokens < 1 {
        return Err(Error::usage("give at least one prompt token and one token to generate").into());
    }
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    for run in 0..=args.runs {
        let prompt_time = time_prefill(&model, longest, args.prompt)?;
        let token_time = time_decode(&model, longest, args.depth, args.tokens)?;
        if terminal::interrupted() {
            return Ok(());
        }
        if run > 0 {
            prefill.push(args.prompt as f64 / prompt_time);
            decode.push(args.tokens as f64 / token_time);
        }
    }
    let (prefill, decode) = (Spread::of(prefill), Spread::of(decode));
    let bytes = model.bytes_per_token();
    let bandwidth = |rate: f64| rate * bytes as f64 / 1e9;
    if args.json {
        let json = serde_json::json!({
            "file_bytes": model.file_bytes,
            "parameters": model.parameters(),
            "isa": model.isa.name(),
            "threads": model.pool.threads(),
            "load_seconds": load.as_secs_f64(),
            "prompt_tokens": args.prompt,
            "depth": args.depth,
            "tokens": args.tokens,
            "runs": args.runs,
            "prefill_tokens_per_second": prefill.json(),
            "decode_tokens_per_second": decode.json(),
            "weight_bytes_per_token": bytes,
            "decode_gigabytes_per_second": bandwidth(decode.median),
            "peak_memory_bytes": terminal::peak_memory(),
        });
        terminal::line(json)?;
        return Ok(());
    }
    terminal::line(format_args!(
        "{}, {} parameters, {}, {} threads, {} runs\n\
         load                    {:>10.1} ms\n\
         prefill {:>6} tokens   {:>10.1} tokens/s {prefill}\n\
         decode  {:>6} tokens   {:>10.1} tokens/s {decode}\n\
         weights read per token  {:>10}\n\
         decode bandwidth        {:>10.2} GB/s",
        terminal::bytes(model.file_bytes),
        model.parameters(),
        model.isa.name(),
        model.pool.threads(),
        args.runs,
        load.as_secs_f64() * 1e3,
        args.prompt,
        prefill.median,
        args.tokens,
        decode.median,
        terminal::bytes(bytes),
        bandwidth(decode.median),
    ))?;
    Ok(())
}

/// Token ids spread over the vocabulary; what they mean does not matter for speed.
fn token(model: &Model, i: usize) -> u32 {
    ((i * 7919 + 1) % model.embeddings.rows()) as u32
}

fn time_prefill(model: &Model, context: usize, count: usize) -> Result<f64, Error> {
    let tokens: Vec<u32> = (0..count).map(|i| token(model, i)).collect();
    let mut state = State::new(model, context);
    let started = Instant::now();
    model.forward(&mut state, &tokens)?;
    Ok(started.elapsed().as_secs_f64())
}

fn time_decode(model: &Model, context: usize, depth: usize, count: usize) -> Result<f64, Error> {
    let mut state = State::new(model, context);
    if depth > 0 {
        let tokens: Vec<u32> = (0..depth).map(|i| token(model, i)).collect();
        model.forward(&mut state, &tokens)?;
    }
    let started = Instant::now();
    for i in 0..count {
        model.forward(&mut state, &[token(model, depth + i)])?;
    }
    Ok(started.elapsed().as_secs_f64())
}

/// Median and range of several runs.
struct Spread {
    all: Vec<f64>,
    median: f64,
}

impl Spread {
    fn of(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        let median = (all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2.0;
        Self { all, median }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({ "median": self.median, "min": self.all.first(), "max": self.all.last() })
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (low, high) = (self.all[0], self.all[self.all.len() - 1]);
        write!(f, "(median; {low:.1} to {high:.1})")
    }
}
