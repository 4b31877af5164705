//! Runs `.stb` models and dense LLaMA checkpoints: memory map, decoder graph, tokenizer, chat
//! template, sampling and evaluation. The program `stb-run` is a thin layer over this crate.
//!
//! ```no_run
//! use stb_runtime::{Model, OpenOptions, State};
//!
//! let model = Model::open("model.stb".as_ref(), &OpenOptions::default())?;
//! let mut state = State::new(&model, 512);
//! let logits = model.forward(&mut state, &model.tokenizer()?.encode_prompt("Once upon a time")?)?;
//! # Ok::<(), stb_runtime::Error>(())
//! ```

mod attention;
mod checkpoint;
mod config;
mod device;
mod error;
mod eval;
mod forward;
mod generate;
mod linear;
mod map;
mod model;
mod rotary;
mod sampler;
mod template;
mod threads;
mod tokenizer;
mod weights;

pub use checkpoint::{Checkpoint, SourceFile};
pub use config::{TokenConfig, parse_config};
pub use device::{DeviceChoice, DeviceHalf, DeviceLayers, DeviceObserver, Half};
pub use error::{Error, Result, exit_code};
pub use eval::{
    Divergence, Estimate, Item, KeptLogits, Perplexity, PerplexityOptions, Prompt, Reference,
    Score, Task, TaskResult, TextLayout, ZeroShotOptions, open_to_measure, perplexity, score_item,
    zero_shot,
};
pub use forward::{LinearInput, Observer, State};
pub use generate::{Finish, GenerateOptions, Generated, Timings, generate};
pub use linear::{LinearScratch, LinearWeight, Threads, apply, apply_packed};
pub use map::Bytes;
pub use model::{Layer, Model, OpenOptions, Verify};
pub use sampler::{Next, Sampler, SamplerOptions};
pub use stb_kernels::kv::KvKind;
pub use template::{ChatTemplate, Message};
pub use threads::default_threads;
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::Weight;
