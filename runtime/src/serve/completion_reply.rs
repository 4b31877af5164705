//! The response to a completion, whole or in chunks.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use utoipa::ToSchema;

use super::models::Loaded;
use super::reply::{LogprobEntry, ReplyHead, TimingsBody, Totals, UsageBody, finish_name};
use super::streaming::Assembler;
use crate::scheduler::Event;

/// A response to a completion, or a chunk of it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TextCompletion {
    id: String,
    /// `text_completion`.
    object: &'static str,
    /// Seconds since 1970.
    created: i64,
    model: String,
    choices: Vec<TextChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<TimingsBody>,
}

/// An answer, or a piece of it.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct TextChoice {
    index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    /// `stop` or `length`.
    finish_reason: Option<&'static str>,
}

/// Log probabilities of the tokens of an answer.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    /// The most likely tokens in place of each.
    top_logprobs: Vec<BTreeMap<String, f32>>,
    /// Where each token begins in the text, in characters.
    text_offset: Vec<usize>,
}

/// Makes chunks of events.
pub(crate) struct CompletionAssembler {
    head: ReplyHead,
    model: Arc<Loaded>,
    answers: Vec<TextProgress>,
    /// Answers to each prompt.
    per_prompt: usize,
    /// What is repeated before the answers to each prompt.
    echo: Vec<String>,
    reports: bool,
    totals: Totals,
    include_usage: bool,
}

/// An answer in progress.
#[derive(Clone, Default)]
struct TextProgress {
    /// Characters of the tokens so far.
    characters: usize,
    begun: bool,
    done: bool,
}

impl CompletionAssembler {
    /// For so many answers in all, `per_prompt` to each prompt. `reports` says whether log probabilities are reported.
    pub fn new(
        model: Arc<Loaded>,
        answers: usize,
        per_prompt: usize,
        echo: Vec<String>,
        reports: bool,
        include_usage: bool,
    ) -> Self {
        Self {
            head: ReplyHead::new("cmpl", &model),
            model,
            answers: vec![TextProgress::default(); answers],
            per_prompt,
            echo,
            reports,
            totals: Totals::default(),
            include_usage,
        }
    }

    /// The whole response that `chunks` make up.
    pub fn whole(&self, chunks: Vec<TextCompletion>) -> TextCompletion {
        let choice = |index| TextChoice {
            index,
            logprobs: self.reports.then(TextLogprobs::default),
            ..TextChoice::default()
        };
        let mut choices: Vec<TextChoice> = (0..self.answers.len()).map(choice).collect();
        for piece in chunks.into_iter().flat_map(|chunk| chunk.choices) {
            let choice = &mut choices[piece.index];
            choice.text.push_str(&piece.text);
            if let (Some(all), Some(new)) = (&mut choice.logprobs, piece.logprobs) {
                all.tokens.extend(new.tokens);
                all.token_logprobs.extend(new.token_logprobs);
                all.top_logprobs.extend(new.top_logprobs);
                all.text_offset.extend(new.text_offset);
            }
            choice.finish_reason = choice.finish_reason.or(piece.finish_reason);
        }
        let (usage, timings) = (Some(self.totals.usage()), Some(self.totals.timings()));
        TextCompletion { usage, timings, ..self.chunk(choices) }
    }

    fn chunk(&self, choices: Vec<TextChoice>) -> TextCompletion {
        let ReplyHead { id, created, model } = self.head.clone();
        TextCompletion {
            id,
            object: "text_completion",
            created,
            model,
            choices,
            usage: None,
            timings: None,
        }
    }

    /// What precedes the first text of an answer.
    fn echoed(&mut self, index: usize) -> String {
        if std::mem::replace(&mut self.answers[index].begun, true) {
            return String::new();
        }
        self.echo.get(index / self.per_prompt).cloned().unwrap_or_default()
    }

    fn logprobs(&mut self, index: usize, entry: LogprobEntry) -> TextLogprobs {
        let progress = &mut self.answers[index];
        let offset = progress.characters;
        progress.characters += entry.token.chars().count();
        let top = entry.top_logprobs.into_iter().map(|top| (top.token, top.logprob));
        TextLogprobs {
            tokens: vec![entry.token],
            token_logprobs: vec![entry.logprob],
            top_logprobs: vec![top.collect()],
            text_offset: vec![offset],
        }
    }
}

impl Assembler for CompletionAssembler {
    type Chunk = TextCompletion;

    fn begin(&mut self) -> Vec<TextCompletion> {
        Vec::new()
    }

    fn push(&mut self, index: usize, event: Event) -> Vec<TextCompletion> {
        match event {
            Event::Token { token, text, logprob } => {
                let text = self.echoed(index) + &text;
                let entry = logprob.map(|logprob| LogprobEntry::new(&self.model, token, &logprob));
                let logprobs = entry.map(|entry| self.logprobs(index, entry));
                if text.is_empty() && logprobs.is_none() {
                    return Vec::new();
                }
                vec![self.chunk(vec![TextChoice { index, text, logprobs, finish_reason: None }])]
            }
            Event::Done { finish, text, usage } => {
                let text = self.echoed(index) + &text;
                self.totals.add(&usage, index.is_multiple_of(self.per_prompt));
                self.answers[index].done = true;
                let finish_reason = Some(finish_name(finish));
                let mut chunk =
                    self.chunk(vec![TextChoice { index, text, logprobs: None, finish_reason }]);
                if self.is_complete() && !self.include_usage {
                    chunk.timings = Some(self.totals.timings());
                }
                vec![chunk]
            }
            // The generation reports failures as errors.
            Event::Failed(_) => Vec::new(),
        }
    }

    fn end(&mut self) -> Vec<TextCompletion> {
        if !self.include_usage {
            return Vec::new();
        }
        let (usage, timings) = (Some(self.totals.usage()), Some(self.totals.timings()));
        vec![TextCompletion { usage, timings, ..self.chunk(Vec::new()) }]
    }

    fn is_complete(&self) -> bool {
        self.answers.iter().all(|answer| answer.done)
    }

    fn counts(&self) -> (usize, usize) {
        self.totals.counts()
    }
}
