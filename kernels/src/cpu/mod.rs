//! Kernels for the CPU, from the bottom up: vector operations of each instruction set ([`arch`]), operations
//! that do not depend on how weights are stored ([`ops`]), the interface of packed matrices ([`packed`]),
//! products with any of them ([`products`]), and the encodings ([`encoding`]).

pub(crate) mod arch;
pub(crate) mod encoding;
pub mod ops;
pub(crate) mod packed;
pub(crate) mod products;
