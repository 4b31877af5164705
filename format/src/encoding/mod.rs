//! The registered weight encodings: parameters, layout, exact decoding and packing (spec, encodings).
//!
//! Each encoding has a submodule with the same items: a parameter struct that implements
//! [`WeightEncoding`], a view of the payload in place that implements [`WeightView`], a `Parts` struct
//! with the logical content, and `pack` and `unpack` to convert between parts and bytes. `decode_row`
//! defines the weights. A line in the registry of this file makes the encoding a variant of
//! [`Encoding`] and of [`MatrixView`].

pub mod dense;
pub mod int_group;
pub mod mixed_rows;
pub mod nm;
mod segments;
pub mod stbllm;
mod tile_scales;
mod traits;
pub mod trellis;

use std::fmt;

use crate::error::{Error, Result, Rule};

pub use dense::{Dense, DenseView};
pub use int_group::{IntGroup, IntGroupParts, IntGroupView};
pub use mixed_rows::{CoarseRows, CoarseRowsView, MixedRows, MixedRowsParts, MixedRowsView};
pub use nm::{Nm, NmParts, NmRate, NmView};
pub use stbllm::{Stbllm, StbllmParts, StbllmView};
pub use tile_scales::{TILE, TileScales};
pub use traits::{WeightEncoding, WeightView};
pub use trellis::{Trellis, TrellisParts, TrellisRate, TrellisTables, TrellisView};

/// Defines [`Encoding`] and [`MatrixView`]. Each line is a variant: documentation, name, parameter type
/// and view type.
macro_rules! registry {
    ($($(#[doc = $doc:literal])+ $name:ident: $spec:ident => $view:ident,)+) => {
        /// The encoding of a tensor with its parameters.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Encoding {
            $($(#[doc = $doc])+ $name($spec),)+
            /// An encoding that this reader does not know. The other tensors of the file can be
            /// decoded.
            Unknown {
                /// The id in the file.
                id: u32,
                /// The parameters, uninterpreted.
                params: [u8; 16],
            },
        }

        /// A stored matrix in place.
        #[derive(Clone, Copy, Debug)]
        pub enum MatrixView<'a> {
            $(
                #[doc = concat!("See [`", stringify!($spec), "`].")]
                $name($view<'a>),
            )+
        }

        impl Encoding {
            /// The encoding of a tensor entry.
            ///
            /// # Errors
            /// STB-R-036 if the id is known and its parameters are invalid.
            pub fn parse(id: u32, params: [u8; 16]) -> Result<Self> {
                let known = match id {
                    $(_ if $spec::IDS.contains(&id) => $spec::parse(id, params).map(Self::$name),)+
                    _ => return Ok(Self::Unknown { id, params }),
                };
                known.ok_or_else(|| {
                    let detail = format!("encoding {id} with parameters {params:?}");
                    Error::new(Rule::EncodingParams, detail)
                })
            }

            /// The registered id.
            #[must_use]
            pub fn id(&self) -> u32 {
                match self {
                    $(Self::$name(spec) => spec.id(),)+
                    Self::Unknown { id, .. } => *id,
                }
            }

            /// The 16 parameter bytes of a tensor entry.
            #[must_use]
            pub fn params(&self) -> [u8; 16] {
                match self {
                    $(Self::$name(spec) => spec.params(),)+
                    Self::Unknown { params, .. } => *params,
                }
            }

            /// The length in bytes of a tensor of `shape`; `None` for an unknown encoding.
            ///
            /// # Errors
            /// STB-R-037 if the encoding does not allow the shape, STB-R-031 if the size overflows.
            pub fn payload_len(&self, shape: &[u64]) -> Result<Option<u64>> {
                match self {
                    $(Self::$name(spec) => payload_len(*spec, shape).map(Some),)+
                    Self::Unknown { .. } => Ok(None),
                }
            }

            /// The payload of a `rows` × `cols` tensor as a matrix in place.
            ///
            /// # Errors
            /// STB-R-050 for an unknown encoding, STB-R-038 if the payload has the wrong length.
            pub fn view<'a>(
                &self,
                rows: u64,
                cols: u64,
                payload: &'a [u8],
            ) -> Result<MatrixView<'a>> {
                let view = match self {
                    $(Self::$name(spec) => spec.view(rows, cols, payload).map(MatrixView::$name),)+
                    Self::Unknown { id, .. } => return Err(unknown(*id)),
                };
                view.ok_or_else(|| {
                    let detail = format!("{} bytes for {self} of {rows} x {cols}", payload.len());
                    Error::new(Rule::TensorLength, detail)
                })
            }
        }

        impl fmt::Display for Encoding {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Self::$name(spec) => spec.fmt(f),)+
                    Self::Unknown { id, .. } => write!(f, "unknown({id})"),
                }
            }
        }

        impl WeightView for MatrixView<'_> {
            fn rows(&self) -> usize {
                match self {
                    $(Self::$name(view) => view.rows,)+
                }
            }

            fn cols(&self) -> usize {
                match self {
                    $(Self::$name(view) => view.cols,)+
                }
            }

            fn decode_row(&self, row: usize, out: &mut [f32]) {
                match self {
                    $(Self::$name(view) => view.decode_row(row, out),)+
                }
            }

            fn check(&self, payload: &[u8]) -> Result<()> {
                match self {
                    $(Self::$name(view) => view.check(payload),)+
                }
            }
        }
    };
}

