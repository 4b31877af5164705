//! Matrix × matrix: weights are unpacked into cache a block at a time and multiplied with panels of
//! activations. Each output is one chain of fused additions over the columns, whatever the
//! blocking, so results do not depend on batch, threads or instruction set.

use std::cell::RefCell;

use stb_format::encoding::MatrixView;

use super::{Bytes, Simd, nm, rows};
use crate::isa::{Isa, Task};

/// Tokens per panel: a vector. Panels are read from end to end, whole cache lines at a time.
const PANEL: usize = 16;
/// Tokens are padded to a multiple of this: the most panels of a micro-kernel.
const TOKENS: usize = 2 * PANEL;
/// Columns unpacked at a time; a multiple of 128.
const DEPTH: usize = 256;
/// Rows unpacked at a time.
const ROWS: usize = 64;

/// Activations of several tokens, transposed into panels of 16 tokens: for each panel, for each
/// column, the tokens.
#[derive(Default, Debug)]
pub struct Panels {
    data: Vec<f32>,
    tokens: usize,
    cols: usize,
}

/// Some of the tokens and columns of [`Panels`].
#[derive(Clone, Copy, Debug)]
pub struct PanelsRef<'a> {
    data: &'a [f32],
    tokens: usize,
    cols: usize,
    /// Floats from one panel to the next.
    stride: usize,
}

impl Panels {
    /// Repacks `x` ([tokens, cols], row-major), replacing earlier content. The same panels serve
    /// all matrices with these activations.
    ///
    /// # Panics
    /// If `x` is not a whole number of rows.
    pub fn pack(&mut self, x: &[f32], cols: usize) {
        assert!(cols != 0 && x.len().is_multiple_of(cols), "whole rows of activations");
        self.pack_strided(x, x.len() / cols, cols, cols);
    }

    /// Repacks `tokens` rows of `cols` activations that start `stride` floats apart.
    ///
    /// # Panics
    /// If `x` is too short.
    pub fn pack_strided(&mut self, x: &[f32], tokens: usize, cols: usize, stride: usize) {
        self.reset(tokens, cols);
        for (p, panel) in self.data.chunks_exact_mut(cols * PANEL).enumerate() {
            for t in 0..PANEL.min(tokens.saturating_sub(p * PANEL)) {
                let start = (p * PANEL + t) * stride;
                for (c, x) in x[start..start + cols].iter().enumerate() {
                    panel[c * PANEL + t] = *x;
                }
            }
        }
    }

    /// Packs the transpose: the activation of token t in column c is `x[c·stride + t]`.
    ///
    /// # Panics
    /// If `x` is too short.
    pub fn pack_transposed(&mut self, x: &[f32], tokens: usize, cols: usize, stride: usize) {
        self.reset(tokens, cols);
        for (p, panel) in self.data.chunks_exact_mut(cols * PANEL).enumerate() {
            let count = PANEL.min(tokens.saturating_sub(p * PANEL));
            if count == 0 {
                break;
            }
            for (c, line) in panel.chunks_exact_mut(PANEL).enumerate() {
                let start = c * stride + p * PANEL;
                line[..count].copy_from_slice(&x[start..start + count]);
            }
        }
    }

    fn reset(&mut self, tokens: usize, cols: usize) {
        self.tokens = tokens;
        self.cols = cols;
        self.data.resize(tokens.next_multiple_of(TOKENS) * cols, 0.0);
        self.data[tokens / PANEL * PANEL * cols..].fill(0.0);
    }

    /// All tokens and columns.
    #[must_use]
    pub fn all(&self) -> PanelsRef<'_> {
        self.first(self.tokens, self.cols)
    }

    /// The first `tokens` tokens and `cols` columns.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn first(&self, tokens: usize, cols: usize) -> PanelsRef<'_> {
        assert!(tokens <= self.tokens && cols <= self.cols, "a part of what is packed");
        let stride = self.cols * PANEL;
        let panels = tokens.next_multiple_of(TOKENS) / PANEL;
        PanelsRef { data: &self.data[..panels * stride], tokens, cols, stride }
    }
}

impl PanelsRef<'_> {
    /// Tokens packed.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Floats that the output of one row takes: tokens rounded up to what a micro-kernel computes.
    #[must_use]
    pub fn row_stride(&self) -> usize {
        self.tokens.next_multiple_of(TOKENS)
    }
}

/// `y[r, t] = Σ_c w[first + r, c] · x[t, c]`: output rows of [`PanelsRef::row_stride`] floats, of
/// which the first `tokens` count.
///
/// # Panics
/// If `first` is not a multiple of [`crate::ROW_TILE`], the rows are not inside the matrix, the
/// widths differ, or `y` is not whole rows.
pub fn gemm(isa: Isa, matrix: &MatrixView<'_>, x: PanelsRef<'_>, first: usize, y: &mut [f32]) {
    assert!(first.is_multiple_of(crate::ROW_TILE), "work is split at row tiles");
    assert_eq!(x.cols, matrix.cols(), "one activation per column");
    let stride = x.row_stride();
    assert!(stride != 0 && y.len().is_multiple_of(stride), "whole rows of output");
    assert!(first + y.len() / stride <= matrix.rows(), "rows outside the matrix");
    WEIGHTS.with_borrow_mut(|weights| {
        weights.resize(ROWS * DEPTH, 0.0);
        isa.run(GemmTask { matrix, x, first, y, weights });
    });
}

thread_local! {
    /// Unpacked weights, [row][column].
    static WEIGHTS: RefCell<Vec<f32>> = RefCell::default();
}

struct GemmTask<'a> {
    matrix: &'a MatrixView<'a>,
    x: PanelsRef<'a>,
    first: usize,
    y: &'a mut [f32],
    weights: &'a mut [f32],
}

