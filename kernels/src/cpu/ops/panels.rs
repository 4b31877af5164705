//! Panels of activations for exact matrix × matrix products, and the product of a block of weights in
//! cache with them. Each output is one chain of fused additions over the columns, whatever the
//! blocking, so results do not depend on batch, threads or instruction set.

use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::arch::simd::{Simd, lanes};
use crate::isa::Isa;

/// Tokens per panel: one vector. Panels are read from start to end in whole cache lines.
const PANEL: usize = 16;
/// Tokens are padded to a multiple of this: the most panels of a micro-kernel.
const TOKENS: usize = 2 * PANEL;
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

/// Some rows and columns of a matrix as floats, row-major.
pub(crate) struct WeightBlock<'a> {
    pub weights: &'a [f32],
    /// Floats from one row to the next.
    pub stride: usize,
    pub rows: usize,
    /// The first column, and how many there are.
    pub first_col: usize,
    pub cols: usize,
}

impl PanelsRef<'_> {
    /// The number of columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Adds the product with some columns of a matrix to `y`, rows of [`PanelsRef::row_stride`] floats.
    pub(crate) fn add_product(self, isa: Isa, block: &WeightBlock<'_>, y: &mut [f32]) {
        isa.run(PanelProduct { block, x: self, y });
    }
}

struct PanelProduct<'a> {
    block: &'a WeightBlock<'a>,
    x: PanelsRef<'a>,
    y: &'a mut [f32],
}

impl Task for PanelProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { block, x, y } = self;
        let used = block.first_col * PANEL..(block.first_col + block.cols) * PANEL;
        for (p, panels) in x.data.chunks_exact(TOKENS / PANEL * x.stride).enumerate() {
            let panels = std::array::from_fn(|i| {
                let panel = &panels[i * x.stride..][used.clone()];
                panel.as_chunks().0
            });
            multiply_group(s, block, panels, &mut y[p * TOKENS..], x.row_stride());
        }
    }
}

/// Some columns of neighboring panels, [panel][column][token].
type PanelGroup<'a> = [&'a [[f32; PANEL]]; TOKENS / PANEL];

/// Adds the product of all rows of a block with a group of panels to `out`.
#[inline(always)]
fn multiply_group<S: Simd>(
    s: S,
    block: &WeightBlock<'_>,
    panels: PanelGroup<'_>,
    out: &mut [f32],
    stride: usize,
) {
    // The trait's sizes as constants that the micro-kernel can be unrolled for.
    match (S::GEMM_ROWS, S::GEMM_VECTORS) {
        (8, 2) => multiply_tiles::<S, 8, 2>(s, block, panels, out, stride),
        (6, 1) => multiply_tiles::<S, 6, 1>(s, block, panels, out, stride),
        (4, 1) => multiply_tiles::<S, 4, 1>(s, block, panels, out, stride),
        sizes => unreachable!("no micro-kernel of size {sizes:?}"),
    }
}

#[inline(always)]
fn multiply_tiles<S: Simd, const R: usize, const V: usize>(
    s: S,
    block: &WeightBlock<'_>,
    panels: PanelGroup<'_>,
    out: &mut [f32],
    stride: usize,
) {
    let WeightBlock { weights, stride: width, rows: count, .. } = *block;
    // All rows with one panel after the other: the panel stays in the L1 cache.
    for v in (0..panels.len()).step_by(V) {
        let x: [&[[f32; PANEL]]; V] = std::array::from_fn(|i| panels[v + i]);
        let out = &mut out[v * PANEL..];
        let mut r = 0;
        while r + R <= count {
            multiply_rows::<S, R, V>(
                s,
                &weights[r * width..],
                width,
                x,
                &mut out[r * stride..],
                stride,
            );
            r += R;
        }
        while r + 4 <= count {
            multiply_rows::<S, 4, V>(
                s,
                &weights[r * width..],
                width,
                x,
                &mut out[r * stride..],
                stride,
            );
            r += 4;
        }
        while r < count {
            multiply_rows::<S, 1, V>(
                s,
                &weights[r * width..],
                width,
                x,
                &mut out[r * stride..],
                stride,
            );
            r += 1;
        }
    }
}

/// Adds the product of the first `R` rows of `weights` with `V` panels to `out`.
#[inline(always)]
fn multiply_rows<S: Simd, const R: usize, const V: usize>(
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
            acc[r][v] = s.load(lanes(out, r * stride + PANEL * v));
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
