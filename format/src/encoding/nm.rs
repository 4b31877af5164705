//! Id 48: N:M sparse signs (spec, encodings §5). A group of M columns in one row keeps at most N weights
//! of equal magnitude. One code has their positions and signs. Codes are stored in bit planes by tile.

use std::fmt;

use half::f16;

use super::segments::{
    as_f16, check_canonical, check_finite_f16, f16_at, f16_bytes, f16_vec, join, signed, split,
    total,
};
use super::tile_scales::{BlockScaleParams, TileScales};
use super::traits::{WeightEncoding, WeightView};
use crate::error::Result;
use crate::num::len_u64;

pub use super::tile_scales::TILE;

/// Groups per quad: the four lanes of a 64-byte vector.
pub const QUAD: usize = 4;
/// Quads per chunk. Every plane of a chunk fills whole vectors.
pub const CHUNK_QUADS: usize = 8;
/// Bytes per vector: one quad of groups for the 16 rows of a tile.
pub const VECTOR: usize = 64;

/// Compiles an expression for each N:M rate of the format and evaluates the one for the rate of `spec`,
/// an [`Nm`]. In the expression, the three names are `usize` constants: N, M and the bits of a code.
///
/// ```
/// use stb_format::encoding::Nm;
///
/// fn generic<const N: usize, const M: usize, const CODE_BITS: usize>() -> [usize; 3] {
///     [N, M, CODE_BITS]
/// }
/// let spec = Nm::new(2, 4, 0, 0, false).expect("a rate of the format");
/// let found = stb_format::nm_rates!(spec, |N, M, CODE_BITS| generic::<N, M, CODE_BITS>());
/// assert_eq!(found, [2, 4, 5]);
/// ```
#[macro_export]
macro_rules! nm_rates {
    // All rates of the format.
    (@table $rule:ident $arguments:tt) => {
        $crate::nm_rates!(@$rule $arguments (1, 4), (1, 8), (2, 4), (2, 8))
    };
    (list) => { $crate::nm_rates!(@table list ()) };
    ($spec:expr, |$n:ident, $m:ident, $code_bits:ident| $body:expr) => {
        $crate::nm_rates!(@table dispatch (($spec) $n $m $code_bits ($body)))
    };
    (@list () $(($n:literal, $m:literal)),+) => { &[$(NmRate { n: $n, m: $m }),+] };
    (@dispatch $arguments:tt $($rate:tt),+) => {
        'rates: {
            $($crate::nm_rates!(@case $arguments $rate 'rates);)+
            unreachable!("every rate of the format has a case")
        }
    };
    (@case (($spec:expr) $N:ident $M:ident $code_bits:ident ($body:expr))
        ($n:literal, $m:literal) $done:lifetime) => {
        if ($spec.n(), $spec.m()) == ($n, $m) {
            #[allow(dead_code, reason = "an expression may use only some of the constants")]
            const $N: usize = $n;
            #[allow(dead_code, reason = "an expression may use only some of the constants")]
            const $M: usize = $m;
            #[allow(dead_code, reason = "an expression may use only some of the constants")]
            const $code_bits: usize = $crate::encoding::NmRate::code_bits_of($n, $m);
            break $done $body;
        }
    };
}

/// An N:M rate: groups of M columns keep at most N weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NmRate {
    n: u8,
    m: u8,
}

impl NmRate {
    /// All rates of the format.
    pub const ALL: &'static [Self] = nm_rates!(list);

    /// Bits of a position: log2 M.
    #[must_use]
    #[inline]
    pub const fn position_bits(self) -> u32 {
        self.m.trailing_zeros()
    }

    /// Bits of a code: N·log2 M + 1.
    #[must_use]
    #[inline]
    #[allow(clippy::as_conversions, reason = "widening; conversion traits are not const")]
    pub const fn code_bits(self) -> u32 {
        (self.n as u32).wrapping_mul(self.position_bits()).wrapping_add(1)
    }

