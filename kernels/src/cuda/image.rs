//! Compiled kernels.

use std::fmt;

/// A GPU architecture: 80 for compute capability 8.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arch(pub u32);

impl Arch {
    /// From 9.0 on, code may use the features of this one architecture (`wgmma`, block-scaled `mma`).
    fn suffix(self) -> &'static str {
        if self.0 >= 90 { "a" } else { "" }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.0, self.suffix())
    }
}

/// A compiled module for the driver.
pub(super) struct Image {
    pub bytes: Vec<u8>,
    /// Whether it is PTX, which the driver compiles, or a CUBIN.
    pub is_ptx: bool,
    /// The compiler's log with the resources of the kernels; empty for a cached image.
    pub log: String,
    /// The key in the cache.
    pub key: u128,
}
