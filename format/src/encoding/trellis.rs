//! Id 80: trellis codes (spec, encodings §7). The codes of 16 rows × a few columns are one circular bit stream. A window
//! of 8 bits slides over the stream, a few bits per step, and each position of the window makes one or two weights by
//! look-ups in tables of 16 entries. Neighboring windows share bits, so a stream of few bits per weight has weights of
//! many values.

use std::fmt;

use half::f16;

use super::segments::{
    as_f16, check_canonical, check_finite_f16, f16_bytes, f16_vec, join, split, total,
};
use super::tile_scales::{BlockScaleParams, TILE, TileScales};
use super::traits::{WeightEncoding, WeightView};
use crate::error::{Error, Result, Rule};
use crate::num::len_u64;

/// Columns of a unit for each weight of a step.
pub const STEP_COLS: usize = 4;
/// Steps of a unit: one for each of 16 rows and 4 columns.
pub const STEPS: usize = 64;
/// Entries of a table.
pub const ENTRIES: usize = 16;
/// The sum of table entries that means zero.
pub const ZERO: u8 = 64;

/// Compiles an expression for each rate of the format and evaluates the one for the rate of `spec`, a [`Trellis`]. In the
/// expression, the two names are `usize` constants: bits and weights of a step.
///
/// ```
/// use stb_format::encoding::Trellis;
///
/// fn generic<const BITS: usize, const WEIGHTS: usize>() -> [usize; 2] {
///     [BITS, WEIGHTS]
/// }
/// let spec = Trellis::new(3, 2, 0, 0).expect("a rate of the format");
/// assert_eq!(stb_format::trellis_rates!(spec, |BITS, WEIGHTS| generic::<BITS, WEIGHTS>()), [3, 2]);
/// ```
#[macro_export]
macro_rules! trellis_rates {
    // All rates of the format.
    (@table $rule:ident $arguments:tt) => {
        $crate::trellis_rates!(
            @$rule $arguments (1, 2), (1, 1), (3, 2), (2, 1), (5, 2), (3, 1), (4, 1)
        )
    };
    (list) => { $crate::trellis_rates!(@table list ()) };
    ($spec:expr, |$bits:ident, $weights:ident| $body:expr) => {
        $crate::trellis_rates!(@table dispatch (($spec) $bits $weights ($body)))
    };
    (@list () $(($bits:literal, $weights:literal)),+) => {
        &[$(TrellisRate { step_bits: $bits, step_weights: $weights }),+]
    };
    (@dispatch $arguments:tt $($rate:tt),+) => {
        'rates: {
            $($crate::trellis_rates!(@case $arguments $rate 'rates);)+
            unreachable!("every rate of the format has a case")
        }
    };
    (@case (($spec:expr) $BITS:ident $WEIGHTS:ident ($body:expr))
        ($bits:literal, $weights:literal) $done:lifetime) => {
        if ($spec.step_bits(), $spec.step_weights()) == ($bits, $weights) {
            #[allow(dead_code, reason = "an expression may use only some of the constants")]
            const $BITS: usize = $bits;
            #[allow(dead_code, reason = "an expression may use only some of the constants")]
            const $WEIGHTS: usize = $weights;
            break $done $body;
        }
    };
}

/// A rate: bits of a step, and the weights that a step makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrellisRate {
    step_bits: u8,
    step_weights: u8,
}

impl TrellisRate {
    /// All rates of the format, from few to many bits per weight.
    pub const ALL: &'static [Self] = trellis_rates!(list);

    /// Bits by which the window moves from one step to the next.
    #[must_use]
    pub fn step_bits(self) -> usize {
        usize::from(self.step_bits)
    }

    /// Weights that a window makes.
    #[must_use]
    pub fn step_weights(self) -> usize {
        usize::from(self.step_weights)
    }
}

/// Parameters of the trellis encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trellis {
    rate: TrellisRate,
    scales: BlockScaleParams,
    col_factors: bool,
}

impl Trellis {
    /// The registered id.
    pub const ID: u32 = 80;

