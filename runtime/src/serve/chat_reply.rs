//! The response to a chat, whole or in chunks.

use std::sync::Arc;

use serde::Serialize;
use utoipa::ToSchema;

use super::calls::CallFormat;
use super::models::Loaded;
use super::part::{Part, ToolCall};
use super::reply::{
    LogprobEntry, ReplyHead, TimingsBody, Totals, UsageBody, finish_name, random_name,
};
use super::splitter::Splitter;
use super::streaming::Assembler;
use crate::messages::function;
use crate::scheduler::Event;

/// A whole response to a chat.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion {
    id: String,
    /// `chat.completion`.
    object: &'static str,
    /// Seconds since 1970.
    created: i64,
    model: String,
    choices: Vec<ChatChoice>,
    usage: UsageBody,
    timings: TimingsBody,
}

/// An answer.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChatChoice {
    index: usize,
    message: AnswerMessage,
    logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    finish_reason: Option<&'static str>,
}

/// The message of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AnswerMessage {
    role: &'static str,
    content: Option<String>,
    /// The text between `<think>` and `</think>`.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallBody>,
}

impl Default for AnswerMessage {
    fn default() -> Self {
        Self { role: "assistant", content: None, reasoning_content: None, tool_calls: Vec::new() }
    }
}

/// A call of a tool.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct CallBody {
    /// Counts the calls of an answer, in chunks only.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    id: String,
    #[serde(rename = "type")]
    kind: String,
    function: CallBodyFunction,
}

/// The function of a call.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct CallBodyFunction {
    name: String,
    /// The arguments, JSON.
    arguments: String,
}

/// Log probabilities of the tokens of an answer.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    content: Vec<LogprobEntry>,
}

/// A chunk of a streamed response.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk {
    id: String,
    /// `chat.completion.chunk`.
    object: &'static str,
    created: i64,
    model: String,
    choices: Vec<ChunkChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<UsageBody>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<TimingsBody>,
}

/// A piece of an answer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChunkChoice {
    index: usize,
    delta: ChunkDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
}

/// What a piece adds to the message.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ChunkDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallBody>,
}

/// Makes chunks of events.
pub(crate) struct ChatAssembler {
    head: ReplyHead,
    model: Arc<Loaded>,
    answers: Vec<ChatProgress>,
    totals: Totals,
    include_usage: bool,
}

/// An answer in progress.
struct ChatProgress {
    splitter: Splitter,
    calls: usize,
    done: bool,
}

impl ChatAssembler {
    /// For as many answers as there are splitters.
    pub fn new(model: Arc<Loaded>, splitters: Vec<Splitter>, include_usage: bool) -> Self {
        let progress = |splitter| ChatProgress { splitter, calls: 0, done: false };
        Self {
            head: ReplyHead::new("chatcmpl", &model),
            model,
            answers: splitters.into_iter().map(progress).collect(),
            totals: Totals::default(),
            include_usage,
        }
    }

    /// The whole response that `chunks` make up.
    pub fn whole(&self, chunks: Vec<ChatChunk>) -> ChatCompletion {
        let choice = |index| ChatChoice { index, ..ChatChoice::default() };
        let mut choices: Vec<ChatChoice> = (0..self.answers.len()).map(choice).collect();
        for piece in chunks.into_iter().flat_map(|chunk| chunk.choices) {
            let choice = &mut choices[piece.index];
            let message = &mut choice.message;
            append(&mut message.content, piece.delta.content);
            append(&mut message.reasoning_content, piece.delta.reasoning_content);
            message
                .tool_calls
                .extend(piece.delta.tool_calls.into_iter().map(|c| CallBody { index: None, ..c }));
            if let Some(logprobs) = piece.logprobs {
                choice.logprobs.get_or_insert_default().content.extend(logprobs.content);
            }
            choice.finish_reason = choice.finish_reason.or(piece.finish_reason);
        }
        for choice in &mut choices {
            let message = &mut choice.message;
            if message.content.is_none() && message.tool_calls.is_empty() {
                message.content = Some(String::new());
            }
        }
        let ReplyHead { id, created, model } = self.head.clone();
        let (usage, timings) = (self.totals.usage(), self.totals.timings());
        ChatCompletion { id, object: "chat.completion", created, model, choices, usage, timings }
    }

