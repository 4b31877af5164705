//! Matrix-vector products for a few quantized tokens that share what codes are taken apart to.

use crate::cpu::ops::q8::{GemvInput, TokenQ8};

/// Up to how many tokens share that work: twice as many have tables that the first cache does not hold.
pub(super) const SHARED_TOKENS: usize = 4;

/// Calls `shared` with the rows of up to [`SHARED_TOKENS`] quantized tokens at a time, of which the
/// results of those that are missing are thrown away; `alone` for a token that has no company or is not
/// quantized.
pub(super) fn gemv_shared<'a>(
    x: &[GemvInput<'a>],
    y: &mut [f32],
    mut shared: impl FnMut([&'a TokenQ8; SHARED_TOKENS], usize, &mut [f32]),
    mut alone: impl FnMut(GemvInput<'a>, &mut [f32]),
) {
    let rows = y.len() / x.len();
    for (x, y) in x.chunks(SHARED_TOKENS).zip(y.chunks_mut(SHARED_TOKENS * rows)) {
        match x.first().and_then(|x| x.q8) {
            Some(first) if x.len() > 1 && x.iter().all(|x| x.q8.is_some()) => {
                let mut tokens = [first; SHARED_TOKENS];
                for (token, x) in tokens.iter_mut().zip(x) {
                    *token = x.q8.unwrap_or(first);
                }
                shared(tokens, rows, y);
            }
            _ => {
                for (x, y) in x.iter().zip(y.chunks_exact_mut(rows)) {
                    alone(*x, y);
                }
            }
        }
    }
}
