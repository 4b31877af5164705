//! Kernels that compute with packed `.stb` matrices in place.
//!
//! On the CPU, algorithms are written once, over a small trait of 16-lane vector operations that one
//! file per instruction set implements. All of them perform the same floating-point operations in the
//! same order, so every instruction set gives the same bits. Each encoding implements
//! [`PackedMatrix`]; [`packed`] finds the implementation for a matrix of a file.
//!
//! ```
//! use stb_format::encoding::{Dense, Encoding};
//! use stb_kernels::{GemvScratch, Isa, gemv, packed};
//!
//! let weights = Dense::F32.encode(&[1.0, 2.0, 3.0, 4.0]); // [2, 2]
//! let view = Encoding::Dense(Dense::F32).view(2, 2, &weights)?;
//! let (isa, matrix) = (Isa::detect()?, packed(&view));
//! let mut scratch = GemvScratch::default();
//! let x = matrix.prepare(isa, &[1.0, -1.0], &mut scratch);
//! let mut y = [0.0; 2];
//! gemv(isa, matrix, x, 0, &mut y);
//! assert_eq!(y, [-1.0, -1.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cpu;
pub mod cuda;
mod isa;
mod pool;

pub use cpu::encoding::{dense, packed};
pub use cpu::ops::panels::{Panels, PanelsRef};
pub use cpu::ops::q8::{GemvInput, GemvScratch};
pub use cpu::ops::q8_batch::{ActivationsQ8, Q8Layout, QuantizeChunk};
pub use cpu::ops::{self, kv, probe};
pub use cpu::packed::{ActivationLayout, PackedGemmQ8, PackedMatrix, UnpackBlock};
pub use cpu::products::{GEMV_MAX_BATCH, ROW_TILE};
pub use cpu::products::{gemm, gemm_q8, gemv, gemv_batch, shares_activations};
pub use isa::{Isa, IsaError};
pub use pool::Pool;
