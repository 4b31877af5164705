//! Linear layers on one token or many, split over threads by rows.
//!
//! With activations of 8 bits, GEMV and GEMM of an encoding add in the same order, so the size of a batch chooses
//! between them. With f32 activations, or without a q8 GEMM, they do not, so the rows of a batch have roles: a prefill
//! row always goes through GEMM and a decode row always through GEMV. All kernels give a row the same bits whatever
//! the other rows are. The result for a row therefore depends on the row and its role alone, never on the rest of the
//! batch.

use stb_kernels::{
    ActivationsQ8, GEMV_MAX_BATCH, GemvInput, GemvScratch, Isa, PackedGemmQ8, PackedMatrix, Panels,
    Pool, ROW_TILE, gemm, gemm_q8, gemv, gemv_batch, packed, shares_activations,
};

use crate::weights::Weight;

/// Stored bytes per GEMV task: enough to outweigh the cost of scheduling the task.
const GEMV_TASK_BYTES: usize = 64 << 10;
/// Rows per GEMM task.
const GEMM_TASK_ROWS: usize = 64;
/// The smallest number of tasks per thread of a q8 GEMM. Few tasks are better, because each one
/// repeats the setup that its rows share.
const GEMM_TASKS: usize = 2;
/// Below this many multiplications, threads cost more than they save.
const SERIAL_WORK: usize = 1 << 15;

/// Reusable buffers of linear layers.
#[derive(Default, Debug)]
pub struct LinearScratch {
    /// Whether activations are quantized to 8 bits if a kernel supports it.
    q8: bool,
    /// Prepared activations for GEMV, by matrix and token.
    inputs: Vec<GemvScratch>,
    panels: Panels,
    batch: ActivationsQ8,
    /// Outputs before they are transposed to [tokens, rows]: [rows, padded tokens] of a GEMM, or by
    /// matrix and task of a small batch.
    by_rows: Vec<f32>,
}

/// A packed matrix with its size.
#[derive(Clone, Copy)]
pub struct LinearWeight<'a> {
    /// The matrix with its kernels.
    pub matrix: &'a dyn PackedMatrix,
    /// Stored bytes. The split into tasks depends on them.
    pub bytes: usize,
}

impl LinearScratch {
    /// Empty scratch. With `q8`, activations are quantized to 8 bits if a kernel supports it.
    #[must_use]
    pub fn new(q8: bool) -> Self {
        Self { q8, ..Self::default() }
    }

    /// Sets whether activations are quantized to 8 bits if a kernel supports it.
    pub(crate) fn set_q8(&mut self, q8: bool) {
        self.q8 = q8;
    }
}

/// The input of a linear layer: prefill rows first, then decode rows.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Activations, [tokens, in].
    pub x: &'a [f32],
    /// The number of prefill rows.
    pub prefill: usize,
}

impl<'a> Rows<'a> {
    /// The rows of one sequence, [tokens, cols]: prefill rows if there are several, else a decode row.
    #[must_use]
    pub fn alone(x: &'a [f32], cols: usize) -> Self {
        let tokens = x.len() / cols;
        Self { x, prefill: if tokens > 1 { tokens } else { 0 } }
    }
}

/// The role of a row of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum RowKind {
    /// Computed with GEMM.
    Prefill,
    /// Computed with GEMV.
    Decode,
}

/// `outputs[i] = x · weights[i]ᵀ` for matrices that share their input: `x` is [tokens, in], each
/// output [tokens, out], resized as needed. A small batch needs only one parallel region for all
/// matrices.
///
/// # Panics
/// If the matrices have different widths, or `rows` has not whole tokens or fewer than prefill rows.
pub fn apply<const N: usize>(
    isa: Isa,
    pool: &Pool,
    scratch: &mut LinearScratch,
    weights: [&Weight; N],
    rows: Rows<'_>,
    outputs: [&mut Vec<f32>; N],
) {
    let views = weights.map(Weight::view);
    let weights = std::array::from_fn(|i| LinearWeight {
        matrix: packed(&views[i]),
        bytes: weights[i].byte_len(),
    });
    apply_packed(Threads { isa, pool }, scratch, weights, rows, outputs);
}

/// An instruction set, and the threads that use it.
#[derive(Clone, Copy, Debug)]
pub struct Threads<'a> {
    /// The instruction set.
    pub isa: Isa,
    /// The threads.
    pub pool: &'a Pool,
}

