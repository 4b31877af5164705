//! Modules: kernel sources with their macros.

use std::fmt;
use std::hash::{Hash, Hasher};

/// A header that kernel sources include.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// Its name in `#include`.
    pub(super) name: &'static str,
    /// Its text.
    pub(super) text: &'static str,
}

/// The rate of an N:M encoding, which its sources take as the macros `NM_N` and `NM_M`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct NmRate {
    /// The most weights kept in a group.
    pub n: u8,
    /// Columns of a group.
    pub m: u8,
}

/// A source file with its macros, which is compiled and loaded as one unit. Modules are small, so
/// that a model compiles only the kernels that it needs.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Its name in messages, without the rate.
    pub(super) label: &'static str,
    /// Its file in `kernels/cuda`.
    pub file: &'static str,
    /// The text of that file.
    pub(super) source: &'static str,
    /// The headers that it includes besides [`COMMON_HEADERS`].
    pub(super) headers: &'static [Header],
    /// Macros, as NAME=VALUE.
    pub(super) macros: &'static [&'static str],
    /// The rate, for the sources of N:M encodings.
    pub(super) rate: Option<NmRate>,
}

impl Module {
    /// The module's name in messages.
    #[must_use]
    pub fn name(&self) -> String {
        match self.rate {
            Some(NmRate { n, m }) => format!("{} {n}:{m}", self.label),
            None => self.label.to_owned(),
        }
    }

    /// The macros that the compiler defines, as NAME=VALUE.
    #[must_use]
    pub fn defines(&self) -> Vec<String> {
        let rate = self.rate.map(|NmRate { n, m }| [format!("NM_N={n}"), format!("NM_M={m}")]);
        self.macros.iter().map(|m| (*m).to_owned()).chain(rate.into_iter().flatten()).collect()
    }

    /// The identity of a module. The texts are left out, because every launch looks a module up.
    fn key(&self) -> (&'static str, &'static str, Option<NmRate>) {
        (self.label, self.file, self.rate)
    }

    /// The same sources for a rate.
    pub(super) const fn at_rate(self, rate: NmRate) -> Self {
        Self { rate: Some(rate), ..self }
    }
}

impl PartialEq for Module {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Module {}

impl Hash for Module {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// A header of `kernels/cuda`.
macro_rules! header {
    ($file:literal) => {
        $crate::cuda::module::Header {
            name: $file,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/", $file)),
        }
    };
}
pub(super) use header;

/// A module: its label, its file in `kernels/cuda`, its macros, and its own headers.
macro_rules! module {
    ($label:expr, $file:literal $(, $define:expr)* $(; $($header:expr),*)?) => {
        $crate::cuda::module::Module {
            label: $label,
            file: $file,
            source: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/", $file)),
            headers: &[$($($header),*)?],
            macros: &[$($define),*],
            rate: None,
        }
    };
}
pub(super) use module;

/// The headers that every module may include.
pub(super) const COMMON_HEADERS: &[Header] = &[header!("common.cuh"), header!("ptx.cuh")];