registry! {
    /// Ids 1 to 3: plain floating-point numbers.
    Dense: Dense => DenseView,
    /// Ids 16 and 17: integers of 8 bits or fewer with one scale per group of columns.
    IntGroup: IntGroup => IntGroupView,
    /// Id 32: the N:8 structure of STBLLM with three regions and salient columns.
    Stbllm: Stbllm => StbllmView,
    /// Id 48: N:M sparse signs, with positions and signs of a group packed together.
    Nm: Nm => NmView,
    /// Id 64: one of the two above, with some rows stored again as integers of more bits.
    MixedRows: MixedRows => MixedRowsView,
    /// Id 80: circular bit streams of which windows are looked up in tables.
    Trellis: Trellis => TrellisView,
}

impl Encoding {
    /// Checks the content of a payload (STB-R-041 to STB-R-045). Unknown encodings are not checked.
    ///
    /// # Errors
    /// The first broken rule, with its offset in the payload; STB-R-038 if the payload has the wrong
    /// length.
    pub fn check_payload(&self, rows: u64, cols: u64, payload: &[u8]) -> Result<()> {
        if let Self::Unknown { .. } = self {
            return Ok(());
        }
        self.view(rows, cols, payload)?.check(payload)
    }
}

/// STB-R-050.
fn unknown(id: u32) -> Error {
    let detail = format!("encoding {id} is not known to this reader; a newer version may read it");
    Error::new(Rule::EncodingUnknown, detail)
}

fn payload_len<E: WeightEncoding>(encoding: E, shape: &[u64]) -> Result<u64> {
    let bytes = match *shape {
        [rows, cols] if !encoding.allows(rows, cols) => {
            let detail = format!("{encoding} does not allow the shape {shape:?}");
            return Err(Error::new(Rule::EncodingShape, detail));
        }
        [rows, cols] => encoding.payload_len(rows, cols),
        _ if E::ANY_SHAPE => {
            let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
            elements.and_then(|n| encoding.payload_len(1, n))
        }
        _ => {
            let detail = format!("{encoding} is for matrices, the shape is {shape:?}");
            return Err(Error::new(Rule::EncodingShape, detail));
        }
    };
    bytes.ok_or_else(|| Error::new(Rule::TensorShape, format!("{shape:?} is too large")))
}

impl MatrixView<'_> {
    /// The number of rows (output features).
    #[must_use]
    pub fn rows(&self) -> usize {
        WeightView::rows(self)
    }

    /// The number of columns (input features).
    #[must_use]
    pub fn cols(&self) -> usize {
        WeightView::cols(self)
    }

    /// Decodes row `row` into `out`; see [`WeightView::decode_row`].
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        WeightView::decode_row(self, row, out);
    }

    /// Decodes the whole matrix, [rows, cols].
    #[must_use]
    pub fn decode(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows().saturating_mul(self.cols())];
        for (row, line) in out.chunks_exact_mut(self.cols().max(1)).enumerate() {
            self.decode_row(row, line);
        }
        out
    }
}
