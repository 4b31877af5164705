//! What the tests of kernels share; each of them uses a part.
#![allow(dead_code)]

pub mod emulator;
pub mod plans;
pub mod random;