    /// Bits of a code of N:M, for [`nm_rates!`].
    #[doc(hidden)]
    #[must_use]
    #[allow(clippy::as_conversions, reason = "small numbers; conversion traits are not const")]
    pub const fn code_bits_of(n: u8, m: u8) -> usize {
        Self { n, m }.code_bits() as usize
    }
}

/// Parameters of the N:M sparse-sign encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nm {
    rate: NmRate,
    scales: BlockScaleParams,
    col_factors: bool,
}

impl Nm {
    /// The registered id.
    pub const ID: u32 = 48;

    /// `n`:`m` is one of [`NmRate::ALL`]. Each row has a scale code of `scale_bits` bits, 0, 4 or 8, per
    /// `block` columns. `block` is a multiple of 32, or 0 if and only if `scale_bits` is 0. `None` for
    /// other values.
    #[must_use]
    pub fn new(n: u8, m: u8, scale_bits: u8, block: u16, col_factors: bool) -> Option<Self> {
        let rate = NmRate::ALL.iter().copied().find(|rate| (rate.n, rate.m) == (n, m))?;
        let scales = BlockScaleParams::new(scale_bits, block)?;
        Some(Self { rate, scales, col_factors })
    }

    /// The largest number of weights kept in a group.
    #[must_use]
    #[inline]
    pub fn n(self) -> usize {
        usize::from(self.rate.n)
    }

    /// Columns of a group.
    #[must_use]
    #[inline]
    pub fn m(self) -> usize {
        usize::from(self.rate.m)
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

    /// Whether each column has a factor.
    #[must_use]
    pub fn has_col_factors(self) -> bool {
        self.col_factors
    }

    /// See [`NmRate::position_bits`].
    #[must_use]
    #[inline]
    pub fn position_bits(self) -> u32 {
        self.rate.position_bits()
    }

    /// See [`NmRate::code_bits`].
    #[must_use]
    #[inline]
    pub fn code_bits(self) -> u32 {
        self.rate.code_bits()
    }

    /// Widths of the bit planes of a code, low bits first: the powers of two that sum to
    /// [`Nm::code_bits`], largest first.
    pub fn planes(self) -> impl Iterator<Item = u32> {
        let bits = self.code_bits();
        [8, 4, 2, 1].into_iter().filter(move |w| bits & w != 0)
    }

    /// The kept weights of `code` as (position, negative). The second is `None` for 1:M, and for codes
    /// of 2:M that keep one weight.
    #[must_use]
    #[inline]
    pub fn pattern(self, code: u16) -> [Option<(usize, bool)>; 2] {
        let bits = self.position_bits();
        let mask = u16::from(self.rate.m).wrapping_sub(1);
        let negative = code.wrapping_shr(self.code_bits().wrapping_sub(1)) & 1 != 0;
        let i = code & mask;
        let first = Some((usize::from(i), negative));
        if self.rate.n == 1 {
            return [first, None];
        }
        let j = code.wrapping_shr(bits) & mask;
        let second = (i != j).then_some((usize::from(j), negative != (i > j)));
        [first, second]
    }

    /// The code that keeps `first` and `second`, in any order. The inverse of [`Nm::pattern`]. `None` if
    /// a position is outside the group, the positions are equal, or 1:M gets a second weight.
    #[must_use]
    pub fn code(self, first: (usize, bool), second: Option<(usize, bool)>) -> Option<u16> {
        let bits = self.position_bits();
        let sign = |negative: bool| u16::from(negative) << self.code_bits().wrapping_sub(1);
        let position = |p: usize| u16::try_from(p).ok().filter(|p| *p < u16::from(self.rate.m));
        let a = position(first.0)?;
        let Some((b, negative_b)) = second else {
            let repeat = if self.rate.n == 2 { a << bits } else { 0 };
            return Some(a | repeat | sign(first.1));
        };
        let b = position(b)?;
        if self.rate.n == 1 || a == b {
            return None;
        }
        // Equal signs put the lower position first, different signs the higher. The sign of the first
        // is stored.
        let swap = (first.1 == negative_b) != (a < b);
        let (i, j, negative) = if swap { (b, a, negative_b) } else { (a, b, first.1) };
        Some(i | j << bits | sign(negative))
    }

    /// Groups of a row.
    fn groups(self, cols: u64) -> u64 {
        cols.div_ceil(u64::from(self.rate.m))
    }

    /// Bytes of the codes of a chunk with `quads` quads, 0 to 8.
    fn chunk_bytes(self, quads: u64) -> u64 {
        let vectors = |w: u32| quads.saturating_mul(u64::from(w)).div_ceil(8);
        self.planes().map(vectors).sum::<u64>().saturating_mul(len_u64(VECTOR))
    }

    /// Bytes of the codes of one tile.
    fn tile_bytes(self, cols: u64) -> Option<u64> {
        let quads = self.groups(cols).div_ceil(len_u64(QUAD));
        let per_chunk = len_u64(CHUNK_QUADS);
        let full = quads.checked_div(per_chunk)?.checked_mul(self.chunk_bytes(per_chunk))?;
        full.checked_add(self.chunk_bytes(quads.checked_rem(per_chunk)?))
    }

    fn segments(self, rows: u64, cols: u64) -> Option<[u64; 4]> {
        let tiles = rows.div_ceil(len_u64(TILE));
        Some([
            if self.col_factors { cols.checked_mul(2)? } else { 0 },
            rows.checked_mul(2)?,
            self.scales.len(rows, cols)?,
            tiles.checked_mul(self.tile_bytes(cols)?)?,
        ])
    }
}

impl WeightEncoding for Nm {
    type View<'a> = NmView<'a>;
    const IDS: &'static [u32] = &[Self::ID];

