//! Matrix-vector products for a few quantized tokens, which share the indices extracted from codes.

use crate::cpu::ops::q8::{GemvInput, TokenQ8};

/// The most tokens that share indices: the tables of twice as many do not fit in the L1 cache.
pub(super) const SHARED_TOKENS: usize = 4;

/// Calls `shared` with up to [`SHARED_TOKENS`] quantized tokens at a time, the number of rows, and the
/// output for these tokens; if there are fewer tokens, the first one is repeated. Calls `alone` for a
/// single last token and for tokens that are not quantized.
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
