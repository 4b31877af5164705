//! Matrices of which some rows are stored a second time: their results and weights replace those of the same rows as
//! the other encoding has them.

use bytemuck::{Pod, Zeroable};

use super::device::{Buffer, Device};
use super::encoding::{ListedRows, MatrixPart};
use super::error::Result;
use super::launch::{Launch, LaunchShape, check_grid_y, to_u32};
use super::matrix::Matrix;
use super::module::{Module, module};

/// The module of mixed_rows.cu.
pub(super) const MODULE: Module = module!("mixed rows", "mixed_rows.cu");

/// `THREADS` of common.cuh.
const THREADS: usize = 256;

/// `MoveParams` of mixed_rows.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct MoveParams {
    listed: u64,
    values: u64,
    out: u64,
    count: u32,
    rows: u32,
}

/// `FindParams` of mixed_rows.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
struct FindParams {
    listed: u64,
    ids: u64,
    found: u64,
    listed_count: u32,
    count: u32,
}

/// The product of the listed rows of a matrix, which is computed after that of all rows.
#[derive(Debug)]
pub(super) struct ListedProduct<'m> {
    /// The listed rows.
    pub part: &'m MatrixPart,
    /// The address of their results, [tokens, count].
    pub values: u64,
    /// Moves these to the results of all rows.
    scatter: Launch,
}

/// Memory for products and conversions of matrices with listed rows. It grows on demand.
#[derive(Debug)]
pub(super) struct ListedScratch {
    device: Device,
    values: Buffer<f32>,
    found: Buffer<u32>,
}

impl ListedScratch {
    /// No memory yet.
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self {
            device: device.clone(),
            values: device.zeros("results of listed rows", 0)?,
            found: device.zeros("numbers of listed rows", 0)?,
        })
    }

    /// Prepares the product of the listed rows of `matrix`; `None` if it has none. Called before the product of all
    /// rows is queued; [`ListedScratch::finish`] then replaces its results for them in `out`, [tokens, rows]. With `add`,
    /// `values` starts with what `out` holds for the listed rows, because their product is added to it.
    pub(super) fn begin<'m>(
        &mut self,
        matrix: &'m Matrix,
        out: &mut Buffer<f32>,
        add: bool,
        tokens: usize,
    ) -> Result<Option<ListedProduct<'m>>> {
        let Some(ListedRows { numbers, part }) = matrix.listed() else { return Ok(None) };
        let (count, rows) = (part.params.rows(), matrix.rows());
        assert!(out.len() >= tokens * rows, "room for the result");
        check_grid_y(tokens, tokens, "tokens")?;
        if tokens * count > self.values.len() {
            self.values = self.device.zeros("results of listed rows", tokens * count)?;
        }
        let (values, out) = (self.values.address(), out.address());
        let (count, rows) = (count as u32, rows as u32);
        let params = MoveParams { listed: *numbers, values, out, count, rows };
        let blocks = [(count as usize).div_ceil(THREADS), tokens, 1];
        let shape = LaunchShape { blocks, threads: THREADS as u32, shared: 0 };
        let plan = |kernel| Launch::new(MODULE, kernel, shape, &params);
        if add {
            // SAFETY: the list has `count` numbers, and `values` and `out` have room for the results of as many
            // tokens as there are blocks in y. The kernel skips numbers outside the matrix.
            unsafe { self.device.launch(&plan("gather_results")) }?;
        }
        Ok(Some(ListedProduct { part, values, scatter: plan("scatter_results") }))
    }

    /// Queues the replacement of the results of all rows, after both products.
    pub(super) fn finish(&self, product: &ListedProduct<'_>) -> Result<()> {
        // SAFETY: as in `begin`. `values` has not grown since, because products take turns.
        unsafe { self.device.launch(&product.scatter) }
    }

    /// Queues the search for `count` rows in the list: the first of `ids`, or 0, 1, 2 and so on. Returns their places
    /// in the list; for those that are not listed, a number that no row has.
    pub(super) fn find(
        &mut self,
        listed: &ListedRows,
        ids: Option<&Buffer<u32>>,
        count: usize,
    ) -> Result<&Buffer<u32>> {
        assert!(ids.is_none_or(|ids| ids.len() >= count), "as many rows");
        if count > self.found.len() {
            self.found = self.device.zeros("numbers of listed rows", count)?;
        }
        let params = FindParams {
            listed: listed.numbers,
            ids: ids.map_or(0, Buffer::address),
            found: self.found.address(),
            listed_count: listed.part.params.rows() as u32,
            count: to_u32("a number of rows", count)?,
        };
        let blocks = [count.div_ceil(THREADS), 1, 1];
        let shape = LaunchShape { blocks, threads: THREADS as u32, shared: 0 };
        let launch = Launch::new(MODULE, "find_rows", shape, &params);
        // SAFETY: the list has `listed_count` numbers, `ids`, if there are any, and `found` have at least `count`.
        unsafe { self.device.launch(&launch) }?;
        Ok(&self.found)
    }
}
