//! [`Gguf`]: parses and validates a file.

use std::collections::{BTreeMap, BTreeSet};

use super::cursor::Cursor;
use super::error::{GgufError, GgufProblem};
use super::types::GgufType;
use super::value::GgufValue;
use crate::limits::{MAX_DIMS, MAX_ELEMENTS};
use crate::num::{align_up, len_u64, slice};

/// The alignment of tensors if the file does not state it.
const ALIGNMENT: u64 = 32;
/// The largest alignment.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// A GGUF file in memory: validated metadata, and tensors in place.
#[derive(Clone, Debug)]
pub struct Gguf<'a> {
    version: u32,
    metadata: BTreeMap<&'a str, GgufValue<'a>>,
    tensors: Vec<GgufTensor<'a>>,
}

/// A tensor of a GGUF file.
#[derive(Clone, Debug)]
pub struct GgufTensor<'a> {
    name: &'a str,
    shape: Vec<u64>,
    type_id: u32,
    offset: u64,
    /// The stored bytes, if the type is known.
    payload: Option<&'a [u8]>,
}

impl<'a> Gguf<'a> {
    /// Parses a file and checks everything that does not depend on the model: counts and lengths, the values of
    /// metadata, and that tensors lie in the file without overlap. Nothing is copied; memory is taken in
    /// proportion to the number of entries that the file really has.
    ///
    /// # Errors
    /// The first problem, with its place.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, GgufError> {
        let mut cursor = Cursor::new(bytes, 0);
        let version = parse_version(&mut cursor)?;
        // A tensor has at least the length of its name, the number of dimensions, one dimension, type and offset;
        // an entry the length of its key, its type and one byte.
        let tensors = cursor.count(32, "the number of tensors")?;
        let entries = cursor.count(13, "the number of metadata entries")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let at = cursor.offset();
            let key = cursor.name("a metadata key")?;
            let kind = cursor.u32("the type of a value").map_err(|e| e.of(format!("key {key}")))?;
            let value =
                GgufValue::parse(&mut cursor, kind, 0).map_err(|e| e.of(format!("key {key}")))?;
            if metadata.insert(key, value).is_some() {
                let error = GgufError::new(GgufProblem::Duplicate, "the key appears twice");
                return Err(error.of(format!("key {key}")).at(at));
            }
        }
        let alignment = alignment(&metadata)?;
        let infos = (0..tensors).map(|_| TensorInfo::parse(&mut cursor));
        let infos: Vec<TensorInfo<'a>> = infos.collect::<Result<_, _>>()?;
        check_unique(&infos)?;
        let data = align_up(cursor.offset(), alignment).unwrap_or(u64::MAX);
        let place = |info: TensorInfo<'a>| {
            let subject = format!("tensor {}", info.name);
            info.place(bytes, data, alignment).map_err(|e| e.of(subject))
        };
        let tensors = infos.into_iter().map(place).collect::<Result<Vec<_>, _>>()?;
        check_overlap(&tensors)?;
        Ok(Self { version, metadata, tensors })
    }

    /// The version of the file: 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The value of a metadata key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<GgufValue<'a>> {
        self.metadata.get(key).copied()
    }

    /// All metadata, by ascending key.
    pub fn metadata(&self) -> impl ExactSizeIterator<Item = (&'a str, GgufValue<'a>)> + '_ {
        self.metadata.iter().map(|(key, value)| (*key, *value))
    }

    /// The tensors in the order of the file.
    #[must_use]
    pub fn tensors(&self) -> &[GgufTensor<'a>] {
        &self.tensors
    }
}

impl<'a> GgufTensor<'a> {
    /// The name, such as `blk.0.attn_q.weight`.
    #[must_use]
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The dimensions in PyTorch order (GGUF stores them reversed).
    #[must_use]
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The id of the type.
    #[must_use]
    pub fn type_id(&self) -> u32 {
        self.type_id
    }

    /// The offset in the file in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The type and the stored bytes, row after row.
    ///
    /// # Errors
    /// [`GgufProblem::TensorType`] if the type is unknown.
    pub fn payload(&self) -> Result<(GgufType, &'a [u8]), GgufError> {
        GgufType::from_id(self.type_id).zip(self.payload).ok_or_else(|| {
            let detail = format!("tensor type {} is not supported", self.type_id);
            GgufError::new(GgufProblem::TensorType, detail)
                .of(format!("tensor {}", self.name))
                .at(self.offset)
        })
    }
}

fn parse_version(cursor: &mut Cursor<'_>) -> Result<u32, GgufError> {
    let magic = cursor.take(4, "the magic bytes")?;
    if magic != b"GGUF" {
        let detail = "the file does not start with GGUF, so it is not a GGUF file";
        return Err(GgufError::new(GgufProblem::Magic, detail).at(0));
    }
    let version = cursor.u32("the version")?;
    if matches!(version, 2 | 3) {
        return Ok(version);
    }
    let (problem, detail) = if matches!(version.swap_bytes(), 1..=255) {
        let detail = "the file is big-endian; convert it to little-endian, for example with \
                      gguf-convert-endian of the Python package gguf";
        (GgufProblem::ByteOrder, detail.to_owned())
    } else {
        let detail =
            format!("GGUF version {version} is not supported, only 2 and 3; write the file again");
        (GgufProblem::Version, detail)
    };
    Err(GgufError::new(problem, detail).at(4))
}

