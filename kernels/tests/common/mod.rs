//! What the tests of kernels, and those of programs on an emulated device, share; each of them uses a part.
#![allow(dead_code)]

pub mod emulator;
pub mod machine;
pub mod plans;
pub mod random;
