//! One answer to one prompt.

use std::io::{IsTerminal, Read};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stb_runtime::{
    ChatTemplate, Engine, Error, Finish, GenerateOptions, Generated, Message, Sampler,
    SamplerOptions, State, Tokenizer, generate,
};

use super::{RunArgs, SamplingArgs, chat, open, terminal};

/// Everything a conversation needs.
pub(super) struct Session {
    pub model: Engine,
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub state: State,
    /// Tokens in `state`.
    pub cached: Vec<u32>,
    pub load: Duration,
}

impl Session {
    fn open(file: &Path, args: &RunArgs) -> Result<Self, Error> {
        let (model, load) = open(file, &args.load)?;
        let tokenizer = model.tokenizer()?;
        let template = if args.no_template { None } else { model.chat_template(&tokenizer)? };
        let trained = model.spec.context_length as usize;
        let context = if args.ctx == 0 { trained } else { args.ctx };
        if context > trained {
            terminal::note(format_args!(
                "note: the model was made for a context of {trained} tokens"
            ));
        }
        let state = State::new(&model, context);
        Ok(Self { model, tokenizer, template, state, cached: Vec::new(), load })
    }

    /// The tokens of a conversation in the model's own format.
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        let Some(template) = &self.template else {
            let text: Vec<&str> = messages.iter().map(|m| m.content.as_str()).collect();
            return self.tokenizer.encode_prompt(&text.join("\n"));
        };
        let ids = self.tokenizer.encode(&template.render(messages)?)?;
        // Most templates write the begin token themselves.
        match self.tokenizer.bos {
            Some(bos) if ids.first() != Some(&bos) => Ok(std::iter::once(bos).chain(ids).collect()),
            _ => Ok(ids),
        }
    }

    /// Streams the answer to `prompt` to standard output.
    pub fn answer(
        &mut self,
        prompt: &[u32],
        sampler: &mut Sampler,
        options: &GenerateOptions,
    ) -> anyhow::Result<Generated> {
        let mut broken = None;
        let Self { model, tokenizer, state, cached, .. } = self;
        let answer = generate(model, tokenizer, state, cached, prompt, sampler, options, |text| {
            if let Err(e) = terminal::print(text) {
                broken = Some(e);
            }
            broken.is_none() && !terminal::interrupted()
        })?;
        match broken {
            Some(e) => Err(e.into()),
            None => Ok(answer),
        }
    }
}

pub(super) fn run(file: &Path, args: &RunArgs) -> anyhow::Result<()> {
    let mut session = Session::open(file, args)?;
    let options = GenerateOptions {
        max_tokens: args.sampling.tokens,
        stop: args.sampling.stop.clone(),
        stop_at_special: session.template.is_some() && !args.sampling.ignore_eos,
        ignore_end: args.sampling.ignore_eos,
    };
    let sampler = Sampler::new(sampler_options(&args.sampling, &session.model));
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None if std::io::stdin().is_terminal() => {
            return chat::chat(session, args, sampler, options);
        }
        None => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text)?;
            text
        }
    };
    let mut messages: Vec<Message> =
        args.system.iter().map(|text| Message::new("system", text)).collect();
    messages.push(Message::new("user", &text));
    let prompt = session.chat_prompt(&messages)?;
    let mut sampler = sampler;
    let answer = session.answer(&prompt, &mut sampler, &options)?;
    terminal::print("\n")?;
    report(args, &session, &answer);
    Ok(())
}

/// Flags, else what the model file suggests, else our defaults.
fn sampler_options(args: &SamplingArgs, model: &Engine) -> SamplerOptions {
    let default = SamplerOptions::default();
    let file = |key: &str| model.sampling_default(key);
    let number = |flag: Option<f32>, key: &str, default: f32| {
        flag.or_else(|| file(key).map(|v| v as f32)).unwrap_or(default)
    };
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    SamplerOptions {
        repeat_penalty: number(args.repeat_penalty, "repetition_penalty", default.repeat_penalty),
        repeat_last: default.repeat_last,
        temperature: number(args.temp, "temperature", default.temperature),
        top_k: args.top_k.or_else(|| file("top_k").map(|v| v as usize)).unwrap_or(default.top_k),
        top_p: number(args.top_p, "top_p", default.top_p),
        min_p: number(args.min_p, "min_p", default.min_p),
        seed: args.seed.unwrap_or(clock.as_nanos() as u64),
    }
}

/// Timings on standard error.
pub(super) fn report(args: &RunArgs, session: &Session, answer: &Generated) {
    let timings = &answer.timings;
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    let prefill = rate(timings.prefill_tokens, timings.prefill);
    let decode = rate(timings.decode_tokens, timings.decode);
    let memory = terminal::peak_memory();
    if args.json_stats {
        let stats = serde_json::json!({
            "load_seconds": session.load.as_secs_f64(),
            "checksums_verified": session.model.verified,
            "file_bytes": session.model.file_bytes,
            "device": session.model.device_name().unwrap_or_else(|| "cpu".into()),
            "isa": session.model.isa.name(),
            "threads": session.model.pool.threads(),
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
    } else if !args.quiet {
        let checked = if session.model.verified { "checked" } else { "not checked" };
        terminal::note(format_args!(
            "\n[load {:.0} ms, {} {checked} | prompt {} tokens, {prefill:.0}/s | answer {} tokens, \
             {decode:.1}/s, ended by {} | memory {}]",
            session.load.as_secs_f64() * 1e3,
            terminal::bytes(session.model.file_bytes),
            timings.prefill_tokens,
            timings.decode_tokens,
            finish_name(answer.finish),
            memory.map_or("unknown".into(), terminal::bytes),
        ));
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
