//! Streams answers to standard output and reports their timings.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stb_runtime::{
    Error, Finish, GenerateRequest, Generated, Message, PromptInput, Sampler, SamplerOptions,
    Session, SessionOptions,
};

use super::args::{RunArgs, SamplingArgs};
use super::{load, terminal};

/// A session with the command-line arguments of its answers.
pub(super) struct Answerer<'a> {
    pub session: Session,
    sampler: Sampler,
    args: &'a RunArgs,
    load: Duration,
}

impl<'a> Answerer<'a> {
    pub fn open(file: &Path, args: &'a RunArgs) -> Result<Self, Error> {
        let (engine, load) = load::open(file, &args.load)?;
        let context = Some(args.ctx).filter(|n| *n > 0);
        let session = Session::new(
            Arc::new(engine),
            SessionOptions { context, template: !args.no_template },
        )?;
        let trained = session.engine().model.spec.context_length as usize;
        if args.ctx > trained {
            terminal::note(format_args!(
                "note: the model has a context length of {trained} tokens"
            ));
        }
        let sampler = Sampler::new(sampling(&args.sampling, session.suggested_sampling()));
        Ok(Self { session, sampler, args, load })
    }

    /// Streams the answer to `messages` to standard output.
    pub fn answer(&mut self, messages: &[Message]) -> anyhow::Result<Generated> {
        let request = GenerateRequest {
            max_tokens: self.args.sampling.tokens,
            stop: &self.args.sampling.stop,
            ignore_end: self.args.sampling.ignore_eos,
            cancel: Some(terminal::cancel_token()),
            ..GenerateRequest::new(PromptInput::Messages(messages))
        };
        let mut printed = Ok(());
        let answer = self.session.generate(&request, &mut self.sampler, |piece| {
            printed = terminal::print(piece.text);
            if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        printed?;
        Ok(answer)
    }

    /// Prints timings to standard error.
    pub fn report(&self, answer: &Generated) {
        let timings = &answer.timings;
        let engine = self.session.engine();
        let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let prefill = rate(timings.prefill_tokens, timings.prefill);
        let decode = rate(timings.decode_tokens, timings.decode);
        let memory = terminal::peak_memory();
        if self.args.json_stats {
            let stats = serde_json::json!({
                "load_seconds": self.load.as_secs_f64(),
                "checksums_verified": engine.model.verified,
                "file_bytes": engine.model.file_bytes,
                "device": engine.device_name().unwrap_or_else(|| "cpu".into()),
                "isa": engine.isa.name(),
                "threads": engine.pool.threads(),
                "prefill_tokens": timings.prefill_tokens,
                "prefill_seconds": timings.prefill.as_secs_f64(),
                "prefill_tokens_per_second": prefill,
                "decode_tokens": timings.decode_tokens,
                "decode_seconds": timings.decode.as_secs_f64(),
                "decode_tokens_per_second": decode,
                "finish": finish_name(answer.finish),
                "peak_memory_bytes": memory,
            });
            terminal::note(stats);
        } else if !self.args.quiet {
            let checked = if engine.model.verified { "checked" } else { "not checked" };
            terminal::note(format_args!(
                "\n[load {:.0} ms, {} {checked} | prompt {} tokens, {prefill:.0}/s | answer {} tokens, \
                 {decode:.1}/s, ended by {} | memory {}]",
                self.load.as_secs_f64() * 1e3,
                terminal::bytes(engine.model.file_bytes),
                timings.prefill_tokens,
                timings.decode_tokens,
                finish_name(answer.finish),
                memory.map_or("unknown".into(), terminal::bytes),
            ));
        }
    }
}

/// Flags override the values of the model file.
fn sampling(args: &SamplingArgs, suggested: SamplerOptions) -> SamplerOptions {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    SamplerOptions {
        repeat_penalty: args.repeat_penalty.unwrap_or(suggested.repeat_penalty),
        temperature: args.temp.unwrap_or(suggested.temperature),
        top_k: args.top_k.unwrap_or(suggested.top_k),
        top_p: args.top_p.unwrap_or(suggested.top_p),
        min_p: args.min_p.unwrap_or(suggested.min_p),
        seed: args.seed.unwrap_or(clock.as_nanos() as u64),
        ..suggested
    }
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Context => "context",
        Finish::Interrupted => "interrupt",
    }
}