    /// The window moves by `step_bits` bits per step and makes `step_weights` weights; together they are one of
    /// [`TrellisRate::ALL`]. Each row has a scale code of `scale_bits` bits, 0, 4 or 8, per `block` columns. `block` is a
    /// multiple of 32, or 0 if and only if `scale_bits` is 0. `None` for other values.
    #[must_use]
    pub fn new(step_bits: u8, step_weights: u8, scale_bits: u8, block: u16) -> Option<Self> {
        let rate = TrellisRate { step_bits, step_weights };
        let rate = TrellisRate::ALL.iter().copied().find(|known| *known == rate)?;
        Some(Self { rate, scales: BlockScaleParams::new(scale_bits, block)?, col_factors: false })
    }

    /// These parameters with a factor for each column, or without.
    #[must_use]
    pub fn with_col_factors(self, col_factors: bool) -> Self {
        Self { col_factors, ..self }
    }

    /// Whether each column has a factor.
    #[must_use]
    #[inline]
    pub fn has_col_factors(self) -> bool {
        self.col_factors
    }

    /// See [`TrellisRate::step_bits`].
    #[must_use]
    #[inline]
    pub fn step_bits(self) -> usize {
        self.rate.step_bits()
    }

    /// See [`TrellisRate::step_weights`].
    #[must_use]
    #[inline]
    pub fn step_weights(self) -> usize {
        self.rate.step_weights()
    }

    /// Bits of a block scale code: 4 or 8, or 0 without block scales.
    #[must_use]
    #[inline]
    pub fn scale_bits(self) -> u8 {
        self.scales.bits
    }

    /// Columns that share a block scale code; 0 without block scales.
    #[must_use]
    #[inline]
    pub fn block(self) -> usize {
        usize::from(self.scales.block)
    }

    /// Columns of a unit: 4 or 8.
    #[must_use]
    #[inline]
    pub fn unit_cols(self) -> usize {
        STEP_COLS.saturating_mul(self.step_weights())
    }

    /// Bytes of the stream of a unit: its 64 steps.
    #[must_use]
    #[inline]
    pub fn unit_bytes(self) -> usize {
        self.step_bits().saturating_mul(STEPS / 8)
    }

    /// Bytes of the codes of one tile; `None` on overflow.
    fn tile_bytes(self, cols: u64) -> Option<u64> {
        cols.div_ceil(len_u64(self.unit_cols())).checked_mul(len_u64(self.unit_bytes()))
    }

    fn segments(self, rows: u64, cols: u64) -> Option<[u64; 5]> {
        Some([
            len_u64(self.step_weights()).checked_mul(len_u64(size_of::<TrellisTables>()))?,
            if self.col_factors { cols.checked_mul(2)? } else { 0 },
            rows.checked_mul(2)?,
            self.scales.len(rows, cols)?,
            rows.div_ceil(len_u64(TILE)).checked_mul(self.tile_bytes(cols)?)?,
        ])
    }
}

impl WeightEncoding for Trellis {
    type View<'a> = TrellisView<'a>;
    const IDS: &'static [u32] = &[Self::ID];

    fn parse(_: u32, params: [u8; 16]) -> Option<Self> {
        let [step_bits, step_weights, scale_bits, flags, b0, b1, rest @ ..] = params;
        if flags > 1 || rest != [0; 10] {
            return None;
        }
        let spec = Self::new(step_bits, step_weights, scale_bits, u16::from_le_bytes([b0, b1]))?;
        Some(spec.with_col_factors(flags == 1))
    }

    fn id(self) -> u32 {
        Self::ID
    }

    fn params(self) -> [u8; 16] {
        let [b0, b1] = self.scales.block.to_le_bytes();
        let TrellisRate { step_bits, step_weights } = self.rate;
        let flags = u8::from(self.col_factors);
        [step_bits, step_weights, self.scales.bits, flags, b0, b1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    fn payload_len(self, rows: u64, cols: u64) -> Option<u64> {
        total(self.segments(rows, cols)?)
    }

    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<TrellisView<'_>> {
        TrellisView::new(self, rows, cols, payload)
    }
}

impl fmt::Display for Trellis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "trellis {}/{}", self.rate.step_bits, self.rate.step_weights)?;
        if self.scales.bits != 0 {
            write!(f, "/b{}s{}", self.scales.block, self.scales.bits)?;
        }
        f.write_str(if self.col_factors { "+cols" } else { "" })
    }
}

