//! Helpers of the tests that run kernels or whole programs in the emulator. Each test uses some of them.
#![allow(dead_code)]

pub mod emulator;
pub mod exact;
pub mod kernels;
pub mod machine;
pub mod plans;
pub mod random;
