//! Runs `.stb` models and dense LLaMA checkpoints: memory mapping, forward pass, tokenizer, chat
//! templates, sampling and evaluation. The program `stb-run` is a thin layer over this crate.
//!
//! ```no_run
//! use stb_runtime::{Engine, OpenOptions, State};
//!
//! let engine = Engine::open("model.stb".as_ref(), &OpenOptions::default())?;
//! let prompt = engine.model.tokenizer()?.encode_prompt("Once upon a time")?;
//! let mut state = State::new(&engine, 512);
//! let logits = engine.forward(&mut state, &prompt)?;
//! # Ok::<(), stb_runtime::Error>(())
//! ```

mod attention;
pub mod block;
mod checkpoint;
mod config;
mod cpu;
mod device;
mod elementwise;
mod engine;
mod error;
mod eval;
mod experts;
mod forward;
mod generate;
mod kind;
mod kv_cache;
mod layer;
mod linear;
mod map;
mod messages;
mod model;
mod names;
mod observer;
mod panics;
mod pass;
mod ragged;
mod rope;
mod routing;
mod sampler;
pub mod scheduler;
mod scratch;
mod sequence;
#[cfg(feature = "serve")]
pub mod serve;
mod session;
mod state;
mod stop;
mod sublayer;
mod template;
mod threads;
mod token_bytes;
mod tokenizer;
mod verified;
mod vocab;
mod weights;

pub use checkpoint::{Checkpoint, SourceFile, gguf_vocabulary};
pub use config::{Config, TokenConfig, parse_config};
pub use device::{DeviceChoice, DeviceLayers, DeviceObserver, DeviceSublayer};
pub use engine::{Engine, OpenOptions, Verify};
pub use error::{Error, ErrorKind, Result, exit_code};
pub use eval::{
    ChoicePrompt, Divergence, Estimate, KeptLogits, PIECE_BYTES, Perplexity, PerplexityOptions,
    Question, Reference, Score, Task, TaskResult, TextLayout, WindowLogits, WindowLosses,
    ZeroShotOptions, compare_windows, is_json_lines, open_for_windows, open_to_measure, perplexity,
    read_text, score_questions, zero_shot,
};
pub use experts::{Assignment, route_experts};
pub use generate::{CancelToken, Finish, GenerateRequest, Generated, Piece, PromptInput, Timings};
pub use kind::open_stb_file;
pub use layer::{Layer, LayerMatrix, LayerVector};
pub use linear::{LinearScratch, LinearWeight, Rows, Threads, apply, apply_packed};
pub use map::{Bytes, explain_sigbus};
pub use messages::{
    CalledFunction, ChatMessage, ChatRole, ContentPart, MessageCall, MessageContent,
    MessageProblem, for_template, without_template,
};
pub use model::Model;
pub use names::{command_mistake, nearest};
pub use observer::Observer;
pub use pass::SHORT_PROMPT;
pub use sampler::{Sampler, SamplerInput, SamplerOptions, SamplingRange, random_seed};
pub use session::{Session, SessionOptions};
pub use state::State;
pub use stb_kernels::kv::KvKind;
pub use sublayer::Sublayer;
pub use template::{ChatInput, ChatTemplate, Message};
pub use threads::default_threads;
pub use tokenizer::{TextStream, Tokenizer};
pub use vocab::{TokenKind, Vocabulary, VocabularyKind, from_folder, tokenizer_json};
pub use weights::Weight;