/// The two tables of one of the weights of a step: that of the low four bits of the window, and that of these bits XOR
/// the high four.
pub type TrellisTables = [[u8; ENTRIES]; 2];

/// The table entries of a window added up, 0 to 127 in a valid file; [`ZERO`] means a weight of zero.
#[must_use]
#[inline]
pub fn level(tables: &TrellisTables, window: u8) -> u8 {
    let [low, mixed] = tables;
    let at = |table: &[u8; ENTRIES], index: u8| {
        table.get(usize::from(index & 15)).copied().unwrap_or_default()
    };
    at(low, window).wrapping_add(at(mixed, window ^ window >> 4))
}

/// The window of step `step` of a unit with this stream: 8 bits from bit `step` · `step_bits`, lowest first. The stream
/// is circular.
#[must_use]
#[inline]
pub fn window(stream: &[u8], step_bits: usize, step: usize) -> u8 {
    let bit = step.wrapping_mul(step_bits);
    let byte = |i: usize| {
        let at = i.checked_rem(stream.len()).and_then(|i| stream.get(i));
        u16::from(at.copied().unwrap_or_default())
    };
    let two = byte(bit >> 3) | byte((bit >> 3).wrapping_add(1)) << 8;
    let [low, _] = two.wrapping_shr(u32::try_from(bit & 7).unwrap_or(0)).to_le_bytes();
    low
}

/// The logical content of a trellis tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TrellisParts {
    /// Parameters.
    pub spec: Trellis,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The tables of each weight of a step.
    pub tables: Vec<TrellisTables>,
    /// Column factors, `[cols]`; empty if the encoding has none.
    pub col_factors: Vec<f16>,
    /// Row scales, `[rows]`.
    pub row_scales: Vec<f16>,
    /// Block scale codes, [rows, blocks]; empty if the encoding has none.
    pub block_codes: Vec<u8>,
    /// The streams, [tiles, units] of [`Trellis::unit_bytes`] bytes.
    pub streams: Vec<u8>,
}

impl TrellisParts {
    /// The payload.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        join([
            self.tables.as_flattened().as_flattened(),
            &f16_bytes(&self.col_factors),
            &f16_bytes(&self.row_scales),
            &self.spec.scales.pack(&self.block_codes, self.cols),
            &self.streams,
        ])
    }
}

/// A trellis matrix in place.
#[derive(Clone, Copy, Debug)]
pub struct TrellisView<'a> {
    /// Parameters.
    pub spec: Trellis,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The tables of each weight of a step.
    pub tables: &'a [TrellisTables],
    /// Column factors, binary16; empty if there are none.
    pub col_factors: &'a [[u8; 2]],
    /// Row scales, binary16.
    pub row_scales: &'a [[u8; 2]],
    /// Block scale codes: tiles × blocks × 16 codes.
    pub block_codes: &'a [u8],
    /// Streams: tiles × units.
    pub streams: &'a [u8],
    /// Bytes of the streams of one tile.
    pub tile_bytes: usize,
}

impl<'a> TrellisView<'a> {
    /// A view of `payload`; `None` if its length does not fit the shape.
    #[must_use]
    pub fn new(spec: Trellis, rows: u64, cols: u64, payload: &'a [u8]) -> Option<Self> {
        let [tables, col_factors, row_scales, block_codes, streams] =
            split(payload, spec.segments(rows, cols)?)?;
        Some(Self {
            spec,
            rows: usize::try_from(rows).ok()?,
            cols: usize::try_from(cols).ok()?,
            tables: bytemuck::cast_slice(tables),
            col_factors: as_f16(col_factors),
            row_scales: as_f16(row_scales),
            block_codes,
            streams,
            tile_bytes: usize::try_from(spec.tile_bytes(cols)?).ok()?,
        })
    }

