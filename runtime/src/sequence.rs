//! Decoder layers over whole sequences, exactly and on the calling thread: what calibration and the
//! backward pass need.

use std::ops::ControlFlow;

use stb_kernels::kv::KvKind;

use crate::block::{BlockScratch, run_sublayer};
use crate::cpu::{CpuOps, CpuScratch, Observer, add};
use crate::engine::Engine;
use crate::kv_cache::{AttentionScratch, Heads, KvCache, QkvRows};
use crate::layer::Layer;
use crate::linear::{LinearScratch, apply};
use crate::rope::RopeAngles;
use crate::sublayer::Sublayer;
use crate::weights::Weight;

impl Engine {
    /// Runs one decoder layer over a whole sequence from its start: `hidden` is [tokens, hidden],
    /// changed in place. `observer` sees the inputs of the linear layers.
    pub fn run_layer(&self, layer: &Layer, hidden: &mut [f32], observer: &mut dyn Observer) {
        if self.run_sublayer(Sublayer::Attention, layer, hidden, observer).is_continue() {
            let _ = self.run_sublayer(Sublayer::Mlp, layer, hidden, observer);
        }
    }

    /// One sublayer of [`Engine::run_layer`].
    pub fn run_sublayer(
        &self,
        sublayer: Sublayer,
        layer: &Layer,
        hidden: &mut [f32],
        observer: &mut dyn Observer,
    ) -> ControlFlow<()> {
        let pool = self.pool.or_serial(false);
        let mut angles = RopeAngles::default();
        if sublayer == Sublayer::Attention {
            self.rope.angles(0..hidden.len() / self.model.hidden_size(), &mut angles);
        }
        let mut cache = KvCache::new(KvKind::F32, Heads::of(&self.model.spec));
        let mut attention = AttentionScratch::default();
        let mut ops = CpuOps {
            isa: self.isa,
            pool,
            eps: self.model.spec.norm_eps as f32,
            angles: &angles,
            attend: |x: QkvRows<'_>| cache.attend(self.isa, pool, &mut attention, x),
            scratch: &mut CpuScratch::default(),
            observer,
        };
        let Ok(flow) =
            run_sublayer(&mut ops, sublayer, layer, &mut BlockScratch::default(), hidden);
        flow
    }

    /// Adds `x` [tokens, in] · `weight`ᵀ to `hidden` [tokens, out], as the last linear layer of a
    /// sublayer does.
    pub fn add_linear(&self, weight: &Weight, x: &[f32], hidden: &mut [f32]) {
        let (pool, mut out) = (self.pool.or_serial(false), Vec::new());
        apply(self.isa, pool, &mut LinearScratch::default(), [weight], x, [&mut out]);
        add(pool, hidden, &out);
    }

    /// Rotates the heads of `x`, [tokens, width] from the start of a sequence, as those of queries
    /// and keys, or, with `back`, the other way: the transpose.
    pub fn rotate(&self, x: &mut [f32], width: usize, back: bool) {
        let mut angles = RopeAngles::default();
        self.rope.angles(0..x.len() / width, &mut angles);
        if back {
            angles.invert();
        }
        angles.rotate(self.pool.or_serial(false), x, width);
    }
}
