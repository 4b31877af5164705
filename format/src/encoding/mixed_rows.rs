//! Id 64: a matrix of which some rows are stored a second time with more bits (spec, encodings §6). Rows that matter
//! most, such as those of frequent tokens in an lm_head, cost few bytes and carry a large part of the error.

use std::fmt;

use super::int_group::{IntGroup, IntGroupView};
use super::nm::{Nm, NmView};
use super::segments::{join, split, total};
use super::traits::{WeightEncoding, WeightView};
use super::trellis::{Trellis, TrellisView};
use super::{Encoding, MatrixView};
use crate::error::{Error, Result, Rule};
use crate::num::{first_nonzero, len_u64};

/// The encoding of all rows of a [`MixedRows`] matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoarseRows {
    /// Ids 16 and 17.
    IntGroup(IntGroup),
    /// Id 48, without column factors.
    Nm(Nm),
    /// Id 80.
    Trellis(Trellis),
}

impl CoarseRows {
    fn parse(id: u32, params: [u8; 16]) -> Option<Self> {
        match id {
            Nm::ID => Nm::parse(id, params).map(Self::Nm),
            Trellis::ID => Trellis::parse(id, params).map(Self::Trellis),
            _ => IntGroup::parse(id, params).map(Self::IntGroup),
        }
    }

    /// The encoding as that of a whole tensor.
    #[must_use]
    pub fn encoding(self) -> Encoding {
        match self {
            Self::IntGroup(spec) => Encoding::IntGroup(spec),
            Self::Nm(spec) => Encoding::Nm(spec),
            Self::Trellis(spec) => Encoding::Trellis(spec),
        }
    }

    fn payload_len(self, rows: u64, cols: u64) -> Option<u64> {
        match self {
            Self::IntGroup(spec) => spec.payload_len(rows, cols),
            Self::Nm(spec) => spec.payload_len(rows, cols),
            Self::Trellis(spec) => spec.payload_len(rows, cols),
        }
    }

    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<CoarseRowsView<'_>> {
        match self {
            Self::IntGroup(spec) => spec.view(rows, cols, payload).map(CoarseRowsView::IntGroup),
            Self::Nm(spec) => spec.view(rows, cols, payload).map(CoarseRowsView::Nm),
            Self::Trellis(spec) => spec.view(rows, cols, payload).map(CoarseRowsView::Trellis),
        }
    }
}

/// Parameters of the mixed-rows encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MixedRows {
    count: u32,
    fine: IntGroup,
    coarse: CoarseRows,
}

impl MixedRows {
    /// The registered id.
    pub const ID: u32 = 64;

    /// `count` rows, at least one, are stored as `fine` as well; all rows are stored as `coarse`, which has no column
    /// factors if it is N:M. `None` for other values.
    #[must_use]
    pub fn new(count: u32, fine: IntGroup, coarse: CoarseRows) -> Option<Self> {
        let factors = matches!(coarse, CoarseRows::Nm(spec) if spec.has_col_factors());
        (count > 0 && !factors).then_some(Self { count, fine, coarse })
    }

    /// The number of rows that are stored as [`MixedRows::fine`].
    #[must_use]
    pub fn count(self) -> u32 {
        self.count
    }

    /// The encoding of the listed rows.
    #[must_use]
    pub fn fine(self) -> IntGroup {
        self.fine
    }

    /// The encoding of all rows.
    #[must_use]
    pub fn coarse(self) -> CoarseRows {
        self.coarse
    }

    fn segments(self, rows: u64, cols: u64) -> Option<[u64; 3]> {
        let count = u64::from(self.count);
        let fine = self.fine.payload_len(count, cols)?;
        Some([count.checked_mul(4)?, fine, self.coarse.payload_len(rows, cols)?])
    }
}

impl WeightEncoding for MixedRows {
    type View<'a> = MixedRowsView<'a>;
    const IDS: &'static [u32] = &[Self::ID];

    fn parse(_: u32, params: [u8; 16]) -> Option<Self> {
        let [c0, c1, c2, c3, fine_id, coarse_id, f0, f1, f2, f3, p0, p1, p2, p3, p4, p5] = params;
        let fine = [f0, f1, f2, f3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let coarse = [p0, p1, p2, p3, p4, p5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let fine = IntGroup::parse(u32::from(fine_id), fine)?;
        let coarse = CoarseRows::parse(u32::from(coarse_id), coarse)?;
        Self::new(u32::from_le_bytes([c0, c1, c2, c3]), fine, coarse)
    }

    fn id(self) -> u32 {
        Self::ID
    }

    fn params(self) -> [u8; 16] {
        let [c0, c1, c2, c3] = self.count.to_le_bytes();
        let [fine_id, ..] = self.fine.id().to_le_bytes();
        let [coarse_id, ..] = self.coarse.encoding().id().to_le_bytes();
        let [f0, f1, f2, f3, ..] = self.fine.params();
        let [p0, p1, p2, p3, p4, p5, ..] = self.coarse.encoding().params();
        [c0, c1, c2, c3, fine_id, coarse_id, f0, f1, f2, f3, p0, p1, p2, p3, p4, p5]
    }

    fn allows(self, rows: u64, _: u64) -> bool {
        u64::from(self.count) <= rows
    }

    fn payload_len(self, rows: u64, cols: u64) -> Option<u64> {
        total(self.segments(rows, cols)?)
    }

    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<MixedRowsView<'_>> {
        MixedRowsView::new(self, rows, cols, payload)
    }
}

impl fmt::Display for MixedRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} with {} rows {}", self.coarse.encoding(), self.count, self.fine)
    }
}

