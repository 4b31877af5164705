//! Kernel launches as data. Launches are planned without a device, so that tests need none.

use bytemuck::NoUninit;

use super::error::{Error, Result};
use super::module::Module;

/// The largest extent of a grid in y and z.
const MAX_GRID_Y: usize = 65_535;

/// A kernel with its grid and its one parameter.
///
/// Plans are pure functions from shapes and addresses to launches. A plan treats an address as a
/// plain number. [`super::Device`] runs launches whose addresses belong to live buffers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The module that contains the kernel.
    pub module: Module,
    /// The kernel's name.
    pub kernel: &'static str,
    /// Blocks of the grid in x, y and z.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
    /// The parameter, a struct by value. Every address in it is a whole word.
    pub params: Vec<u64>,
}

/// The grid and block of a launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct LaunchShape {
    /// Blocks of the grid in x, y and z.
    pub blocks: [usize; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

impl Launch {
    /// `params` must have the layout of the kernel's parameter.
    pub(super) fn new<P: NoUninit>(
        module: Module,
        kernel: &'static str,
        shape: LaunchShape,
        params: &P,
    ) -> Self {
        const { assert!(size_of::<P>().is_multiple_of(8)) };
        let words = bytemuck::bytes_of(params).as_chunks::<8>().0;
        Self {
            module,
            kernel,
            blocks: shape.blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
            threads: shape.threads,
            shared: u32::try_from(shape.shared).unwrap_or(u32::MAX),
            params: words.iter().map(|w| u64::from_ne_bytes(*w)).collect(),
        }
    }
}

/// Converts a size to the 32 bits of kernel indices. `what` names the size in the error.
pub(super) fn to_u32(what: &str, n: usize) -> Result<u32> {
    // Half the range, so that sums inside kernels do not overflow.
    u32::try_from(n).ok().filter(|n| *n <= 1 << 30).ok_or_else(|| Error::Unsupported {
        why: format!("{what} of {n} is too large for the CUDA kernels; use --device cpu"),
    })
}

/// Checks that `blocks` fit the y extent of a grid. The error says that `n` `what` are too many.
pub(super) fn check_grid_y(blocks: usize, n: usize, what: &str) -> Result<()> {
    if blocks > MAX_GRID_Y {
        let why = format!("{n} {what} at once are more than a launch takes");
        return Err(Error::Unsupported { why });
    }
    Ok(())
}

/// The properties of a device that plans depend on.
#[derive(Clone, Copy, Debug)]
pub struct DeviceLimits {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// The most bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// The scratch memory that a launch needs when several blocks share one result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScratchSize {
    /// Floats of partial sums.
    pub partial: usize,
    /// Counters of arrived blocks. They are zero before and after the launch.
    pub arrived: usize,
}

/// The addresses of that scratch memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScratchAddresses {
    /// Partial sums, f32.
    pub partial: u64,
    /// Counters, u32.
    pub arrived: u64,
}
