//! Packed matrices on a device: the payload as it is in the file.

use bytemuck::{Pod, Zeroable};
use stb_format::encoding::{Dense, Encoding, MatrixView};

use super::compile::Module;
use super::device::{Buffer, Device};
use super::launch::to_u32;
use super::{Error, Result};

/// `Matrix` of kernels/cuda/common.cuh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct MatrixParams {
    pub(super) payload: u64,
    segments: [u64; 4],
    pub(super) rows: u32,
    pub(super) cols: u32,
    units: u32,
    block: u32,
    kind: u32,
    padding: u32,
}

/// Which kernels a matrix takes, and how they are to be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub module: Module,
    /// Columns that a lane reads at a time; a warp reads 32 such pieces (joint codes: all of it).
    pub piece: usize,
    /// Bytes of tables per such step of a warp and token; 0 for kernels that work on rows.
    pub table: usize,
    /// Tables of a group in such a step: `QV` of gemv_nm.cu.
    pub tables: usize,
    /// Whether there is a kernel for activations rounded to 8 bits.
    pub rounded: bool,
}

impl MatrixParams {
    /// The matrix that `view` is a view of, with its payload at an address of the device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if it is too large for the kernels.
    pub fn new(view: &MatrixView<'_>, payload: &[u8], address: u64) -> Result<Self> {
        let base = payload.as_ptr().addr();
        let at = |part: *const u8| part.addr().saturating_sub(base) as u64;
        let mut params = Self {
            payload: address,
            rows: to_u32("a matrix with rows", view.rows())?,
            cols: to_u32("a matrix with columns", view.cols())?,
            ..Self::default()
        };
        match view {
            MatrixView::Dense(m) => params.segments[0] = at(m.data.as_ptr()),
            MatrixView::IntGroup(m) => {
                params.segments[0] = at(m.codes.as_ptr());
                params.segments[1] = at(m.scales.as_ptr().cast());
                params.block = m.spec.group() as u32;
                params.units = (m.groups() * m.spec.group() / 32) as u32;
            }
            MatrixView::Stbllm(m) => {
                params.segments = [
                    at(m.salient.as_ptr().cast()),
                    at(m.states.as_ptr().cast()),
                    at(m.signs.as_ptr()),
                    at(m.scales.as_ptr().cast()),
                ];
                params.units = m.units() as u32;
                params.block = m.spec.block() as u32;
                params.kind = m.spec.n() as u32;
            }
            MatrixView::Nm(m) => {
                params.segments = [
                    at(m.col_factors.as_ptr().cast()),
                    at(m.row_scales.as_ptr().cast()),
                    at(m.block_codes.as_ptr()),
                    at(m.codes.as_ptr()),
                ];
                params.units = to_u32("a tile of bytes", m.tile_bytes)?;
                params.block = m.spec.block() as u32;
                params.kind =
                    u32::from(m.spec.scale_bits()) | u32::from(m.spec.has_col_factors()) << 8;
            }
        }
        Ok(params)
    }
}

impl MatrixParams {
    /// Of joint codes: whether there are scales of blocks.
    pub(super) fn has_block_scales(&self) -> bool {
        self.kind & 255 != 0
    }
}

impl Kind {
    pub(super) fn of(encoding: &Encoding) -> Result<Self> {
        let rows = |module, piece, rounded| Self { module, piece, table: 0, tables: 1, rounded };
        // KiB for 512 columns, or 256 of 2:4: gemv_nm.cu.
        let codes = |module, piece, kib: usize, tables| {
            let table = kib << 10;
            Self { module, piece, table, tables, rounded: false }
        };
        let unknown = || Error::Unsupported {
            why: format!("there is no CUDA kernel for the encoding {encoding}; use --device cpu"),
        };
        Ok(match encoding {
            Encoding::Dense(Dense::F32) => rows(Module::F32, 4, false),
            Encoding::Dense(Dense::F16) => rows(Module::F16, 8, false),
            Encoding::Dense(Dense::Bf16) => rows(Module::BF16, 8, false),
            Encoding::IntGroup(spec) => match spec.bits() {
                1 => rows(Module::INT1, 128, true),
                2 => rows(Module::INT2, 64, true),
                3 => rows(Module::INT3, 64, true),
                4 => rows(Module::INT4, 32, true),
                8 => rows(Module::INT8, 32, true),
                _ => return Err(unknown()),
            },
            Encoding::Stbllm(_) => rows(Module::STBLLM, 64, true),
            Encoding::Nm(spec) => match (spec.n(), spec.m()) {
                (1, 8) => codes(Module::NM_1_8, 16, 4, 2),
                (1, 4) => codes(Module::NM_1_4, 16, 16, 2),
                (2, 8) => codes(Module::NM_2_8, 16, 16, 2),
                (2, 4) => codes(Module::NM_2_4, 8, 8, 2),
                _ => return Err(unknown()),
            },
            _ => return Err(unknown()),
        })
    }
}

/// A packed matrix in the memory of a device.
#[derive(Debug)]
pub struct Matrix {
    pub(super) payload: Buffer<u8>,
    pub(super) encoding: Encoding,
    pub(super) params: MatrixParams,
}

impl Matrix {
    /// Copies the payload of a matrix, [rows, cols], to the device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the payload is not that of such a matrix or there is no kernel for it,
    /// [`Error::Memory`] if there is too little, [`Error::Driver`].
    pub fn upload(
        device: &Device,
        encoding: &Encoding,
        rows: usize,
        cols: usize,
        payload: &[u8],
    ) -> Result<Self> {
        Kind::of(encoding)?;
        let view = encoding
            .view(rows as u64, cols as u64, payload)
            .map_err(|e| Error::Unsupported { why: e.to_string() })?;
        let buffer = device.upload("a weight matrix", payload)?;
        let params = MatrixParams::new(&view, payload, buffer.address())?;
        Ok(Self { payload: buffer, encoding: encoding.clone(), params })
    }

    /// Output features.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.params.rows as usize
    }

    /// Input features.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.params.cols as usize
    }

    /// How its weights are stored.
    #[must_use]
    pub fn encoding(&self) -> &Encoding {
        &self.encoding
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.payload.device()
    }

    /// Whether two matrices can be multiplied with the same input in one launch.
    #[must_use]
    pub fn shares_launch(&self, other: &Self) -> bool {
        let kind = |m: &Self| Kind::of(&m.encoding).map(|k| k.module).ok();
        self.cols() == other.cols() && kind(self) == kind(other)
    }
}
