//! Streams answers to standard output and reports their timings.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use stb_runtime::{
    Error, Finish, GenerateRequest, Generated, Sampler, Session, SessionOptions, Timings,
};

use super::args::RunArgs;
use super::conversation::{ChatPrompt, Conversation};
use super::settings::SamplingArgs;
use super::{load, terminal};

/// A session with the command-line arguments of its answers.
pub(super) struct Answerer<'a> {
    pub session: Session,
    /// How answers are sampled, with a value for each setting.
    pub settings: SamplingArgs,
    sampler: Sampler,
    args: &'a RunArgs,
    load: Duration,
    /// Of the last answer.
    timings: Option<Timings>,
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
        let suggested = session.suggested_sampling();
        let settings = args.sampling.with_defaults(&suggested);
        let sampler = Sampler::new(settings.options(&suggested));
        Ok(Self { session, settings, sampler, args, load, timings: None })
    }

    /// The file name of the model.
    pub fn name(&self) -> String {
        let source = &self.session.engine().model.source;
        source.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Whether the lines of a chat are kept for later ones.
    pub fn keeps_history(&self) -> bool {
        !self.args.no_history
    }

    /// Samples the next answers with other settings. The random choices go on unless the seed is another one.
    pub fn change_settings(&mut self, settings: SamplingArgs) {
        self.sampler.change(settings.options(&self.session.suggested_sampling()));
        self.settings = settings;
    }

    /// Drops the oldest turns of a conversation that does not fit into the context. Returns how many.
    ///
    /// # Errors
    /// [`Error::Usage`] if the last message alone is too long, the errors of [`Session::encode`].
    pub fn fit(&self, conversation: &mut Conversation) -> Result<usize, Error> {
        let count =
            |c: &Conversation| self.session.encode(c.prompt().input()).map(|tokens| tokens.len());
        let context = self.session.context();
        let fit = conversation.fit(context, self.settings.max_tokens(), count)?;
        if fit.tokens >= context {
            return Err(Error::usage(format!(
                "the message has {} tokens with the instructions, but the context only {context}: shorten it, or \
                 start with a larger --ctx",
                fit.tokens
            )));
        }
        Ok(fit.dropped)
    }

    /// Streams the answer to `prompt` to standard output.
    pub fn answer(&mut self, prompt: &ChatPrompt) -> anyhow::Result<Generated> {
        let request = GenerateRequest {
            max_tokens: self.settings.max_tokens(),
            stop: &self.settings.stop,
            ignore_end: self.settings.ignore_eos,
            cancel: Some(terminal::cancel_token()),
            ..GenerateRequest::new(prompt.input())
        };
        let mut printed = Ok(());
        let answer = self.session.generate(&request, &mut self.sampler, |piece| {
            printed = terminal::print(piece.text);
            if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        printed?;
        self.timings = Some(answer.timings);
        Ok(answer)
    }

    /// Tokens and speed of the last answer, and the memory in use.
    pub fn statistics(&self) -> String {
        let session = &self.session;
        let answer = match &self.timings {
            None => "no answer yet".to_owned(),
            Some(timings) => format!(
                "prompt     {} tokens, {} of them reused; {:.1} tokens/s\nanswer     {} tokens; {:.1} tokens/s",
                timings.prefill_tokens + timings.reused_tokens,
                timings.reused_tokens,
                rate(timings.prefill_tokens, timings.prefill),
                timings.decode_tokens,
                rate(timings.decode_tokens, timings.decode),
            ),
        };
        let memory = |bytes: Option<u64>| bytes.map_or("unknown".into(), terminal::bytes);
        format!(
            "{answer}\nKV cache   {} of {} tokens, {}\nmemory     {}, at most {}; file of {}",
            session.cached().len(),
            session.context(),
            terminal::bytes(session.cache_bytes() as u64),
            memory(terminal::memory()),
            memory(terminal::peak_memory()),
            terminal::bytes(session.engine().model.file_bytes),
        )
    }

    /// Prints timings to standard error.
    pub fn report(&self, answer: &Generated) {
        let timings = &answer.timings;
        let engine = self.session.engine();
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
                "reused_tokens": timings.reused_tokens,
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
            let prompt = match timings.reused_tokens {
                0 => format!("{} tokens", timings.prefill_tokens),
                reused => format!("{} tokens, {reused} reused", timings.prefill_tokens + reused),
            };
            terminal::note(format_args!(
                "\n[load {:.0} ms, {} {checked} | prompt {prompt}, {prefill:.0}/s | answer {} tokens, \
                 {decode:.1}/s, ended by {} | memory {}]",
                self.load.as_secs_f64() * 1e3,
                terminal::bytes(engine.model.file_bytes),
                timings.decode_tokens,
                finish_name(answer.finish),
                memory.map_or("unknown".into(), terminal::bytes),
            ));
        }
    }
}

/// Tokens per second.
fn rate(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Context => "context",
        Finish::Interrupted => "interrupt",
    }
}
