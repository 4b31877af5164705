//! `stb-run bench`: prefill and decode speed with their spread, and the limits of the machine.

use std::fmt;
use std::time::Instant;

use stb_kernels::probe;
use stb_runtime::{Engine, Error, State};

use super::args::BenchArgs;
use super::load::open;
use super::terminal;

pub(super) fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let (engine, load) = open(&args.file, &args.load)?;
    let [prompt, tokens, depth, batch] =
        [args.prompt, args.tokens, args.depth, args.batch].map(|n| n as usize);
    let mut state = State::new(&engine, 1);
    engine.forward(&mut state, &[token(&engine, 0)])?;
    let first_token = started.elapsed().as_secs_f64();
    let mut runs = Runs::default();
    for run in 0..=args.runs {
        let prefill = time_prefill(&engine, prompt)?;
        let (decode, cache) = time_decode(&engine, depth, tokens, batch)?;
        // The probes measure the CPU.
        let on_cpu = engine.device_name().is_none();
        let ceilings = on_cpu.then(|| (time_read(&engine), time_multiply(&engine)));
        if terminal::interrupted() {
            return Ok(());
        }
        runs.cache_bytes = cache;
        if run > 0 {
            runs.prefill.push(prompt as f64 / prefill);
            runs.decode.push((tokens * batch) as f64 / decode);
            runs.read.extend(ceilings.map(|c| c.0));
            runs.multiply.extend(ceilings.map(|c| c.1));
        }
    }
    let report = Report::new(&engine, args, runs, load.as_secs_f64(), first_token);
    if args.json {
        terminal::line(report.json(args))?;
    } else {
        terminal::line(report.text(args))?;
    }
    Ok(())
}

/// Token ids spread over the vocabulary. Their meaning does not affect speed.
fn token(engine: &Engine, i: usize) -> u32 {
    ((i * 7919 + 1) % engine.model.embeddings.rows()) as u32
}

fn time_prefill(engine: &Engine, count: usize) -> Result<f64, Error> {
    let tokens: Vec<u32> = (0..count).map(|i| token(engine, i)).collect();
    let mut state = State::new(engine, count);
    let started = Instant::now();
    engine.forward(&mut state, &tokens)?;
    Ok(started.elapsed().as_secs_f64())
}

/// Decodes `count` tokens in each of `batch` sequences after `depth` tokens. Returns the seconds, and
/// the bytes of the KV cache of one sequence at the end.
fn time_decode(
    engine: &Engine,
    depth: usize,
    count: usize,
    batch: usize,
) -> Result<(f64, usize), Error> {
    /// Prompt tokens per pass, as for a real prompt.
    const CHUNK: usize = 512;
    let mut states: Vec<State> = (0..batch).map(|_| State::new(engine, depth + count)).collect();
    let prompt: Vec<u32> = (0..depth).map(|i| token(engine, i)).collect();
    for state in &mut states {
        for chunk in prompt.chunks(CHUNK) {
            engine.forward(state, chunk)?;
        }
    }
    let started = Instant::now();
    for i in 0..count {
        if let [state] = &mut states[..] {
            engine.forward(state, &[token(engine, depth + i)])?;
        } else {
            let tokens: Vec<u32> = (0..batch).map(|b| token(engine, depth + i + b)).collect();
            engine.forward_batch(&mut states, &tokens)?;
        }
    }
    Ok((started.elapsed().as_secs_f64(), states[0].cache_bytes()))
}

/// Memory bandwidth in bytes per second: the threads read the weights without computing.
fn time_read(engine: &Engine) -> f64 {
    const PIECE: usize = 1 << 18;
    let pieces: Vec<&[u8]> =
        engine.model.matrices().flat_map(|w| w.bytes().chunks(PIECE)).collect();
    let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    // Small models are read several times for a measurable duration.
    let rounds = ((64 << 20) / bytes.max(1)).max(1);
    let started = Instant::now();
    for _ in 0..rounds {
        engine.pool.run(pieces.len(), |i| {
            std::hint::black_box(probe::read(engine.isa, pieces[i]));
        });
    }
    (rounds * bytes) as f64 / started.elapsed().as_secs_f64()
}

/// 8-bit multiplications per second of all threads, with operands in registers or cache.
fn time_multiply(engine: &Engine) -> f64 {
    const COUNT: u64 = 1 << 30;
    let started = Instant::now();
    let threads = engine.pool.threads();
    engine.pool.run(threads, |_| {
        std::hint::black_box(probe::multiply(engine.isa, COUNT));
    });
    (threads as u64 * COUNT) as f64 / started.elapsed().as_secs_f64()
}

#[derive(Default)]
struct Runs {
    prefill: Vec<f64>,
    decode: Vec<f64>,
    read: Vec<f64>,
    multiply: Vec<f64>,
    cache_bytes: usize,
}

struct Report<'a> {
    engine: &'a Engine,
    load: f64,
    first_token: f64,
    prefill: Spread,
    decode: Spread,
    read: Spread,
    multiply: Spread,
    cache_bytes: usize,
    /// Number of weights that a token is multiplied with, without lm_head.
    layer_weights: f64,
    /// Number of weights that a token is multiplied with, with lm_head.
    weights: f64,
    /// Bytes per second of weights and KV cache that decoding reads.
    bandwidth: f64,
}

