//! The TENSORS section: names, shapes, encodings and payload offsets (spec, container §3.3).

use std::collections::HashSet;

use zerocopy::FromBytes;

use crate::encoding::{Encoding, MatrixView};
use crate::error::{Error, Result, Rule};
use crate::limits::{MAX_DIM, MAX_DIMS, MAX_ELEMENTS, MAX_TENSORS, TENSOR_ALIGN};
use crate::num::{align_up, len_u64, slice};
use crate::raw::{TENSOR_ENTRY_BYTES, TableHeader, TensorEntry};

/// One tensor of a file: its table entry, and its payload in place.
#[derive(Clone, Debug)]
pub struct Tensor<'a> {
    name: &'a str,
    shape: Vec<u64>,
    encoding: Encoding,
    payload: &'a [u8],
    checksum: u64,
    offset: u64,
}

impl<'a> Tensor<'a> {
    /// The Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
    #[must_use]
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// The dimensions in PyTorch order: `[out_features, in_features]` for a linear layer.
    #[must_use]
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// The encoding of the weights.
    #[must_use]
    pub fn encoding(&self) -> &Encoding {
        &self.encoding
    }

    /// The stored bytes: codes, masks, scales and the padding between them.
    #[must_use]
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// The stored XXH3-64 checksum of the payload.
    #[must_use]
    pub fn checksum(&self) -> u64 {
        self.checksum
    }

    /// Offset of the payload in the file in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The number of weights.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Rows and columns of the tensor as a matrix: the last dimension gives the columns, the product of
    /// the others the rows. A vector is one row.
    #[must_use]
    pub fn matrix_shape(&self) -> (u64, u64) {
        let cols = self.shape.last().copied().unwrap_or(1);
        (self.elements().checked_div(cols).unwrap_or(0), cols)
    }

    /// Stored bits per weight: 8 × payload bytes ÷ elements.
    #[must_use]
    #[allow(clippy::as_conversions, reason = "a ratio for display")]
    pub fn stored_bits(&self) -> f64 {
        self.payload.len() as f64 * 8.0 / self.elements() as f64
    }

    /// Compares the payload with its checksum (STB-R-040).
    ///
    /// # Errors
    /// STB-R-040 if the checksums differ.
    pub fn verify_checksum(&self) -> Result<()> {
        let found = crate::checksum(self.payload);
        if found == self.checksum {
            return Ok(());
        }
        let detail = format!("checksum {found:016x}, expected {:016x}", self.checksum);
        Err(Error::new(Rule::TensorChecksum, detail).at(self.offset).in_tensor(self.name))
    }

    /// Checks the content of the payload: padding, finite values, masks (STB-R-041 to STB-R-045).
    ///
    /// # Errors
    /// The first broken rule.
    pub fn verify_payload(&self) -> Result<()> {
        let (rows, cols) = self.matrix_shape();
        self.encoding
            .check_payload(rows, cols, self.payload)
            .map_err(|e| e.shifted(self.offset).in_tensor(self.name))
    }

    /// The payload as a matrix in place, the form that kernels use.
    ///
    /// # Errors
    /// STB-R-050 if the encoding is unknown to this reader.
    pub fn view(&self) -> Result<MatrixView<'a>> {
        let (rows, cols) = self.matrix_shape();
        self.encoding
            .view(rows, cols, self.payload)
            .map_err(|e| e.at(self.offset).in_tensor(self.name))
    }

    /// Decodes the whole tensor, row-major.
    ///
    /// # Errors
    /// STB-R-050 if the encoding is unknown to this reader.
    pub fn decode(&self) -> Result<Vec<f32>> {
        Ok(self.view()?.decode())
    }
}

/// Parses the TENSORS section at file offset `base`. `data` is the DATA section at `data_base`.
pub(crate) fn parse_table<'a>(
    section: &'a [u8],
    base: u64,
    data: &'a [u8],
    data_base: u64,
) -> Result<Vec<Tensor<'a>>> {
    let (entries, names) = split_table(section, base)?;
    let mut tensors: Vec<Tensor<'a>> = Vec::new();
    let mut seen = HashSet::new();
    let mut name_end = 0u64;
    let mut data_end = 0u64;
    for (index, entry) in entries.iter().enumerate() {
        let at = entry_offset(base, index);
        let shape = parse_shape(entry, index).map_err(|e| e.at(at))?;
        let name = parse_name(entry, names, name_end, index).map_err(|e| e.at(at))?;
        name_end = name_end.saturating_add(u64::from(entry.name_length.get()));
        if !seen.insert(name) {
            return Err(Error::new(Rule::TensorUnique, "a second tensor of this name")
                .at(at)
                .in_tensor(name));
        }
        let (payload, encoding) =
            parse_payload(entry, &shape, data, data_end).map_err(|e| e.at(at).in_tensor(name))?;
        data_end = entry.offset.get().saturating_add(entry.length.get());
        let offset = data_base.saturating_add(entry.offset.get());
        let checksum = entry.checksum.get();
        tensors.push(Tensor { name, shape, encoding, payload, checksum, offset });
    }
    if name_end != len_u64(names.len()) {
        let detail = format!("names use {name_end} of {} bytes", names.len());
        return Err(Error::new(Rule::TensorName, detail).at(base));
    }
    if data_end != len_u64(data.len()) {
        let detail = format!("tensors end at {data_end}, DATA at {}", data.len());
        return Err(Error::new(Rule::TensorOffset, detail).at(data_base));
    }
    Ok(tensors)
}

