//! Activations of several tokens, quantized to 8 bits, in the arrangements that GEMM kernels read.

use crate::cpu::arch::bytes::{Aligned, Bytes, TileLines};
use crate::cpu::ops::q8::{BLOCK, quantize_block};

/// Tokens are padded with zeros to a multiple of this.
pub(crate) const TOKENS: usize = 32;
/// Tokens whose look-up tables are stored together.
pub(crate) const TABLE_TOKENS: usize = 8;
/// Columns that share an offset.
const OFFSET_COLS: usize = 32;

/// Activations of a block of columns, [token][column].
pub(crate) type BlockByToken = Aligned<[[i8; BLOCK]; TOKENS]>;

/// Activations of a block of columns as tiles read them, [half of the tokens][half of the columns][c][4·token + k]
/// with column 4c + k.
pub(crate) type BlockByFour = Aligned<[[TileLines; 2]; TOKENS / 16]>;

/// Activations of a block of columns, [half of the tokens][column][token].
pub(crate) type BlockByColumn = Aligned<[[[i16; 16]; BLOCK]; TOKENS / 16]>;

/// A look-up table for each of [`TABLE_TOKENS`] tokens.
pub(crate) type TokenTables = Aligned<[[u8; 64]; TABLE_TOKENS]>;

/// Offsets added to the sums of each [`OFFSET_COLS`] columns of a block: [unit of 32 columns][token].
pub(crate) type BlockOffsets = [[i32; TOKENS]; BLOCK / OFFSET_COLS];

/// How a kernel reads the activations of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Q8Layout {
    pub(crate) arrangement: Q8Arrangement,
    /// Padded tokens whose products are computed together.
    pub(crate) group: usize,
    /// Rows of a task; tasks of more rows are not faster.
    pub(crate) task_rows: usize,
    /// Whether the activations are kept without rounding, too.
    pub(crate) keep_values: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Q8Arrangement {
    /// Codes of a token side by side.
    ByToken,
    /// [`Q8Arrangement::ByToken`], and an offset for each 32 columns.
    ByTokenWithOffsets,
    /// Four codes of a token side by side, and an offset for each 32 columns.
    ByFourWithOffsets,
    /// Codes of a column side by side.
    ByColumn,
    /// Look-up tables.
    Tables { per_block: usize },
}

/// Activations of several tokens, quantized to 8 bits with one scale per token and 128 columns, ready
/// for [`gemm_q8`](crate::gemm_q8).
#[derive(Default, Debug)]
pub struct ActivationsQ8 {
    /// By group of [`TOKENS`] tokens, by block of columns. Only one of `by_token`, `by_four`, `by_column` and `tables` is
    /// in use. Blocks instead of whole rows, because rows at multiples of a page would compete for the same cache
    /// sets.
    pub(crate) by_token: Vec<BlockByToken>,
    pub(crate) by_four: Vec<BlockByFour>,
    pub(crate) by_column: Vec<BlockByColumn>,
    /// For each [`TABLE_TOKENS`] tokens, the tables of each block.
    pub(crate) tables: Vec<TokenTables>,
    /// By group of [`TOKENS`] tokens, by block: the scale of each token.
    pub(crate) scales: Vec<[f32; TOKENS]>,
    pub(crate) offsets: Vec<BlockOffsets>,
    /// The activations without rounding, [token][column], padded to whole blocks; empty if the layout has none.
    values: Vec<f32>,
    pub(crate) tokens: usize,
    pub(crate) cols: usize,
    /// See [`Q8Layout`].
    pub(crate) group: usize,
    task_rows: usize,
}

/// Activations of up to `TOKENS` tokens, and the part of [`ActivationsQ8`] that receives them.
#[derive(Debug)]
pub struct QuantizeChunk<'a> {
    /// [token][column].
    x: &'a [f32],
    cols: usize,
    /// For each block. Only one of `by_token`, `by_four`, `by_column` and `tables` is in use.
    by_token: &'a mut [BlockByToken],
    by_four: &'a mut [BlockByFour],
    by_column: &'a mut [BlockByColumn],
    /// For each [`TABLE_TOKENS`] tokens, the tables of each block.
    pub(crate) tables: &'a mut [TokenTables],
    scales: &'a mut [[f32; TOKENS]],
    /// For each block; empty if the layout has none.
    pub(crate) offsets: &'a mut [BlockOffsets],
}