/// The alignment of tensors in bytes.
fn alignment(metadata: &BTreeMap<&str, GgufValue<'_>>) -> Result<u64, GgufError> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(ALIGNMENT) };
    match value.as_u64() {
        Some(value) if value.is_power_of_two() && value <= MAX_ALIGNMENT => Ok(value),
        _ => {
            let detail = format!("{value:?} is not a power of two up to {MAX_ALIGNMENT}");
            Err(GgufError::new(GgufProblem::Alignment, detail).of("key general.alignment"))
        }
    }
}

/// A tensor entry as stored.
struct TensorInfo<'a> {
    name: &'a str,
    shape: Vec<u64>,
    type_id: u32,
    /// From the start of the data.
    offset: u64,
    /// The place of the entry in the file.
    at: u64,
}

impl<'a> TensorInfo<'a> {
    fn parse(cursor: &mut Cursor<'a>) -> Result<Self, GgufError> {
        let at = cursor.offset();
        let name = cursor.name("a tensor name")?;
        let mut rest = || {
            let dims = cursor.u32("the number of dimensions")?;
            let dims = usize::try_from(dims).unwrap_or(usize::MAX);
            if dims == 0 || dims > MAX_DIMS {
                let detail = format!("{dims} dimensions, 1 to {MAX_DIMS} are allowed");
                return Err(GgufError::new(GgufProblem::Dimensions, detail));
            }
            let shape = (0..dims).map(|_| cursor.u64("a dimension"));
            let mut shape: Vec<u64> = shape.collect::<Result<_, _>>()?;
            shape.reverse();
            let elements = shape.iter().try_fold(1u64, |n, d| n.checked_mul(*d));
            if elements.is_none_or(|n| n == 0 || n > MAX_ELEMENTS) {
                let detail = format!("shape {shape:?} has no or too many elements");
                return Err(GgufError::new(GgufProblem::Dimensions, detail));
            }
            let (type_id, offset) = (cursor.u32("a tensor type")?, cursor.u64("an offset")?);
            Ok(Self { name, shape, type_id, offset, at })
        };
        rest().map_err(|e| e.of(format!("tensor {name}")).at(at))
    }

    /// The tensor in the file `bytes`, whose data starts at `data`.
    fn place(
        self,
        bytes: &'a [u8],
        data: u64,
        alignment: u64,
    ) -> Result<GgufTensor<'a>, GgufError> {
        let fail = |problem, detail: String| Err(GgufError::new(problem, detail).at(self.at));
        if !self.offset.is_multiple_of(alignment) {
            let detail = format!("offset {} is not a multiple of {alignment}", self.offset);
            return fail(GgufProblem::Range, detail);
        }
        let offset = data.saturating_add(self.offset);
        let length = match GgufType::from_id(self.type_id) {
            Some(kind) => {
                let cols = self.shape.last().copied().unwrap_or(1);
                let rows = self.shape.iter().product::<u64>().checked_div(cols).unwrap_or(0);
                let Some(row) = kind.byte_len(cols) else {
                    let weights = kind.block_weights();
                    let detail =
                        format!("rows of {cols} are no whole blocks of {weights} of type {kind}");
                    return fail(GgufProblem::Dimensions, detail);
                };
                row.checked_mul(rows)
            }
            // At least one byte.
            None => Some(1),
        };
        let Some(payload) = length.and_then(|length| slice(bytes, offset, length)) else {
            let detail = format!(
                "its {} bytes at {offset} end outside the file of {} bytes; the file is cut off or damaged",
                length.unwrap_or(u64::MAX),
                bytes.len()
            );
            return fail(GgufProblem::Range, detail);
        };
        let payload = GgufType::from_id(self.type_id).map(|_| payload);
        let Self { name, shape, type_id, .. } = self;
        Ok(GgufTensor { name, shape, type_id, offset, payload })
    }
}

fn check_unique(infos: &[TensorInfo<'_>]) -> Result<(), GgufError> {
    let mut seen = BTreeSet::new();
    match infos.iter().find(|info| !seen.insert(info.name)) {
        None => Ok(()),
        Some(info) => Err(GgufError::new(GgufProblem::Duplicate, "the name appears twice")
            .of(format!("tensor {}", info.name))
            .at(info.at)),
    }
}

fn check_overlap(tensors: &[GgufTensor<'_>]) -> Result<(), GgufError> {
    let mut sorted: Vec<&GgufTensor<'_>> = tensors.iter().collect();
    sorted.sort_by_key(|tensor| tensor.offset);
    for (before, after) in sorted.iter().zip(sorted.iter().skip(1)) {
        let length = before.payload.map_or(1, |payload| len_u64(payload.len()));
        if before.offset.saturating_add(length) > after.offset {
            let detail = format!("shares bytes with tensor {}", before.name);
            return Err(GgufError::new(GgufProblem::Overlap, detail)
                .of(format!("tensor {}", after.name))
                .at(after.offset));
        }
    }
    Ok(())
}