/// STB-R-030: the section consists of the header, `count` entries and the names.
fn split_table(section: &[u8], base: u64) -> Result<(&[TensorEntry], &[u8])> {
    let fail = |detail: String| Error::new(Rule::TensorTable, detail).at(base);
    let (header, rest) = TableHeader::ref_from_prefix(section)
        .map_err(|_| fail("TENSORS is shorter than 16 bytes".into()))?;
    let count = header.count.get();
    if count == 0 || count > MAX_TENSORS {
        return Err(fail(format!("{count} tensors, 1 to {MAX_TENSORS} are allowed")));
    }
    let entry_size = usize::try_from(header.entry_size.get()).unwrap_or(0);
    if entry_size != TENSOR_ENTRY_BYTES {
        return Err(fail(format!("tensor entries of {entry_size} bytes")));
    }
    let table = u64::from(count).saturating_mul(len_u64(TENSOR_ENTRY_BYTES));
    if table.checked_add(header.names_length.get()) != Some(len_u64(rest.len())) {
        let detail = format!(
            "{count} entries and {} bytes of names do not make {} bytes",
            header.names_length.get(),
            section.len()
        );
        return Err(fail(detail));
    }
    let elements = usize::try_from(count).unwrap_or(usize::MAX);
    <[TensorEntry]>::ref_from_prefix_with_elems(rest, elements)
        .map_err(|_| fail("tensor entries are cut off".into()))
}

fn entry_offset(base: u64, index: usize) -> u64 {
    let entries = len_u64(index).saturating_mul(len_u64(TENSOR_ENTRY_BYTES));
    base.saturating_add(16).saturating_add(entries)
}

fn parse_shape(entry: &TensorEntry, index: usize) -> Result<Vec<u64>> {
    let fail = |detail: String| Err(Error::new(Rule::TensorShape, detail));
    let ndim = usize::from(entry.ndim);
    if ndim == 0 || ndim > MAX_DIMS {
        return fail(format!("tensor {index} has {ndim} dimensions"));
    }
    let dims: Vec<u64> = entry.dims.iter().map(|d| d.get()).collect();
    let (used, unused) = dims.split_at_checked(ndim).unwrap_or((&[], &[]));
    if used.iter().any(|&d| d == 0 || d > MAX_DIM) || unused.iter().any(|&d| d != 0) {
        return fail(format!("tensor {index} has dimensions {dims:?}, {ndim} of them in use"));
    }
    let elements = used.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    if elements.is_none_or(|n| n > MAX_ELEMENTS) {
        return fail(format!("tensor {index} of shape {used:?} has too many elements"));
    }
    Ok(used.to_vec())
}

fn parse_name<'a>(
    entry: &TensorEntry,
    names: &'a [u8],
    expected_offset: u64,
    index: usize,
) -> Result<&'a str> {
    let fail = |detail: String| Err(Error::new(Rule::TensorName, detail));
    let offset = u64::from(entry.name_offset.get());
    if offset != expected_offset {
        return fail(format!("name {index} starts at {offset}, expected {expected_offset}"));
    }
    let length = u64::from(entry.name_length.get());
    if !(1..=255).contains(&length) {
        return fail(format!("name {index} has {length} bytes"));
    }
    let Some(bytes) = slice(names, offset, length) else {
        return fail(format!("name {index} ends outside the names"));
    };
    match std::str::from_utf8(bytes) {
        Ok(name) if bytes.iter().all(u8::is_ascii_graphic) => Ok(name),
        _ => fail(format!("name {index} has a byte that is not printable ASCII")),
    }
}

fn parse_payload<'a>(
    entry: &TensorEntry,
    shape: &[u64],
    data: &'a [u8],
    data_end: u64,
) -> Result<(&'a [u8], Encoding)> {
    if entry.reserved0 != 0 || entry.reserved1.get() != 0 || entry.reserved2.get() != 0 {
        return Err(Error::new(Rule::TensorReserved, "a reserved field is not zero"));
    }
    let (offset, length) = (entry.offset.get(), entry.length.get());
    let expected = align_up(data_end, TENSOR_ALIGN);
    if expected != Some(offset) {
        let detail = format!("starts at {offset} of DATA, expected {}", expected.unwrap_or(0));
        return Err(Error::new(Rule::TensorOffset, detail));
    }
    let Some(payload) = slice(data, offset, length) else {
        let detail = format!("{length} bytes at {offset} do not fit in DATA");
        return Err(Error::new(Rule::TensorOffset, detail));
    };
    let encoding = Encoding::parse(entry.encoding.get(), entry.params)?;
    if let Some(needed) = encoding.payload_len(shape)?
        && needed != length
    {
        let detail = format!("{length} bytes stored, {encoding} of {shape:?} needs {needed}");
        return Err(Error::new(Rule::TensorLength, detail));
    }
    Ok((payload, encoding))
}
