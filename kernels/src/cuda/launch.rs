//! What is to be launched, as data: planned without a device, so that it can be tested without one.

use bytemuck::NoUninit;

use super::compile::Module;
use super::device::Device;
use super::{Error, Result};

/// A kernel with its grid and its one parameter.
///
/// Plans are pure functions from shapes and addresses to launches; an address is only a number there.
/// [`Device`] runs those whose addresses are of live buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Where the kernel is.
    pub module: Module,
    /// Its name.
    pub kernel: &'static str,
    /// Blocks of the grid.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// The parameter, a struct by value. All addresses in it are whole words.
    pub params: Vec<u64>,
}

impl Launch {
    /// `params` must have the layout of the kernel's parameter.
    pub(super) fn new<P: NoUninit>(
        module: Module,
        kernel: &'static str,
        blocks: [usize; 3],
        threads: u32,
        shared: usize,
        params: &P,
    ) -> Self {
        const { assert!(size_of::<P>().is_multiple_of(8)) };
        let words = bytemuck::bytes_of(params).as_chunks::<8>().0;
        Self {
            module,
            kernel,
            blocks: blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
            threads,
            shared: u32::try_from(shared).unwrap_or(u32::MAX),
            params: words.iter().map(|w| u64::from_ne_bytes(*w)).collect(),
        }
    }
}

/// A size or number of the kernels, all of which count with 32 bits.
pub(super) fn to_u32(what: &str, n: usize) -> Result<u32> {
    // Half the range, so that sums within kernels stay in it.
    u32::try_from(n).ok().filter(|n| *n <= 1 << 30).ok_or_else(|| Error::Unsupported {
        why: format!("{what} of {n} is more than the CUDA kernels count to; use --device cpu"),
    })
}

/// Sizes of the device that plans depend on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// The most bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Device {
    /// What plans for this device depend on.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let info = self.info();
        // Every kernel has a few bytes statically.
        Limits {
            multiprocessors: info.multiprocessors.max(1),
            shared: info.shared_memory.saturating_sub(1 << 10),
        }
    }
}
