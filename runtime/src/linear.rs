//! Linear layers on one token or many, split over threads by rows.

use rayon::prelude::*;
use stb_format::encoding::MatrixView;
use stb_kernels::{Isa, Panels, Workspace, matmul, matvec};

use crate::weights::Weight;

/// Rows per task: enough work to pay for the dispatch, few enough to balance.
const TASK_ROWS: usize = 64;
/// Below this many weights, threads cost more than they save.
const SERIAL_WEIGHTS: usize = 1 << 17;

/// Reusable memory of linear layers.
#[derive(Default, Debug)]
pub struct Linears {
    /// Whether the activations of single tokens are rounded to 8 bits where there is a kernel for it.
    rounded: bool,
    works: Vec<Workspace>,
    panels: Panels,
    /// Outputs by rows, [rows, tokens padded], before they are transposed.
    by_rows: Vec<f32>,
}

impl Linears {
    /// Memory for products whose activations may be rounded, or not.
    #[must_use]
    pub fn new(rounded: bool) -> Self {
        Self { rounded, ..Self::default() }
    }
}

/// `out[i] = x · weights[i]ᵀ` for matrices that share their input: `x` is [tokens, in], each output
/// [tokens, out], resized as needed. One parallel region serves all of them.
///
/// # Panics
/// If `x` is not whole tokens of the matrices' width.
pub fn apply(
    isa: Isa,
    memory: &mut Linears,
    weights: &[&Weight],
    x: &[f32],
    outputs: &mut [&mut Vec<f32>],
) {
    assert_eq!(weights.len(), outputs.len(), "one output per matrix");
    let cols = weights[0].cols();
    assert!(weights.iter().all(|w| w.cols() == cols), "matrices of one input");
    let tokens = x.len() / cols;
    for (weight, out) in weights.iter().zip(outputs.iter_mut()) {
        out.resize(tokens * weight.rows(), 0.0);
    }
    let views: Vec<MatrixView<'_>> = weights.iter().map(|w| w.view()).collect();
    if tokens == 1 {
        one_token(isa, memory, &views, x, outputs);
    } else {
        many_tokens(isa, memory, &views, x, outputs);
    }
}

fn one_token(
    isa: Isa,
    memory: &mut Linears,
    views: &[MatrixView<'_>],
    x: &[f32],
    outputs: &mut [&mut Vec<f32>],
) {
    memory.works.resize_with(views.len(), Workspace::default);
    let rounded = memory.rounded;
    // Column factors differ from matrix to matrix, so each has its own activations.
    let works = memory.works.iter_mut().zip(views);
    let prepared: Vec<_> = works
        .map(|(work, view)| match rounded {
            true => work.prepare_rounded(isa, view, x),
            false => work.prepare(view, x),
        })
        .collect();
    let tasks: Vec<_> = outputs
        .iter_mut()
        .enumerate()
        .flat_map(|(i, out)| {
            out.chunks_mut(TASK_ROWS).enumerate().map(move |(k, y)| (i, k * TASK_ROWS, y))
        })
        .collect();
    run(views, tasks, |(i, first, y)| matvec(isa, &views[i], prepared[i], first, y));
}

fn many_tokens(
    isa: Isa,
    memory: &mut Linears,
    views: &[MatrixView<'_>],
    x: &[f32],
    outputs: &mut [&mut Vec<f32>],
) {
    let Linears { panels, by_rows, .. } = memory;
    panels.pack(x, views[0].cols());
    let panels = panels.all();
    let (tokens, stride) = (panels.tokens(), panels.row_stride());
    for (view, out) in views.iter().zip(outputs) {
        let rows = view.rows();
        by_rows.resize(rows * stride, 0.0);
        let tasks: Vec<_> = by_rows[..rows * stride]
            .chunks_mut(TASK_ROWS * stride)
            .enumerate()
            .map(|(k, y)| (k * TASK_ROWS, y))
            .collect();
        run(&[*view], tasks, |(first, y)| matmul(isa, view, panels, first, y));
        let by_rows = &*by_rows;
        let transpose = |(t, out): (usize, &mut [f32])| {
            for (r, out) in out.iter_mut().enumerate() {
                *out = by_rows[r * stride + t];
            }
        };
        if rows * tokens < SERIAL_WEIGHTS {
            out.chunks_mut(rows).enumerate().for_each(transpose);
        } else {
            out.par_chunks_mut(rows).enumerate().for_each(transpose);
        }
    }
}

/// Runs tasks on all threads if they are worth it.
fn run<T: Send>(views: &[MatrixView<'_>], tasks: Vec<T>, task: impl Fn(T) + Sync + Send) {
    let weights: usize = views.iter().map(|v| v.rows() * v.cols()).sum();
    if tasks.len() < 2 || weights < SERIAL_WEIGHTS || rayon::current_num_threads() == 1 {
        tasks.into_iter().for_each(task);
    } else {
        tasks.into_par_iter().for_each(task);
    }
}