impl Task for GemmTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { matrix, x, first, y, weights } = self;
        let stride = x.row_stride();
        y.fill(0.0);
        for (i, y) in y.chunks_mut(ROWS * stride).enumerate() {
            let row = first + i * ROWS;
            for from in (0..x.cols).step_by(DEPTH) {
                let depth = DEPTH.min(x.cols - from);
                let count = y.len() / stride;
                // Unpacked rows have a width of whole steps of 128 columns.
                let width = depth.next_multiple_of(super::PAD);
                unpack(s, matrix, row, count, from, width, weights);
                for (p, panels) in x.data.chunks_exact(TOKENS / PANEL * x.stride).enumerate() {
                    let panels = std::array::from_fn(|i| {
                        let panel = &panels[i * x.stride..][from * PANEL..(from + depth) * PANEL];
                        panel.as_chunks().0
                    });
                    let out = &mut y[p * TOKENS..];
                    block(s, weights, width, count, panels, out, stride);
                }
            }
        }
    }
}

/// The columns at work of neighboring panels, [panel][column][token].
type PanelGroup<'a> = [&'a [[f32; PANEL]]; TOKENS / PANEL];

/// Rows `row..row + count` and columns `from..from + width` into `to`, row-major.
#[inline(always)]
fn unpack<S: Simd>(
    s: S,
    matrix: &MatrixView<'_>,
    row: usize,
    count: usize,
    from: usize,
    width: usize,
    to: &mut [f32],
) {
    #[inline(always)]
    fn by_row<S: Simd>(
        s: S,
        m: &impl rows::Rows,
        row: usize,
        count: usize,
        from: usize,
        width: usize,
        to: &mut [f32],
    ) {
        for r in 0..count {
            let stored = (m.cols() - from).min(width);
            rows::unpack(s, m, row + r, from, &mut to[r * width..r * width + stored]);
        }
    }
    match matrix {
        MatrixView::Nm(m) => {
            for (t, r) in (0..count).step_by(crate::ROW_TILE).enumerate() {
                let tile = row / crate::ROW_TILE + t;
                nm::unpack(s, m, tile, from, width, &mut to[r * width..]);
            }
        }
        MatrixView::Dense(m) => by_row(s, m, row, count, from, width, to),
        MatrixView::IntGroup(m) => by_row(s, m, row, count, from, width, to),
        MatrixView::Stbllm(m) => by_row(s, m, row, count, from, width, to),
    }
}

/// Adds the product of `count` unpacked rows with a group of panels to `out`.
#[inline(always)]
fn block<S: Simd>(
    s: S,
    weights: &[f32],
    width: usize,
    count: usize,
    panels: PanelGroup<'_>,
    out: &mut [f32],
    stride: usize,
) {
    // The trait's sizes as constants that the micro-kernel can be unrolled for.
    match (S::GEMM_ROWS, S::GEMM_VECTORS) {
        (8, 2) => tiled::<S, 8, 2>(s, weights, width, count, panels, out, stride),
        (6, 1) => tiled::<S, 6, 1>(s, weights, width, count, panels, out, stride),
        (4, 1) => tiled::<S, 4, 1>(s, weights, width, count, panels, out, stride),
        sizes => unreachable!("no micro-kernel of size {sizes:?}"),
    }
}

#[inline(always)]
fn tiled<S: Simd, const R: usize, const V: usize>(
    s: S,
    weights: &[f32],
    width: usize,
    count: usize,
    panels: PanelGroup<'_>,
    out: &mut [f32],
    stride: usize,
) {
    // All rows with one panel after the other: it stays in the cache nearest to the core.
    for v in (0..panels.len()).step_by(V) {
        let x: [&[[f32; PANEL]]; V] = std::array::from_fn(|i| panels[v + i]);
        let out = &mut out[v * PANEL..];
        let mut r = 0;
        while r + R <= count {
            micro::<S, R, V>(s, &weights[r * width..], width, x, &mut out[r * stride..], stride);
            r += R;
        }
        while r + 4 <= count {
            micro::<S, 4, V>(s, &weights[r * width..], width, x, &mut out[r * stride..], stride);
            r += 4;
        }
        while r < count {
            micro::<S, 1, V>(s, &weights[r * width..], width, x, &mut out[r * stride..], stride);
            r += 1;
        }
    }
}

/// The first `R` rows of `weights` × `V` panels, accumulated over their columns.
#[inline(always)]
fn micro<S: Simd, const R: usize, const V: usize>(
    s: S,
    weights: &[f32],
    width: usize,
    panels: [&[[f32; PANEL]]; V],
    out: &mut [f32],
    stride: usize,
) {
    let depth = panels[0].len();
    let panels = panels.map(|panel| &panel[..depth]);
    let weights: [&[f32]; R] = std::array::from_fn(|r| &weights[r * width..][..depth]);
    let mut acc = [[s.splat(0.0); V]; R];
    for r in 0..R {
        for v in 0..V {
            acc[r][v] = s.load(super::lanes(out, r * stride + PANEL * v));
        }
    }
    for k in 0..depth {
        let mut x = [s.splat(0.0); V];
        for (x, panel) in x.iter_mut().zip(panels) {
            *x = s.load(&panel[k]);
        }
        for r in 0..R {
            let w = s.splat(weights[r][k]);
            for v in 0..V {
                acc[r][v] = s.mul_add(w, x[v], acc[r][v]);
            }
        }
    }
    for r in 0..R {
        for v in 0..V {
            let at = r * stride + PANEL * v;
            s.store(acc[r][v], out[at..at + PANEL].first_chunk_mut().expect("a slice of 16"));
        }
    }
}
