//! Parts that the q8 GEMM kernels of all encodings share: the description of a task, and results of tiles of 16
//! rows.

use std::cell::RefCell;

use crate::cpu::arch::simd::Simd;
use crate::cpu::ops::q8_batch::ActivationsQ8;
use crate::cpu::products::ROW_TILE;

/// Results of the rows of a tile for one token.
#[derive(Clone, Copy, Default, Debug)]
#[repr(C, align(64))]
pub(super) struct TileLanes(pub [f32; ROW_TILE]);

/// Products of some rows with the tokens of a group.
pub(super) struct GemmQ8Task<'a, 'y, M> {
    pub matrix: &'a M,
    pub x: &'a ActivationsQ8,
    pub group: usize,
    /// The first row, and the number of row tiles.
    pub first: usize,
    pub tiles: usize,
    /// [token][row].
    pub y: &'a mut [&'y mut [f32]],
    /// Sums of row tiles, [tile][token] or in another order that suits the kernel: at least tiles × tokens of a
    /// group; a kernel may enlarge it.
    pub lanes: &'a mut Vec<TileLanes>,
}

thread_local! {
    /// Reused by the tasks of a thread, so that it stays in cache.
    static LANES: RefCell<Vec<TileLanes>> = RefCell::default();
}

impl<'a, M> GemmQ8Task<'a, '_, M> {
    /// Calls `run` with the task for rows from `first`.
    pub(super) fn with(
        matrix: &'a M,
        x: &'a ActivationsQ8,
        group: usize,
        first: usize,
        y: &mut [&mut [f32]],
        run: impl FnOnce(GemmQ8Task<'_, '_, M>),
    ) {
        LANES.with_borrow_mut(|lanes| {
            let tiles = y[0].len().div_ceil(ROW_TILE);
            if lanes.len() < tiles * x.group {
                lanes.resize(tiles * x.group, TileLanes::default());
            }
            run(GemmQ8Task { matrix, x, group, first, tiles, y, lanes });
        });
    }
}

/// Copies the results of a tile, [token][row], to the tokens' rows; the last tile may have fewer.
#[inline(always)]
pub(super) fn copy_tile(lanes: &[TileLanes], tile: usize, y: &mut [&mut [f32]]) {
    for (TileLanes(lanes), y) in lanes.iter().zip(y) {
        let y = &mut y[tile * ROW_TILE..];
        match y.first_chunk_mut() {
            Some(y) => *y = *lanes,
            None => y.copy_from_slice(&lanes[..y.len()]),
        }
    }
}

/// Writes the results of a tile for one token to the rows of the token; the last tile may have fewer.
#[inline(always)]
pub(super) fn store_tile<S: Simd>(s: S, results: S::F, tile: usize, y: &mut [f32]) {
    let y = &mut y[tile * ROW_TILE..];
    match y.first_chunk_mut() {
        Some(y) => s.store(results, y),
        None => {
            let mut lanes = [0.0; ROW_TILE];
            s.store(results, &mut lanes);
            y.copy_from_slice(&lanes[..y.len()]);
        }
    }
}