    fn parse(_: u32, params: [u8; 16]) -> Option<Self> {
        let [n, m, scale_bits, flags, b0, b1, rest @ ..] = params;
        if flags > 1 || rest != [0; 10] {
            return None;
        }
        Self::new(n, m, scale_bits, u16::from_le_bytes([b0, b1]), flags == 1)
    }

    fn id(self) -> u32 {
        Self::ID
    }

    fn params(self) -> [u8; 16] {
        let [b0, b1] = self.scales.block.to_le_bytes();
        let flags = u8::from(self.col_factors);
        [self.rate.n, self.rate.m, self.scales.bits, flags, b0, b1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    fn payload_len(self, rows: u64, cols: u64) -> Option<u64> {
        total(self.segments(rows, cols)?)
    }

    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<NmView<'_>> {
        NmView::new(self, rows, cols, payload)
    }
}

impl fmt::Display for Nm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "nm {}:{}", self.rate.n, self.rate.m)?;
        if self.scales.bits != 0 {
            write!(f, "/b{}s{}", self.scales.block, self.scales.bits)?;
        }
        f.write_str(if self.col_factors { "+cols" } else { "" })
    }
}

/// The logical content of an N:M sparse-sign tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct NmParts {
    /// Parameters.
    pub spec: Nm,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Column factors, `[cols]`; empty if the encoding has none.
    pub col_factors: Vec<f16>,
    /// Row scales, `[rows]`.
    pub row_scales: Vec<f16>,
    /// Block scale codes, [rows, blocks]; empty if the encoding has none.
    pub block_codes: Vec<u8>,
    /// Codes, [rows, ceil(cols / M)].
    pub codes: Vec<u16>,
}

