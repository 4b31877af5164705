//! Linear layers on one token or many, split over threads by rows.

use stb_format::encoding::MatrixView;
use stb_kernels::{
    ActivationsQ8, Isa, Panels, Pool, Prepared, ROW_TILE, Workspace, gemm, gemm_min_batch, gemm_q8,
    gemv, gemv_batch, has_gemm_q8, shares_activations,
};

use crate::weights::Weight;

/// Stored bytes per task of a product with few tokens: enough work to pay for taking the task.
const TASK_BYTES: usize = 64 << 10;
/// Rows per task of a product with many tokens.
const TASK_ROWS: usize = 64;
/// Tasks per thread of a product with many rounded tokens, at least: each computes what its rows share.
const TASKS: usize = 2;
/// At most so many tokens are multiplied with packed weights while these are in cache.
const FEW_TOKENS: usize = 48;
/// Below this many multiplications, threads cost more than they save.
const SERIAL_WORK: usize = 1 << 15;

/// Reusable memory of linear layers.
#[derive(Default, Debug)]
pub struct LinearScratch {
    /// Whether activations are rounded to 8 bits where there is a kernel for it.
    rounded: bool,
    /// Prepared activations: for each matrix, for each token.
    works: Vec<Workspace>,
    panels: Panels,
    tokens: ActivationsQ8,
    /// Outputs by rows, [rows, tokens padded], before they are transposed.
    by_rows: Vec<f32>,
}

/// Up to how many tokens packed weights are multiplied with each of them, where there are too few or no
/// kernel for many: as many as take less time than exact products with unpacked weights.
fn few(view: &MatrixView<'_>) -> usize {
    match view {
        MatrixView::IntGroup(_) => FEW_TOKENS,
        MatrixView::Stbllm(_) => 8,
        MatrixView::Nm(_) | MatrixView::Dense(_) => 16,
    }
}

impl LinearScratch {
    /// Memory for products whose activations may be rounded, or not.
    #[must_use]
    pub fn new(rounded: bool) -> Self {
        Self { rounded, ..Self::default() }
    }
}

/// `out[i] = x · weights[i]ᵀ` for matrices that share their input: `x` is [tokens, in], each output
/// [tokens, out], resized as needed. For a few tokens, one parallel region serves all of them.
///
/// # Panics
/// If `x` is not whole tokens of the matrices' width.
pub fn apply<const N: usize>(
    isa: Isa,
    pool: &Pool,
    memory: &mut LinearScratch,
    weights: [&Weight; N],
    x: &[f32],
    outputs: [&mut Vec<f32>; N],
) {
    let cols = weights[0].cols();
    assert!(weights.iter().all(|w| w.cols() == cols), "matrices of one input");
    assert!(x.len().is_multiple_of(cols), "whole tokens");
    let tokens = x.len() / cols;
    let views = weights.map(Weight::view);
    if tokens == 1 {
        let bytes = weights.iter().map(|w| w.byte_len()).sum();
        return small_batch(isa, pool, memory, &views, bytes, x, outputs);
    }
    let mut outputs = outputs;
    for (view, out) in views.iter().zip(&mut outputs) {
        out.resize(tokens * view.rows(), 0.0);
    }
    let may_round = memory.rounded;
    let rounded = |view| may_round && has_gemm_q8(view) && tokens >= gemm_min_batch(isa, view);
    let alike = |view| rounded(view) && shares_activations(&views[0], view, true);
    if views.iter().all(alike) {
        round(isa, pool, &mut memory.tokens, &views[0], x);
        return many_rounded(isa, pool, &memory.tokens, &views, outputs);
    }
    // The matrix that activations were rounded for last.
    let mut last: Option<&MatrixView<'_>> = None;
    for ((view, weight), out) in views.iter().zip(weights).zip(outputs) {
        if rounded(view) {
            if !last.is_some_and(|last| shares_activations(last, view, true)) {
                round(isa, pool, &mut memory.tokens, view, x);
                last = Some(view);
            }
            many_rounded(isa, pool, &memory.tokens, &[*view], [out]);
        } else if may_round && tokens <= few(view) {
            small_batch(isa, pool, memory, &[*view], weight.byte_len(), x, [out]);
        } else {
            many_exact(isa, pool, memory, view, x, out);
        }
    }
}