    fn chunk(&self, choices: Vec<ChunkChoice>) -> ChatChunk {
        let ReplyHead { id, created, model } = self.head.clone();
        let object = "chat.completion.chunk";
        ChatChunk { id, object, created, model, choices, usage: None, timings: None }
    }

    fn call(&mut self, index: usize, call: ToolCall) -> CallBody {
        let number = self.answers[index].calls;
        self.answers[index].calls += 1;
        // Templates of Mistral's models accept only names of nine letters.
        let id = match self.model.calls {
            CallFormat::Mistral => random_name(9),
            CallFormat::Hermes | CallFormat::Llama3 => format!("call_{}", random_name(20)),
        };
        let function_body = CallBodyFunction { name: call.name, arguments: call.arguments };
        CallBody { index: Some(number), id, kind: function(), function: function_body }
    }

    /// One piece for each part.
    fn pieces(&mut self, index: usize, parts: Vec<Part>) -> Vec<ChunkChoice> {
        let mut pieces = Vec::new();
        for part in parts {
            let mut delta = ChunkDelta::default();
            match part {
                Part::Reasoning(text) => delta.reasoning_content = Some(text),
                Part::Content(text) => delta.content = Some(text),
                Part::Call(call) => delta.tool_calls.push(self.call(index, call)),
            }
            pieces.push(ChunkChoice { index, delta, logprobs: None, finish_reason: None });
        }
        pieces
    }
}

fn append(to: &mut Option<String>, text: Option<String>) {
    if let Some(text) = text {
        to.get_or_insert_default().push_str(&text);
    }
}

impl Assembler for ChatAssembler {
    type Chunk = ChatChunk;

    fn begin(&mut self) -> Vec<ChatChunk> {
        let first = |index| {
            let delta = ChunkDelta {
                role: Some("assistant"),
                content: Some(String::new()),
                ..ChunkDelta::default()
            };
            self.chunk(vec![ChunkChoice { index, delta, logprobs: None, finish_reason: None }])
        };
        (0..self.answers.len()).map(first).collect()
    }

    fn push(&mut self, index: usize, event: Event) -> Vec<ChatChunk> {
        match event {
            Event::Token { token, text, logprob } => {
                let parts = self.answers[index].splitter.push(&text);
                let mut pieces = self.pieces(index, parts);
                if let Some(logprob) = logprob {
                    let entry = LogprobEntry::new(&self.model, token, &logprob);
                    let logprobs = Some(ChatLogprobs { content: vec![entry] });
                    match pieces.first_mut() {
                        Some(piece) => piece.logprobs = logprobs,
                        None => {
                            let delta = ChunkDelta {
                                content: Some(String::new()),
                                ..ChunkDelta::default()
                            };
                            pieces.push(ChunkChoice {
                                index,
                                delta,
                                logprobs,
                                finish_reason: None,
                            });
                        }
                    }
                }
                pieces.into_iter().map(|piece| self.chunk(vec![piece])).collect()
            }
            Event::Done { finish, text, usage } => {
                let mut parts = self.answers[index].splitter.push(&text);
                parts.extend(self.answers[index].splitter.finish());
                let mut pieces = self.pieces(index, parts);
                let name =
                    if self.answers[index].calls > 0 { "tool_calls" } else { finish_name(finish) };
                pieces.push(ChunkChoice {
                    index,
                    delta: ChunkDelta::default(),
                    logprobs: None,
                    finish_reason: Some(name),
                });
                self.totals.add(&usage, index == 0);
                self.answers[index].done = true;
                let mut chunks: Vec<_> =
                    pieces.into_iter().map(|piece| self.chunk(vec![piece])).collect();
                if self.is_complete() && !self.include_usage {
                    let last = chunks.last_mut();
                    let timings = self.totals.timings();
                    last.into_iter().for_each(|chunk| chunk.timings = Some(timings));
                }
                chunks
            }
            // The generation reports failures as errors.
            Event::Failed(_) => Vec::new(),
        }
    }

    fn end(&mut self) -> Vec<ChatChunk> {
        if !self.include_usage {
            return Vec::new();
        }
        let (usage, timings) = (Some(self.totals.usage()), Some(self.totals.timings()));
        vec![ChatChunk { usage, timings, ..self.chunk(Vec::new()) }]
    }

    fn is_complete(&self) -> bool {
        self.answers.iter().all(|answer| answer.done)
    }

    fn counts(&self) -> (usize, usize) {
        self.totals.counts()
    }
}
