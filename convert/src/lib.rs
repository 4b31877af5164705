//! Converts dense LLaMA checkpoints to `.stb` files.
//!
//! [`convert`] reads a checkpoint, runs the calibration text through it one decoder layer at a
//! time, quantizes every linear layer against the Hessian of its inputs, and streams packed
//! tensors into a file. A [`Recipe`] assigns methods to tensors; [`plan()`] gives the size of every
//! tensor before any weight is quantized.

pub mod allocation;
pub(crate) mod backward;
pub mod budget;
pub mod calibration;
pub mod card;
pub mod check;
pub mod compute;
pub mod digest;
pub mod distill;
pub mod export;
pub mod flips;
pub mod hessian;
pub mod inspect;
pub mod interrupt;
mod memory;
pub mod metadata;
pub mod output;
pub mod pipeline;
pub mod plan;
pub mod plot;
pub mod prepare;
pub(crate) mod products;
pub mod quality;
pub mod quantize;
pub mod recipe;
pub mod report;
pub mod request;
pub mod resume;
pub mod sensitivity;
mod smallest;
pub mod study;
pub mod system;
pub(crate) mod tables;
pub mod verify;
pub mod written;

pub use pipeline::{Job, Progress, convert};
pub use plan::{Plan, plan};
pub use recipe::Recipe;