/// [`apply`] for packed matrices of any type.
///
/// # Panics
/// Under the conditions of [`apply`].
pub fn apply_packed<const N: usize>(
    threads: Threads<'_>,
    scratch: &mut LinearScratch,
    weights: [LinearWeight<'_>; N],
    rows: Rows<'_>,
    outputs: [&mut Vec<f32>; N],
) {
    let cols = weights[0].matrix.cols();
    assert!(weights.iter().all(|w| w.matrix.cols() == cols), "matrices of one input");
    assert!(rows.x.len().is_multiple_of(cols), "whole tokens");
    let tokens = rows.x.len() / cols;
    // Quantized GEMM adds like GEMV: roles make no difference, and one product is faster than two.
    let prefill = match scratch.q8 && weights.iter().all(|w| w.matrix.gemm_q8().is_some()) {
        true => 0,
        false => rows.prefill,
    };
    let (prefill_x, decode_x) = rows.x.split_at(prefill * cols);
    let mut prefill_out: [&mut [f32]; N] = std::array::from_fn(|_| Default::default());
    let mut decode_out: [&mut [f32]; N] = std::array::from_fn(|_| Default::default());
    let parts = prefill_out.iter_mut().zip(&mut decode_out);
    for ((out, weight), (of_prefill, of_decode)) in outputs.into_iter().zip(&weights).zip(parts) {
        out.resize(tokens * weight.matrix.rows(), 0.0);
        (*of_prefill, *of_decode) = out.split_at_mut(prefill * weight.matrix.rows());
    }
    for (kind, x, out) in
        [(RowKind::Prefill, prefill_x, prefill_out), (RowKind::Decode, decode_x, decode_out)]
    {
        if !x.is_empty() {
            apply_rows(threads, scratch, weights, (kind, x), out);
        }
    }
}

/// [`apply_packed`] for rows of one role.
fn apply_rows<const N: usize>(
    threads: Threads<'_>,
    scratch: &mut LinearScratch,
    weights: [LinearWeight<'_>; N],
    (kind, x): (RowKind, &[f32]),
    outputs: [&mut [f32]; N],
) {
    let (tokens, q8) = (x.len() / weights[0].matrix.cols(), scratch.q8);
    let kernels = weights.map(|weight| {
        weight.matrix.gemm_q8().filter(|kernel| q8 && tokens >= kernel.min_batch(threads.isa))
    });
    let uses_gemv = |weight: &LinearWeight<'_>| {
        kind == RowKind::Decode || q8 && weight.matrix.gemm_q8().is_some()
    };
    let alike = |w: &LinearWeight<'_>| shares_activations(weights[0].matrix, w.matrix, true);
    if let Some(kernels) = all(kernels)
        && weights.iter().all(alike)
    {
        quantize(threads, kernels[0], x, &mut scratch.batch);
        return batch_q8(threads, &scratch.batch, &kernels, outputs);
    }
    if kernels.iter().all(Option::is_none) && weights.iter().all(uses_gemv) {
        return small_batches(threads, scratch, &weights, x, outputs);
    }
    // The matrix for which the activations in `scratch.batch` were quantized.
    let mut last: Option<&dyn PackedMatrix> = None;
    for ((weight, kernel), out) in weights.into_iter().zip(kernels).zip(outputs) {
        if let Some(kernel) = kernel {
            if !last.is_some_and(|last| shares_activations(last, weight.matrix, true)) {
                quantize(threads, kernel, x, &mut scratch.batch);
                last = Some(weight.matrix);
            }
            batch_q8(threads, &scratch.batch, &[kernel], [out]);
        } else if uses_gemv(&weight) {
            small_batches(threads, scratch, &[weight], x, [out]);
        } else {
            batch_exact(threads, scratch, weight.matrix, x, out);
        }
    }
}

/// GEMV for batches of the largest size that pays off.
fn small_batches<const N: usize>(
    threads: Threads<'_>,
    scratch: &mut LinearScratch,
    weights: &[LinearWeight<'_>; N],
    x: &[f32],
    outputs: [&mut [f32]; N],
) {
    let mut rest = outputs;
    for x in x.chunks(GEMV_MAX_BATCH * weights[0].matrix.cols()) {
        let tokens = x.len() / weights[0].matrix.cols();
        let mut parts: [&mut [f32]; N] = std::array::from_fn(|_| Default::default());
        for ((part, rest), weight) in parts.iter_mut().zip(&mut rest).zip(weights) {
            (*part, *rest) = std::mem::take(rest).split_at_mut(tokens * weight.matrix.rows());
        }
        small_batch(threads, scratch, weights, x, parts);
    }
}

/// All items, if none is missing.
fn all<T: Copy, const N: usize>(items: [Option<T>; N]) -> Option<[T; N]> {
    let first = items.first().copied().flatten()?;
    items.iter().all(Option::is_some).then(|| items.map(|item| item.unwrap_or(first)))
}

/// GEMV for each token. All tokens use a piece of the weights while it is in cache.
fn small_batch<const N: usize>(
    threads: Threads<'_>,
    scratch: &mut LinearScratch,
    weights: &[LinearWeight<'_>; N],
    x: &[f32],
    outputs: [&mut [f32]; N],
) {
    let LinearScratch { q8, inputs, by_rows, .. } = scratch;
    let cols = weights[0].matrix.cols();
    let tokens = x.len() / cols;
    if inputs.len() < N * tokens {
        inputs.resize_with(N * tokens, GemvScratch::default);
    }
    let inputs = &mut inputs[..N * tokens];
    let source = prepare(threads, weights, x, *q8, inputs);
    let inputs = |i: usize| &inputs[source[i] * tokens..][..tokens];

    let total: usize = weights.iter().map(|w| w.matrix.rows()).sum();
    let bytes = weights.iter().map(|w| w.bytes).sum::<usize>();
    let task = if tokens > 4 { 4 * GEMV_TASK_BYTES } else { GEMV_TASK_BYTES };
    let chunk = (task * total / bytes.max(1)).next_multiple_of(2 * ROW_TILE);
    let chunk = chunk.clamp(2 * ROW_TILE, 32 * ROW_TILE);
    let (isa, pool) = (threads.isa, threads.pool.or_serial(total * cols >= SERIAL_WORK));
    if tokens == 1 {
        pool.run_parts(outputs, chunk, |i, first, y| {
            gemv(isa, weights[i].matrix, inputs(i)[0].input(), first, y);
        });
        return;
    }
    // Several tokens: the outputs of a piece are contiguous and are reordered afterwards.
    by_rows.resize(total * tokens, 0.0);
    let mut rest = &mut by_rows[..];
    let parts: [&mut [f32]; N] = std::array::from_fn(|i| {
        let count = weights[i].matrix.rows() * tokens;
        let (part, more) = std::mem::take(&mut rest).split_at_mut(count);
        rest = more;
        part
    });
    pool.run_parts(parts, chunk * tokens, |i, first, y| {
        let inputs = inputs(i);
        let inputs: [GemvInput<'_>; GEMV_MAX_BATCH] =
            std::array::from_fn(|t| inputs[t.min(tokens - 1)].input());
        gemv_batch(isa, weights[i].matrix, &inputs[..tokens], first / tokens, y);
    });
    let mut done = &by_rows[..];
    for (weight, out) in weights.iter().zip(outputs) {
        let count = weight.matrix.rows() * tokens;
        spread(&done[..count], weight.matrix.rows(), chunk, out);
        done = &done[count..];
    }
}

/// Prepares the activations of each token. Matrices share prepared activations unless their column
/// factors differ. Returns for each matrix the index of the matrix whose activations it uses.
fn prepare<const N: usize>(
    threads: Threads<'_>,
    weights: &[LinearWeight<'_>; N],
    x: &[f32],
    q8: bool,
    inputs: &mut [GemvScratch],
) -> [usize; N] {
    let Threads { isa, pool } = threads;
    let cols = weights[0].matrix.cols();
    let tokens = x.len() / cols;
    let source = std::array::from_fn(|i| {
        let shares = |j: &usize| shares_activations(weights[*j].matrix, weights[i].matrix, q8);
        (0..i).find(shares).unwrap_or(i)
    });
    let prepare = |first: usize, inputs: &mut [GemvScratch]| {
        let (i, t) = (first / tokens, first % tokens);
        if source[i] == i {
            let (matrix, x) = (weights[i].matrix, &x[t * cols..(t + 1) * cols]);
            match q8 {
                true => matrix.prepare_q8(isa, x, &mut inputs[0]),
                false => matrix.prepare(isa, x, &mut inputs[0]),
            };
        }
    };
    if source == [0; N] && tokens == 1 {
        prepare(0, &mut inputs[..1]);
    } else {
        pool.run_chunks(inputs, 1, prepare);
    }
    source
}

/// Reorders [piece][token][row], with pieces of up to `chunk` rows, to [token][row].
fn spread(pieces: &[f32], rows: usize, chunk: usize, out: &mut [f32]) {
    let tokens = pieces.len() / rows.max(1);
    let mut rest = pieces;
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        for t in 0..tokens {
            let (piece, more) = rest.split_at(count);
            out[t * rows + first..][..count].copy_from_slice(piece);
            rest = more;
        }
    }
}

/// Quantizes `x` for the q8 GEMM.
fn quantize(threads: Threads<'_>, kernel: &dyn PackedGemmQ8, x: &[f32], out: &mut ActivationsQ8) {
    let Threads { isa, pool } = threads;
    let cols = kernel.cols();
    let mut chunks = out.chunks(kernel.layout(isa, x.len() / cols), x, cols);
    pool.run_chunks(&mut chunks, 1, |_, chunks| {
        chunks.iter_mut().for_each(|chunk| kernel.quantize(isa, chunk));
    });
}

/// q8 GEMM of matrices that share their quantized activations.
fn batch_q8<const N: usize>(
    threads: Threads<'_>,
    x: &ActivationsQ8,
    kernels: &[&dyn PackedGemmQ8; N],
    outputs: [&mut [f32]; N],
) {
    let Threads { isa, pool } = threads;
    // Tasks of nearly equal size, and the same number for each thread.
    let group = x.group();
    let min_tasks = (GEMM_TASKS * pool.threads()).div_ceil(x.groups());
    let task_rows = kernels.map(|kernel| {
        let tiles = kernel.rows().div_ceil(ROW_TILE);
        let most = tiles.div_ceil(GEMM_TASK_ROWS / ROW_TILE);
        let tasks = kernel.rows().div_ceil(x.task_rows()).max(min_tasks);
        tiles.div_ceil(tasks.next_multiple_of(pool.threads()).min(most)) * ROW_TILE
    });
    let mut all = outputs.into_iter().enumerate().map(|(i, out)| {
        let (rows, task) = (kernels[i].rows(), task_rows[i]);
        // By group and task: the part of each token's output. Tokens past the last get empty slices.
        let mut pieces: Vec<&mut [f32]> = Vec::new();
        for out in out.chunks_mut(group * rows) {
            let mut rest: Vec<_> = out.chunks_exact_mut(rows).map(|y| y.chunks_mut(task)).collect();
            for _ in 0..rows.div_ceil(task) {
                pieces.extend(rest.iter_mut().filter_map(Iterator::next));
                pieces.resize_with(pieces.len().next_multiple_of(group), Default::default);
            }
        }
        pieces
    });
    let mut pieces: [Vec<&mut [f32]>; N] = std::array::from_fn(|_| all.next().unwrap_or_default());
    pool.run_parts(pieces.each_mut().map(|p| &mut p[..]), group, |i, first, y| {
        let (task, tasks) = (first / group, kernels[i].rows().div_ceil(task_rows[i]));
        let first = task % tasks * task_rows[i];
        gemm_q8(isa, kernels[i], x, task / tasks, first, y);
    });
}

/// GEMM with f32 activations.
fn batch_exact(
    threads: Threads<'_>,
    scratch: &mut LinearScratch,
    matrix: &dyn PackedMatrix,
    x: &[f32],
    out: &mut [f32],
) {
    let Threads { isa, pool } = threads;
    let LinearScratch { panels, by_rows, .. } = scratch;
    panels.pack(x, matrix.cols());
    let panels = panels.all();
    let (stride, rows) = (panels.row_stride(), matrix.rows());
    by_rows.resize(rows * stride, 0.0);
    let pool = pool.or_serial(rows * x.len() >= SERIAL_WORK);
    pool.run_chunks(by_rows, GEMM_TASK_ROWS * stride, |first, y| {
        gemm(isa, matrix, panels, first / stride, y);
    });
    pool.run_chunks(out, rows, |first, out| {
        let t = first / rows;
        for (r, out) in out.iter_mut().enumerate() {
            *out = by_rows[r * stride + t];
        }
    });
}
