//! The native part of the Python package `stb`: classes and functions over the crates of the workspace.
//!
//! Every function that takes time releases the GIL, and lets Ctrl-C and callbacks of the user end it: see
//! [`waiting`]. `package/stb/_native.pyi` describes the module to type checkers.

#![forbid(unsafe_code)]

mod answer;
mod conversion;
mod errors;
mod evaluation;
mod file;
mod loaded;
mod model;
mod options;
mod packed;
mod tensor;
mod tokenizer;
mod waiting;

/// The module `stb._native`.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::answer::Generation;
    #[pymodule_export]
    use crate::conversion::{convert, recipes, verify};
    #[pymodule_export]
    use crate::evaluation::{Divergence, Perplexity};
    #[pymodule_export]
    use crate::model::{Model, open};
    #[pymodule_export]
    use crate::packed::{linear, rows, set_threads};
    #[pymodule_export]
    use crate::tensor::Tensor;
    #[pymodule_export]
    use crate::tokenizer::Tokenizer;
}