/// A matrix-vector product for each token, all on one piece of the weights while it is in cache.
/// `bytes` is what the matrices take.
fn small_batch<const N: usize>(
    isa: Isa,
    pool: &Pool,
    memory: &mut LinearScratch,
    views: &[MatrixView<'_>; N],
    bytes: usize,
    x: &[f32],
    outputs: [&mut Vec<f32>; N],
) {
    let LinearScratch { rounded, works, by_rows, .. } = memory;
    let rounded = *rounded;
    // Column factors differ from matrix to matrix; without them matrices share their activations.
    let source: [usize; N] = std::array::from_fn(|i| {
        let shared = (0..i).find(|j| shares_activations(&views[*j], &views[i], rounded));
        shared.unwrap_or(i)
    });
    let cols = views[0].cols();
    let tokens = x.len() / cols;
    if works.len() < N * tokens {
        works.resize_with(N * tokens, Workspace::default);
    }
    let prepare = |first: usize, works: &mut [Workspace]| {
        let (i, t) = (first / tokens, first % tokens);
        if source[i] == i {
            let (view, x) = (&views[i], &x[t * cols..(t + 1) * cols]);
            match rounded {
                true => works[0].prepare_q8(isa, view, x),
                false => works[0].prepare(view, x),
            };
        }
    };
    let works = &mut works[..N * tokens];
    if source == [0; N] && tokens == 1 {
        prepare(0, &mut works[..1]);
    } else {
        pool.run_chunks(works, 1, prepare);
    }
    let works = &*works;

    // With several tokens the results of a piece lie together, and are spread afterwards.
    let total: usize = views.iter().map(MatrixView::rows).sum();
    let task = if tokens > 4 { 4 * TASK_BYTES } else { TASK_BYTES };
    let chunk = (task * total / bytes.max(1)).next_multiple_of(2 * ROW_TILE);
    let chunk = chunk.clamp(2 * ROW_TILE, 32 * ROW_TILE);
    let pool = pool.or_serial(total * cols >= SERIAL_WORK);
    if tokens == 1 {
        let mut rows = views.iter().map(MatrixView::rows);
        let parts = outputs.map(|out| {
            out.resize(rows.next().unwrap_or(0), 0.0);
            &mut out[..]
        });
        pool.run_parts(parts, chunk, |i, first, y| {
            gemv(isa, &views[i], works[source[i]].prepared(), first, y);
        });
        return;
    }
    by_rows.resize(total * tokens, 0.0);
    let mut rest = &mut by_rows[..];
    let parts: [&mut [f32]; N] = std::array::from_fn(|i| {
        let view = &views[i];
        let (part, more) = std::mem::take(&mut rest).split_at_mut(view.rows() * tokens);
        rest = more;
        part
    });
    pool.run_parts(parts, chunk * tokens, |i, first, y| {
        let works = &works[source[i] * tokens..][..tokens];
        let prepared: [Prepared<'_>; FEW_TOKENS] =
            std::array::from_fn(|t| works[t.min(tokens - 1)].prepared());
        gemv_batch(isa, &views[i], &prepared[..tokens], first / tokens, y);
    });
    let mut done = &by_rows[..];
    for (view, out) in views.iter().zip(outputs) {
        let rows = view.rows();
        out.resize(rows * tokens, 0.0);
        for first in (0..rows).step_by(chunk) {
            let count = chunk.min(rows - first);
            for t in 0..tokens {
                let (piece, more) = done.split_at(count);
                out[t * rows + first..][..count].copy_from_slice(piece);
                done = more;
            }
        }
    }
}

fn round(isa: Isa, pool: &Pool, tokens: &mut ActivationsQ8, view: &MatrixView<'_>, x: &[f32]) {
    let mut parts = tokens.parts(isa, view, x);
    pool.run_chunks(&mut parts, 1, |_, parts| parts.iter_mut().for_each(|p| p.round(isa, view)));
}

/// Products with activations that all matrices share, already rounded.
fn many_rounded<const N: usize>(
    isa: Isa,
    pool: &Pool,
    tokens: &ActivationsQ8,
    views: &[MatrixView<'_>; N],
    outputs: [&mut Vec<f32>; N],
) {
    // Tasks of nearly one size, as many for each thread.
    let group = tokens.group();
    let wanted = (TASKS * pool.threads()).div_ceil(tokens.groups());
    let task_rows = views.each_ref().map(|view| {
        let tiles = view.rows().div_ceil(ROW_TILE);
        let most = tiles.div_ceil(TASK_ROWS / ROW_TILE);
        let tasks = view.rows().div_ceil(tokens.task_rows()).max(wanted);
        tiles.div_ceil(tasks.next_multiple_of(pool.threads()).min(most)) * ROW_TILE
    });
    let mut all = outputs.into_iter().enumerate().map(|(i, out)| {
        let (rows, task) = (views[i].rows(), task_rows[i]);
        // By group, by task: what it gives of each token; tokens past the last have nothing.
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
        let (task, tasks) = (first / group, views[i].rows().div_ceil(task_rows[i]));
        let first = task % tasks * task_rows[i];
        gemm_q8(isa, &views[i], tokens, task / tasks, first, y);
    });
}

fn many_exact(
    isa: Isa,
    pool: &Pool,
    memory: &mut LinearScratch,
    view: &MatrixView<'_>,
    x: &[f32],
    out: &mut [f32],
) {
    let LinearScratch { panels, by_rows, .. } = memory;
    panels.pack(x, view.cols());
    let panels = panels.all();
    let (stride, rows) = (panels.row_stride(), view.rows());
    by_rows.resize(rows * stride, 0.0);
    let pool = pool.or_serial(rows * x.len() >= SERIAL_WORK);
    pool.run_chunks(by_rows, TASK_ROWS * stride, |first, y| {
        gemm(isa, view, panels, first / stride, y);
    });
    pool.run_chunks(out, rows, |first, out| {
        let t = first / rows;
        for (r, out) in out.iter_mut().enumerate() {
            *out = by_rows[r * stride + t];
        }
    });
}