impl ActivationsQ8 {
    /// Makes room for `x`, [tokens, `cols`] row-major, in the layout that
    /// [`PackedGemmQ8::layout`](crate::PackedGemmQ8::layout) returned, and splits the work of quantizing it
    /// into independent chunks, all of which must be given to
    /// [`PackedGemmQ8::quantize`](crate::PackedGemmQ8::quantize).
    ///
    /// # Panics
    /// If `x` is not a whole number of rows.
    pub fn chunks<'a>(
        &'a mut self,
        layout: Q8Layout,
        x: &'a [f32],
        cols: usize,
    ) -> Vec<QuantizeChunk<'a>> {
        assert!(x.len().is_multiple_of(cols), "whole rows of activations");
        (self.tokens, self.cols) = (x.len() / cols, cols);
        (self.group, self.task_rows) = (layout.group, layout.task_rows);
        let blocks = self.blocks();
        self.values.clear();
        if layout.keep_values {
            for x in x.chunks_exact(cols) {
                self.values.extend_from_slice(x);
                self.values.resize(self.values.len().next_multiple_of(BLOCK), 0.0);
            }
        }
        let tables_per_chunk = self.make_room(layout.arrangement);
        let mut by_token = self.by_token.chunks_mut(blocks);
        let mut by_four = self.by_four.chunks_mut(blocks);
        let mut by_column = self.by_column.chunks_mut(blocks);
        let mut tables = self.tables.chunks_mut(tables_per_chunk.max(1));
        let mut offsets = self.offsets.chunks_mut(blocks);
        let chunks = x.chunks(TOKENS * cols).zip(self.scales.chunks_mut(blocks));
        let chunk = |(x, scales)| QuantizeChunk {
            x,
            cols,
            by_token: by_token.next().unwrap_or_default(),
            by_four: by_four.next().unwrap_or_default(),
            by_column: by_column.next().unwrap_or_default(),
            tables: tables.next().unwrap_or_default(),
            scales,
            offsets: offsets.next().unwrap_or_default(),
        };
        chunks.map(chunk).collect()
    }

    /// Resizes the buffers of the arrangement and empties the others. Returns the number of tables of a chunk.
    /// Earlier content is overwritten or belongs to no token.
    fn make_room(&mut self, arrangement: Q8Arrangement) -> usize {
        let blocks = self.blocks();
        let count = self.tokens.div_ceil(TOKENS) * blocks;
        let (mut by_token, mut by_four, mut by_column) = (0, 0, 0);
        let (mut offsets, mut per_block) = (0, 0);
        match arrangement {
            Q8Arrangement::ByToken => by_token = count,
            Q8Arrangement::ByTokenWithOffsets => (by_token, offsets) = (count, count),
            Q8Arrangement::ByFourWithOffsets => (by_four, offsets) = (count, count),
            Q8Arrangement::ByColumn => by_column = count,
            Q8Arrangement::Tables { per_block: tables } => per_block = tables,
        }
        let tables = self.tokens.div_ceil(TABLE_TOKENS) * blocks * per_block;
        self.by_token.resize(by_token, Aligned([[0; BLOCK]; TOKENS]));
        self.by_four.resize(by_four, Aligned([[[[0; 64]; 16]; 2]; TOKENS / 16]));
        self.by_column.resize(by_column, Aligned([[[0; 16]; BLOCK]; TOKENS / 16]));
        self.tables.resize(tables, Aligned([[0; 64]; TABLE_TOKENS]));
        self.offsets.resize(offsets, [[0; TOKENS]; BLOCK / OFFSET_COLS]);
        self.scales.resize(count, [0.0; TOKENS]);
        TOKENS / TABLE_TOKENS * blocks * per_block
    }

    /// Tokens, padding included, that [`gemm_q8`](crate::gemm_q8) computes at a time.
    #[must_use]
    pub fn group(&self) -> usize {
        self.group
    }

    /// Rows for a call of [`gemm_q8`](crate::gemm_q8); calls with more rows are not faster.
    #[must_use]
    pub fn task_rows(&self) -> usize {
        self.task_rows
    }

    /// The number of groups of [`ActivationsQ8::group`] tokens.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.tokens.div_ceil(self.group.max(1))
    }

    /// Blocks of columns.
    pub(crate) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// The activations of a token without rounding, padded with zeros.
    ///
    /// # Panics
    /// If the layout keeps none, or there is no such token.
    pub(crate) fn values(&self, token: usize) -> &[f32] {
        let padded = self.blocks() * BLOCK;
        &self.values[token * padded..][..padded]
    }
}

impl QuantizeChunk<'_> {
    /// Blocks of columns.
    #[inline(always)]
    pub(crate) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Quantizes all tokens. `scale_columns` first changes the activations of a token. `arrange` gets the
    /// chunk, the block, the token and the codes, and writes the fields that depend on the encoding.
    #[inline(always)]
    pub(crate) fn quantize<S: Bytes>(
        &mut self,
        s: S,
        scale_columns: impl Fn(&mut [f32]),
        arrange: impl Fn(&mut Self, usize, usize, &[i8; BLOCK]),
    ) {
        let (x, cols) = (self.x, self.cols);
        let mut scaled = vec![0.0; self.blocks() * BLOCK];
        for (t, x) in x.chunks_exact(cols).enumerate() {
            scaled[..cols].copy_from_slice(x);
            scale_columns(&mut scaled);
            for (b, x) in scaled.chunks_exact(BLOCK).enumerate() {
                let mut codes = [0; BLOCK];
                self.scales[b][t] = quantize_block(s, x, &mut codes);
                if let Some(to) = self.by_token.get_mut(b) {
                    to.0[t] = codes;
                } else if let Some(to) = self.by_four.get_mut(b) {
                    let lines = to.0[t / 16].as_flattened_mut().iter_mut();
                    for (to, four) in lines.zip(codes.as_chunks().0) {
                        let to: &mut [u8; 4] = &mut to.as_chunks_mut().0[t % 16];
                        *to = four.map(i8::cast_unsigned);
                    }
                } else if let Some(to) = self.by_column.get_mut(b) {
                    for (to, code) in to.0[t / 16].iter_mut().zip(codes) {
                        to[t % 16] = i16::from(code);
                    }
                }
                arrange(self, b, t, &codes);
            }
        }
    }
}