impl NmParts {
    /// The payload.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let groups = self.cols.div_ceil(self.spec.m()).max(1);
        let mut codes = Vec::new();
        let rows: Vec<&[u16]> = self.codes.chunks(groups).collect();
        for tile in rows.chunks(TILE) {
            for chunk in 0..groups.div_ceil(QUAD.saturating_mul(CHUNK_QUADS)) {
                self.pack_chunk(tile, chunk, groups, &mut codes);
            }
        }
        join([
            &f16_bytes(&self.col_factors),
            &f16_bytes(&self.row_scales),
            &self.spec.scales.pack(&self.block_codes, self.cols),
            &codes,
        ])
    }

    /// Appends the vectors of one chunk of a tile to `out`, plane by plane.
    fn pack_chunk(&self, tile: &[&[u16]], chunk: usize, groups: usize, out: &mut Vec<u8>) {
        let first_quad = chunk.saturating_mul(CHUNK_QUADS);
        let quads = groups.div_ceil(QUAD).saturating_sub(first_quad).min(CHUNK_QUADS);
        let mut shift = 0u32;
        for width in self.spec.planes() {
            let slots = usize::try_from(8u32.wrapping_div(width)).unwrap_or(1);
            let mask = (1u16 << width).wrapping_sub(1);
            for vector in 0..quads.div_ceil(slots) {
                for lane in 0..QUAD {
                    for row in 0..TILE {
                        let mut byte = 0u16;
                        for (slot, at) in
                            (0..slots).zip((0u32..8).step_by(usize::try_from(width).unwrap_or(8)))
                        {
                            let quad = vector.saturating_mul(slots).saturating_add(slot);
                            let group = first_quad
                                .saturating_add(quad)
                                .saturating_mul(QUAD)
                                .saturating_add(lane);
                            let code = if quad < quads {
                                tile.get(row).and_then(|codes| codes.get(group)).copied()
                            } else {
                                None
                            };
                            byte |= (code.unwrap_or(0).wrapping_shr(shift) & mask) << at;
                        }
                        out.extend(byte.to_le_bytes().first());
                    }
                }
            }
            shift = shift.wrapping_add(width);
        }
    }
}

/// An N:M sparse-sign matrix in place.
#[derive(Clone, Copy, Debug)]
pub struct NmView<'a> {
    /// Parameters.
    pub spec: Nm,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Column factors, binary16; empty if there are none.
    pub col_factors: &'a [[u8; 2]],
    /// Row scales, binary16.
    pub row_scales: &'a [[u8; 2]],
    /// Block scale codes: tiles × blocks × 16 codes.
    pub block_codes: &'a [u8],
    /// Codes: tiles × chunks × planes × vectors of 64 bytes.
    pub codes: &'a [u8],
    /// Bytes of the codes of one tile.
    pub tile_bytes: usize,
}

impl<'a> NmView<'a> {
    /// A view of `payload`; `None` if its length does not fit the shape.
    #[must_use]
    pub fn new(spec: Nm, rows: u64, cols: u64, payload: &'a [u8]) -> Option<Self> {
        let [factors, row_scales, block_codes, codes] = split(payload, spec.segments(rows, cols)?)?;
        Some(Self {
            spec,
            rows: usize::try_from(rows).ok()?,
            cols: usize::try_from(cols).ok()?,
            col_factors: as_f16(factors),
            row_scales: as_f16(row_scales),
            block_codes,
            codes,
            tile_bytes: usize::try_from(spec.tile_bytes(cols)?).ok()?,
        })
    }

