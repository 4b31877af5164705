//! Greedy answers of the dense model and of a converted file to the same questions.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use stb_kernels::Pool;
use stb_runtime::{
    Checkpoint, Engine, Error, GenerateRequest, Message, OpenOptions, PromptInput, Result, Sampler,
    SamplerOptions, Session, SessionOptions,
};

use crate::interrupt::interrupted;
use crate::quality::AnswerPair;
use crate::system::available_memory;

/// The questions: a fact, a number, a sentence.
const QUESTIONS: [&str; 3] = [
    "What is the capital of France?",
    "How many days are in a week?",
    "Say hello to my friend Anna.",
];
/// Tokens of an answer. A broken file shows within a few.
const TOKENS: usize = 24;
/// Memory for the cache: questions and answers are short.
const CONTEXT: usize = 512;

/// Asks the dense model and `file` the same questions. None are asked if the model has no chat template, or if the
/// checkpoint would take more than half of the memory that is free.
///
/// # Errors
/// Those of [`Engine::open_stb`], [`Engine::from_checkpoint`] and [`Session::generate`].
pub fn compare_answers(checkpoint: &Checkpoint, file: &Path) -> Result<Vec<AnswerPair>> {
    let mapped: u64 = checkpoint.files.iter().map(|f| f.bytes.len() as u64).sum();
    let needed = mapped.saturating_add(checkpoint.owned_bytes());
    let fits = available_memory().is_none_or(|free| needed <= free / 2);
    if checkpoint.chat_template.is_none() || !fits {
        return Ok(Vec::new());
    }
    let threads = Some(rayon::current_num_threads());
    let converted = Engine::open_stb(file, &OpenOptions { threads, ..OpenOptions::default() })?;
    let file = answers(converted)?;
    let pool = Pool::new(rayon::current_num_threads())
        .map_err(|e| Error::usage(format!("cannot start threads: {e}; try fewer (-t)")))?;
    let mut dense = Engine::from_checkpoint(checkpoint)?;
    dense.pool = pool;
    let source = answers(dense)?;
    let pairs = QUESTIONS.iter().zip(source).zip(file);
    Ok(pairs
        .map(|((question, source), file)| AnswerPair { question: (*question).into(), source, file })
        .collect())
}

/// The answers of a model, fewer if the user has asked to stop.
fn answers(engine: Engine) -> Result<Vec<String>> {
    let context = CONTEXT.min(engine.model.spec.context_length as usize);
    let options = SessionOptions { context: Some(context), template: true };
    let mut session = Session::new(Arc::new(engine), options)?;
    let mut found = Vec::new();
    for question in QUESTIONS {
        let messages = [Message::new("user", question)];
        let request = GenerateRequest {
            max_tokens: Some(TOKENS),
            ..GenerateRequest::new(PromptInput::Messages(&messages))
        };
        let mut sampler =
            Sampler::new(SamplerOptions { temperature: 0.0, ..SamplerOptions::default() });
        let answer = session.generate(&request, &mut sampler, |_| match interrupted() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        })?;
        found.push(answer.text.trim().to_owned());
    }
    Ok(found)
}
