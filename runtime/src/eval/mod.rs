//! Evaluation: perplexity and KL divergence from a reference on a text, accuracy on tasks.

mod distribution;
mod estimate;
mod open;
mod perplexity;
mod reference;
mod tasks;
mod text;
mod window;
mod zero_shot;

pub use estimate::Estimate;
pub use open::{open_for_windows, open_to_measure};
pub use perplexity::{Perplexity, PerplexityOptions, perplexity};
pub use reference::{KeptLogits, Reference};
pub use tasks::{ChoicePrompt, Question, Task};
pub use text::{TextLayout, is_json_lines, read_text};
pub use window::{Divergence, PIECE_BYTES, WindowLogits, WindowLosses, compare_windows};
pub use zero_shot::{Score, TaskResult, ZeroShotOptions, score_questions, zero_shot};
