//! The registry of tensor types of GGUF files.

use std::fmt;

use super::block::{GgufBlock, decode_blocks};
use super::iq::{Iq1M, Iq1S, Iq2S, Iq2Xs, Iq2Xxs, Iq3S, Iq3Xxs, Iq4Nl, Iq4Xs};
use super::k_quants::{Q2K, Q3K, Q4K, Q5K, Q6K};
use super::legacy::{Bf16, F16, F32, Mxfp4, Q1_0, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use super::ternary::{Tq1_0, Tq2_0};
use crate::encoding::Dense;
use crate::num::len_u64;

macro_rules! types {
    ($($id:literal $name:literal $block:ident,)*) => {
        /// A tensor type of a GGUF file that can be decoded.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum GgufType {
            $(#[doc = concat!($name, ", id ", $id, ".")] $block,)*
        }

        impl GgufType {
            /// Every type, in the order of ids.
            pub const ALL: &'static [Self] = &[$(Self::$block),*];

            /// The type with this id; `None` if it cannot be decoded.
            #[must_use]
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$block),)*
                    _ => None,
                }
            }

            /// The id in files.
            #[must_use]
            pub fn id(self) -> u32 {
                match self { $(Self::$block => $id,)* }
            }

            /// The name in GGUF's documentation.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$block => $name,)* }
            }

            /// Weights per block.
            #[must_use]
            pub fn block_weights(self) -> u64 {
                len_u64(match self { $(Self::$block => <$block as GgufBlock>::WEIGHTS,)* })
            }

            /// Bytes per block.
            #[must_use]
            pub fn block_bytes(self) -> u64 {
                len_u64(match self { $(Self::$block => size_of::<$block>(),)* })
            }

            /// Decodes the blocks in `bytes` to `out`. Stops at the end of the shorter one.
            pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
                match self { $(Self::$block => decode_blocks::<$block>(bytes, out),)* }
            }
        }
    };
}

types! {
    0 "F32" F32,
    1 "F16" F16,
    2 "Q4_0" Q4_0,
    3 "Q4_1" Q4_1,
    6 "Q5_0" Q5_0,
    7 "Q5_1" Q5_1,
    8 "Q8_0" Q8_0,
    10 "Q2_K" Q2K,
    11 "Q3_K" Q3K,
    12 "Q4_K" Q4K,
    13 "Q5_K" Q5K,
    14 "Q6_K" Q6K,
    16 "IQ2_XXS" Iq2Xxs,
    17 "IQ2_XS" Iq2Xs,
    18 "IQ3_XXS" Iq3Xxs,
    19 "IQ1_S" Iq1S,
    20 "IQ4_NL" Iq4Nl,
    21 "IQ3_S" Iq3S,
    22 "IQ2_S" Iq2S,
    23 "IQ4_XS" Iq4Xs,
    29 "IQ1_M" Iq1M,
    30 "BF16" Bf16,
    34 "TQ1_0" Tq1_0,
    35 "TQ2_0" Tq2_0,
    39 "MXFP4" Mxfp4,
    41 "Q1_0" Q1_0,
    42 "Q2_0" Q2_0,
}

impl GgufType {
    /// The dense type with the same bytes; `None` for quantized types.
    #[must_use]
    pub fn dense(self) -> Option<Dense> {
        match self {
            Self::F32 => Some(Dense::F32),
            Self::F16 => Some(Dense::F16),
            Self::Bf16 => Some(Dense::Bf16),
            _ => None,
        }
    }

    /// Bytes of `weights` weights; `None` if they are not whole blocks.
    #[must_use]
    pub fn byte_len(self, weights: u64) -> Option<u64> {
        if !weights.is_multiple_of(self.block_weights()) {
            return None;
        }
        weights.checked_div(self.block_weights())?.checked_mul(self.block_bytes())
    }
}

impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