/// The logical content of a mixed-rows tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MixedRowsParts {
    /// Parameters.
    pub spec: MixedRows,
    /// The listed rows, strictly ascending.
    pub listed: Vec<u32>,
    /// The payload of the listed rows, [count, cols].
    pub fine: Vec<u8>,
    /// The payload of all rows, [rows, cols].
    pub coarse: Vec<u8>,
}

impl MixedRowsParts {
    /// The payload.
    #[must_use]
    pub fn pack(&self) -> Vec<u8> {
        let listed: Vec<u8> = self.listed.iter().flat_map(|r| r.to_le_bytes()).collect();
        join([&listed, &self.fine, &self.coarse])
    }
}

/// The matrix of all rows, in place.
#[derive(Clone, Copy, Debug)]
pub enum CoarseRowsView<'a> {
    /// See [`CoarseRows::IntGroup`].
    IntGroup(IntGroupView<'a>),
    /// See [`CoarseRows::Nm`].
    Nm(NmView<'a>),
    /// See [`CoarseRows::Trellis`].
    Trellis(TrellisView<'a>),
}

impl<'a> CoarseRowsView<'a> {
    /// The matrix as one of any encoding.
    #[must_use]
    pub fn matrix(self) -> MatrixView<'a> {
        match self {
            Self::IntGroup(view) => MatrixView::IntGroup(view),
            Self::Nm(view) => MatrixView::Nm(view),
            Self::Trellis(view) => MatrixView::Trellis(view),
        }
    }
}

/// A mixed-rows matrix in place.
#[derive(Clone, Copy, Debug)]
pub struct MixedRowsView<'a> {
    /// Parameters.
    pub spec: MixedRows,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// The listed rows, strictly ascending.
    pub listed: &'a [[u8; 4]],
    /// The listed rows with more bits, [count, cols].
    pub fine: IntGroupView<'a>,
    /// All rows, [rows, cols].
    pub coarse: CoarseRowsView<'a>,
    segments: [&'a [u8]; 3],
}

impl<'a> MixedRowsView<'a> {
    /// A view of `payload`; `None` if its length does not fit the shape.
    #[must_use]
    pub fn new(spec: MixedRows, rows: u64, cols: u64, payload: &'a [u8]) -> Option<Self> {
        let segments = split(payload, spec.segments(rows, cols)?)?;
        let [listed, fine, coarse] = segments;
        Some(Self {
            spec,
            rows: usize::try_from(rows).ok()?,
            cols: usize::try_from(cols).ok()?,
            listed: listed.as_chunks().0,
            fine: spec.fine.view(u64::from(spec.count), cols, fine)?,
            coarse: spec.coarse.view(rows, cols, coarse)?,
            segments,
        })
    }

    /// The number of listed rows before row `row`: where row `row` is in the list, if it is there.
    #[must_use]
    #[inline]
    pub fn listed_before(&self, row: usize) -> usize {
        self.listed.partition_point(|r| listed_row(*r) < row)
    }

    /// The listed row at `index`; `usize::MAX` past the end of the list.
    #[must_use]
    #[inline]
    pub fn listed_row(&self, index: usize) -> usize {
        self.listed.get(index).map_or(usize::MAX, |r| listed_row(*r))
    }

    /// The logical content.
    #[must_use]
    pub fn unpack(&self) -> MixedRowsParts {
        let listed = self.listed.iter().map(|r| u32::from_le_bytes(*r)).collect();
        let [_, fine, coarse] = self.segments.map(<[u8]>::to_vec);
        MixedRowsParts { spec: self.spec, listed, fine, coarse }
    }

    /// STB-R-045.
    fn check_listed(&self) -> Result<()> {
        let mut least = 0;
        for (index, row) in self.listed.iter().enumerate() {
            let row = listed_row(*row);
            if row < least || row >= self.rows {
                let detail = match row >= self.rows {
                    true => format!("row {row} of {} is listed", self.rows),
                    false => format!("row {row} is listed after a row that is not below it"),
                };
                let at = len_u64(index).saturating_mul(4);
                return Err(Error::new(Rule::PayloadRows, detail).at(at));
            }
            least = row.saturating_add(1);
        }
        Ok(())
    }
}

#[inline]
fn listed_row(bytes: [u8; 4]) -> usize {
    usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
}

impl WeightView for MixedRowsView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        let index = self.listed_before(row);
        if self.listed_row(index) == row {
            return self.fine.decode_row(index, out);
        }
        self.coarse.matrix().decode_row(row, out);
    }

    fn check(&self, payload: &[u8]) -> Result<()> {
        let mut end = 0usize;
        let mut starts = [0u64; 3];
        for (start, segment) in starts.iter_mut().zip(self.segments) {
            let from = segment.as_ptr().addr().saturating_sub(payload.as_ptr().addr());
            let padding = payload.get(end..from).unwrap_or_default();
            if let Some(at) = first_nonzero(padding) {
                let detail = "a byte between two segments is not zero";
                let at = len_u64(end.saturating_add(at));
                return Err(Error::new(Rule::PayloadPadding, detail).at(at));
            }
            *start = len_u64(from);
            end = from.saturating_add(segment.len());
        }
        self.check_listed()?;
        let ([_, fine, coarse], [_, fine_start, coarse_start]) = (self.segments, starts);
        self.fine.check(fine).map_err(|e| e.shifted(fine_start))?;
        self.coarse.matrix().check(coarse).map_err(|e| e.shifted(coarse_start))
    }
}