    /// The scales of rows and blocks.
    #[must_use]
    #[inline]
    pub fn scales(&self) -> TileScales<'a> {
        TileScales {
            bits: self.spec.scales.bits,
            block: self.spec.block(),
            blocks: usize::try_from(self.spec.scales.blocks(len_u64(self.cols))).unwrap_or(0),
            row_scales: self.row_scales,
            block_codes: self.block_codes,
        }
    }

    /// The streams of tile `tile`.
    #[must_use]
    #[inline]
    pub fn tile_streams(&self, tile: usize) -> &'a [u8] {
        let start = tile.saturating_mul(self.tile_bytes);
        self.streams.get(start..start.saturating_add(self.tile_bytes)).unwrap_or_default()
    }

    /// The table sums of the weights of `row` in unit `unit`, in the order of columns.
    fn levels(&self, row: usize, unit: usize) -> impl Iterator<Item = u8> {
        let (bits, bytes) = (self.spec.step_bits(), self.spec.unit_bytes());
        let start = unit.saturating_mul(bytes);
        let tile = self.tile_streams(row.wrapping_div(TILE));
        let stream = tile.get(start..start.saturating_add(bytes)).unwrap_or_default();
        let first = row.wrapping_rem(TILE).wrapping_mul(STEP_COLS);
        self.tables.iter().flat_map(move |tables| {
            (first..first.saturating_add(STEP_COLS))
                .map(move |step| level(tables, window(stream, bits, step)))
        })
    }

    /// Writes the weights of row `row` in units of scale and column factor to `out`, `[cols]`: levels minus 64.
    pub fn decode_units(&self, row: usize, out: &mut [i8]) {
        for (unit, weights) in out.chunks_mut(self.spec.unit_cols()).enumerate() {
            for (w, level) in weights.iter_mut().zip(self.levels(row, unit)) {
                *w = level.wrapping_sub(ZERO).cast_signed();
            }
        }
    }

    /// The logical content.
    #[must_use]
    pub fn unpack(&self) -> TrellisParts {
        TrellisParts {
            spec: self.spec,
            rows: self.rows,
            cols: self.cols,
            tables: self.tables.to_vec(),
            col_factors: f16_vec(self.col_factors),
            row_scales: f16_vec(self.row_scales),
            block_codes: self.scales().codes(self.rows),
            streams: self.streams.to_vec(),
        }
    }
}

impl WeightView for TrellisView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    /// `w = ((level − 64) × factor) × (row scale × multiplier)`.
    fn decode_row(&self, row: usize, out: &mut [f32]) {
        if row >= self.rows {
            return;
        }
        let scales = self.scales();
        for (unit, weights) in out.chunks_mut(self.spec.unit_cols()).enumerate() {
            let scale = scales.scale(row, unit.saturating_mul(self.spec.unit_cols()));
            let first = unit.saturating_mul(self.spec.unit_cols());
            let factors = self.col_factors.get(first..).unwrap_or_default();
            for (w, level) in weights.iter_mut().zip(self.levels(row, unit)) {
                *w = f32::from(level) - f32::from(ZERO);
            }
            for (w, factor) in weights.iter_mut().zip(factors) {
                *w *= f16::from_le_bytes(*factor).to_f32();
            }
            weights.iter_mut().for_each(|w| *w *= scale);
        }
    }

    fn check(&self, payload: &[u8]) -> Result<()> {
        check_canonical(payload, &self.unpack().pack())?;
        check_finite_f16(payload, self.col_factors, "column factor")?;
        check_finite_f16(payload, self.row_scales, "row scale")?;
        let largest = |table: &[u8; ENTRIES]| u16::from(table.iter().copied().max().unwrap_or(0));
        for (index, [low, mixed]) in self.tables.iter().enumerate() {
            if largest(low).saturating_add(largest(mixed)) > 127 {
                let detail =
                    format!("the largest entries of tables {index} add up to more than 127");
                let at = index.saturating_mul(size_of::<TrellisTables>());
                return Err(Error::new(Rule::TrellisTables, detail).at(len_u64(at)));
            }
        }
        Ok(())
    }
}
