//! Recipes: the methods for all tensors, and the calibration.
//!
//! A recipe is written as TOML ([`RecipeFile`]) and resolved once, when it is loaded, into checked values
//! ([`Recipe`]).

mod calibration;
mod file;
mod linear;
mod presets;
mod problem;
mod resolve;

pub use calibration::{Calibration, Draw};
pub(crate) use file::RENAMED;
pub use file::{CalibrationFile, LinearFile, RecipeFile, RoundingFile};
pub use linear::{Goal, LinearRecipe};
pub use presets::{DEFAULT, FOR_USE, PRESETS};
pub use resolve::Recipe;
