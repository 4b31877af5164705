//! The reference model of a comparison, with a cache of its logits.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::window::WindowLogits;
use crate::engine::Engine;
use crate::error::Result;
use crate::state::State;

/// A model that other models are compared with.
#[derive(Clone, Copy, Debug)]
pub struct Reference<'a> {
    /// The engine of the reference model, usually a dense checkpoint.
    pub engine: &'a Engine,
    /// Logits of the reference on earlier windows; `None` to keep none.
    pub kept: Option<&'a KeptLogits>,
}

impl<'a> Reference<'a> {
    /// A reference whose logits are not kept.
    #[must_use]
    pub fn new(engine: &'a Engine) -> Self {
        Self { engine, kept: None }
    }

    /// Starts a window of tokens.
    pub(super) fn begin(&self, window: &[u32]) -> ReferenceWindow<'a> {
        let kept = self.kept.and_then(|kept| kept.get(window));
        let fresh = kept.is_none().then(|| State::new(self.engine, window.len()));
        ReferenceWindow { reference: *self, kept, state: fresh, logits: Vec::new(), done: 0 }
    }
}

/// A cache of the logits of one model, [tokens, vocab] per window, with a limit in bytes.
#[derive(Debug)]
pub struct KeptLogits {
    max_bytes: usize,
    windows: Mutex<Windows>,
}

#[derive(Debug, Default)]
struct Windows {
    logits: HashMap<Vec<u32>, Arc<[f32]>>,
    bytes: usize,
}

impl KeptLogits {
    /// An empty cache of up to `max_bytes` bytes.
    #[must_use]
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, windows: Mutex::default() }
    }

    fn get(&self, window: &[u32]) -> Option<Arc<[f32]>> {
        let windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.logits.get(window).cloned()
    }

    fn has_room(&self, more: usize) -> bool {
        let windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.bytes + more <= self.max_bytes
    }

    fn put(&self, window: &[u32], logits: &[f32]) {
        let bytes = size_of_val(logits);
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        if windows.bytes + bytes <= self.max_bytes {
            let before = windows.logits.insert(window.to_vec(), logits.into());
            windows.bytes += bytes;
            windows.bytes -= before.map_or(0, |old| size_of_val(&*old));
        }
    }
}

/// Computes the logits of the reference for a window piece by piece.
pub(super) struct ReferenceWindow<'a> {
    reference: Reference<'a>,
    kept: Option<Arc<[f32]>>,
    state: Option<State>,
    /// Logits of the last piece, or of all pieces so far if they will be kept.
    logits: Vec<f32>,
    /// The number of tokens computed so far.
    done: usize,
}

impl WindowLogits for ReferenceWindow<'_> {
    fn next(&mut self, window: &[u32], tokens: usize) -> Result<&[f32]> {
        let Self { reference, kept, state, logits, done } = self;
        let vocab = reference.engine.model.embeddings.rows();
        let piece = *done..*done + tokens;
        *done = piece.end;
        let Some(state) = state else {
            let kept = kept.as_deref().unwrap_or_default();
            return Ok(&kept[piece.start * vocab..piece.end * vocab]);
        };
        let whole = window.len() * vocab;
        let keep = reference.kept.filter(|kept| kept.has_room(whole * size_of::<f32>()));
        if keep.is_none() {
            logits.clear();
        }
        let before = logits.len();
        reference.engine.forward_all(state, &window[piece], |_, new| {
            logits.extend_from_slice(new);
        })?;
        // The logits are incomplete if the cache was full during an earlier piece.
        if let Some(kept) = keep.filter(|_| logits.len() == whole) {
            kept.put(window, logits);
        }
        Ok(&logits[before..])
    }
}
