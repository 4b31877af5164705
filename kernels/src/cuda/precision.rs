//! The precision of activations in products.

/// The precision of activations in a GEMV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationPrecision {
    /// f32, not rounded.
    F32,
    /// 8 bits with one scale per 32 columns, where the encoding has such a kernel (integer groups
    /// and STBLLM; N:M encodings need none). A product differs from the exact one by at most
    /// Σ_units max|x| / 254 · Σ|w|, and by summation in f32.
    Q8,
}

/// The precision of activations in a GEMM with a matrix of an N:M encoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefillPrecision {
    /// 16-bit floats.
    #[default]
    F16,
    /// 8-bit integers with a scale per token and 256 columns. One instruction multiplies twice as
    /// many weights, and every activation is off by up to 1/254 of the largest of the 256. Matrices
    /// whose weights do not fit 8 bits, and all other encodings, use [`PrefillPrecision::F16`].
    Int8,
}
