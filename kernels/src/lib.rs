//! Kernels that compute with packed `.stb` matrices in place.
//!
//! The algorithms are written once, in the generic part of `cpu`, over a small trait of 16-lane
//! vector operations; one file per instruction set implements the trait. All of them perform the
//! same floating-point operations in the same order, so every instruction set gives the same bits.
//!
//! ```
//! use stb_format::encoding::{Dense, Encoding};
//! use stb_kernels::{Isa, Workspace, gemv};
//!
//! let weights = Dense::F32.encode(&[1.0, 2.0, 3.0, 4.0]); // [2, 2]
//! let view = Encoding::Dense(Dense::F32).view(2, 2, &weights)?;
//! let (isa, mut work) = (Isa::detect()?, Workspace::default());
//! let x = work.prepare(&view, &[1.0, -1.0]);
//! let mut y = [0.0; 2];
//! gemv(isa, &view, x, 0, &mut y);
//! assert_eq!(y, [-1.0, -1.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cpu;
pub mod cuda;
mod isa;
mod pool;

pub use cpu::{ActivationsQ8, RoundingPart, gemm_min_batch, gemm_q8, has_gemm_q8, prefill_batch};
pub use cpu::{Panels, PanelsRef, Prepared, Workspace, gemm, gemv};
pub use cpu::{gemv_batch, shares_activations};
pub use cpu::{kv, ops, probe};
pub use isa::{Isa, IsaError};
pub use pool::Pool;

/// Rows that a kernel computes together: callers split work at multiples of this.
pub const ROW_TILE: usize = 16;