    /// Groups of a row.
    #[must_use]
    #[inline]
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.spec.m())
    }

    /// Block scale codes of a row.
    #[must_use]
    #[inline]
    pub fn blocks(&self) -> usize {
        usize::try_from(self.spec.scales.blocks(len_u64(self.cols))).unwrap_or(0)
    }

    /// Tiles of 16 rows.
    #[must_use]
    #[inline]
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }

    /// The code bytes of tile `tile`.
    #[must_use]
    #[inline]
    pub fn tile_codes(&self, tile: usize) -> &'a [u8] {
        let start = tile.saturating_mul(self.tile_bytes);
        self.codes.get(start..start.saturating_add(self.tile_bytes)).unwrap_or_default()
    }

    /// The scales of rows and blocks.
    #[must_use]
    #[inline]
    pub fn scales(&self) -> TileScales<'a> {
        TileScales {
            bits: self.spec.scales.bits,
            block: self.spec.block(),
            blocks: self.blocks(),
            row_scales: self.row_scales,
            block_codes: self.block_codes,
        }
    }

    /// The code of a row and group.
    #[must_use]
    pub fn code(&self, row: usize, group: usize) -> u16 {
        let tile = self.tile_codes(row.wrapping_div(TILE));
        let (lane, quad) = (group.wrapping_rem(QUAD), group.wrapping_div(QUAD));
        let chunk = quad.wrapping_div(CHUNK_QUADS);
        let quads = self
            .groups()
            .div_ceil(QUAD)
            .saturating_sub(chunk.saturating_mul(CHUNK_QUADS))
            .min(CHUNK_QUADS);
        let quad = quad.wrapping_rem(CHUNK_QUADS);
        let code_bits = usize::try_from(self.spec.code_bits()).unwrap_or(0);
        let mut plane = chunk.saturating_mul(code_bits).saturating_mul(VECTOR);
        let (mut code, mut shift) = (0u16, 0u32);
        for width in self.spec.planes() {
            let slots = usize::try_from(8u32.wrapping_div(width)).unwrap_or(1);
            let vector = quad.checked_div(slots).unwrap_or(0);
            let slot = u32::try_from(quad.checked_rem(slots).unwrap_or(0)).unwrap_or(0);
            let at = plane
                .saturating_add(vector.saturating_mul(VECTOR))
                .saturating_add(lane.saturating_mul(TILE))
                .saturating_add(row.wrapping_rem(TILE));
            let byte = u16::from(tile.get(at).copied().unwrap_or(0));
            let mask = (1u16 << width).wrapping_sub(1);
            let bits = byte.wrapping_shr(slot.wrapping_mul(width)) & mask;
            code |= bits.wrapping_shl(shift);
            shift = shift.wrapping_add(width);
            plane = plane.saturating_add(quads.div_ceil(slots).saturating_mul(VECTOR));
        }
        code
    }

    /// The logical content.
    #[must_use]
    pub fn unpack(&self) -> NmParts {
        NmParts {
            spec: self.spec,
            rows: self.rows,
            cols: self.cols,
            col_factors: f16_vec(self.col_factors),
            row_scales: f16_vec(self.row_scales),
            block_codes: self.scales().codes(self.rows),
            codes: (0..self.rows)
                .flat_map(|r| (0..self.groups()).map(move |g| self.code(r, g)))
                .collect(),
        }
    }
}

impl WeightView for NmView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    /// `w = ±((row scale × multiplier) × column factor)`.
    fn decode_row(&self, row: usize, out: &mut [f32]) {
        if row >= self.rows {
            return;
        }
        let scales = self.scales();
        for (group, weights) in out.chunks_mut(self.spec.m()).enumerate() {
            weights.fill(0.0);
            let first = group.saturating_mul(self.spec.m());
            let scale = scales.scale(row, first);
            for (position, negative) in
                self.spec.pattern(self.code(row, group)).into_iter().flatten()
            {
                let factor = if self.spec.col_factors {
                    f16_at(self.col_factors, first.saturating_add(position))
                } else {
                    1.0
                };
                // Positions past the last column are ignored.
                if let Some(w) = weights.get_mut(position) {
                    *w = signed(scale * factor, negative);
                }
            }
        }
    }

    fn check(&self, payload: &[u8]) -> Result<()> {
        check_canonical(payload, &self.unpack().pack())?;
        check_finite_f16(payload, self.col_factors, "column factor")?;
        check_finite_f16(payload, self.row_scales, "row scale")
    }
}