impl<'a> Report<'a> {
    fn new(engine: &'a Engine, args: &BenchArgs, runs: Runs, load: f64, first_token: f64) -> Self {
        let size = |w: &stb_runtime::Weight| (w.rows() * w.cols()) as f64;
        let weights = engine.model.active_weights() as f64;
        let decode = Spread::of(runs.decode);
        let passes = decode.median / f64::from(args.batch);
        let read =
            engine.model.bytes_per_token() as f64 + f64::from(args.batch) * runs.cache_bytes as f64;
        Self {
            engine,
            load,
            first_token,
            prefill: Spread::of(runs.prefill),
            bandwidth: passes * read,
            decode,
            read: Spread::of(runs.read),
            multiply: Spread::of(runs.multiply),
            cache_bytes: runs.cache_bytes,
            layer_weights: weights - size(engine.model.lm_head()),
            weights,
        }
    }

    /// Multiplications per second of the prefill, one per weight and token. The lm_head is not counted
    /// because it runs once per prompt.
    fn products(&self) -> f64 {
        self.prefill.median * self.layer_weights
    }

    fn json(&self, args: &BenchArgs) -> serde_json::Value {
        let engine = self.engine;
        serde_json::json!({
            "file_bytes": engine.model.file_bytes,
            "parameters": engine.model.parameters(),
            "device": engine.device_name().unwrap_or_else(|| "cpu".into()),
            "isa": engine.isa.name(),
            "threads": engine.pool.threads(),
            "exact": engine.exact,
            "kv": format!("{:?}", engine.kv).to_lowercase(),
            "load_seconds": self.load,
            "first_token_seconds": self.first_token,
            "prompt_tokens": args.prompt,
            "depth": args.depth,
            "tokens": args.tokens,
            "batch": args.batch,
            "runs": args.runs,
            "prefill_tokens_per_second": self.prefill.json(),
            "prefill_products_per_second": self.products(),
            "machine_products_per_second": self.multiply.json(),
            "decode_tokens_per_second": self.decode.json(),
            "decode_weights_per_second": self.decode.median * self.weights,
            "weight_bytes_per_token": engine.model.bytes_per_token(),
            "cache_bytes": self.cache_bytes,
            "decode_gigabytes_per_second": self.bandwidth / 1e9,
            "machine_read_bytes_per_second": self.read.json(),
            "peak_memory_bytes": terminal::peak_memory(),
        })
    }

    fn text(&self, args: &BenchArgs) -> String {
        let engine = self.engine;
        let of_ceiling = |part: f64, ceiling: &Spread, what: &str, digits: usize| {
            if ceiling.all.is_empty() {
                return String::new();
            }
            let whole = ceiling.median;
            format!(", {:.0} % of the {:.digits$} {what}", 100.0 * part / whole, whole / 1e9)
        };
        format!(
            "{}, {} parameters, {}, {} threads, {} runs\n\
             load                    {:>10.1} ms, first token after {:.1} ms\n\
             prefill {:>6} tokens   {:>10.1} tokens/s {}\n\
             {:24}{:>10.1} G products/s{}\n\
             decode  {:>6} tokens   {:>10.1} tokens/s {}{}\n\
             {:24}{:>10.1} G weights/s\n\
             {:24}{:>10.2} GB/s{}\n\
             per pass                {:>10} of weights, {} of KV cache",
            terminal::bytes(engine.model.file_bytes),
            engine.model.parameters(),
            engine.device_name().unwrap_or_else(|| engine.isa.name().to_owned()),
            engine.pool.threads(),
            args.runs,
            self.load * 1e3,
            self.first_token * 1e3,
            args.prompt,
            self.prefill.median,
            self.prefill,
            "",
            self.products() / 1e9,
            of_ceiling(self.products(), &self.multiply, "G products/s peak", 0),
            args.tokens,
            self.decode.median,
            self.decode,
            if args.batch > 1 { format!(", {} sequences", args.batch) } else { String::new() },
            "",
            self.decode.median * self.weights / 1e9,
            "",
            self.bandwidth / 1e9,
            of_ceiling(self.bandwidth, &self.read, "GB/s memory bandwidth", 2),
            terminal::bytes(engine.model.bytes_per_token()),
            terminal::bytes(self.cache_bytes as u64 * u64::from(args.batch)),
        )
    }
}

/// Median and range of several runs.
struct Spread {
    all: Vec<f64>,
    median: f64,
}

impl Spread {
    /// The spread of `all` runs; the median is NaN if there are none.
    fn of(mut all: Vec<f64>) -> Self {
        all.sort_by(f64::total_cmp);
        let at = |i: usize| all.get(i).copied().unwrap_or(f64::NAN);
        let median = (at(all.len().saturating_sub(1) / 2) + at(all.len() / 2)) / 2.0;
        Self { all, median }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({ "median": self.median, "min": self.all.first(), "max": self.all.last() })
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = (self.all[0], self.all[self.all.len() - 1]);
        write!(f, "(median; {low:.1} to {high:.1})")
    }
}
