//! Decoder layers over whole sequences in f32 on the calling thread, for calibration and the backward
//! pass.

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
    /// Runs one decoder layer over a whole sequence and updates `hidden`, [tokens, hidden]. `observer`
    /// sees the inputs of the linear layers.
    pub fn run_layer(&self, layer: &Layer, hidden: &mut [f32], observer: &mut dyn Observer) {
        if self.run_sublayer(Sublayer::Attention, layer, hidden, observer).is_continue() {
            let _ = self.run_sublayer(Sublayer::Mlp, layer, hidden, observer);
        }
    }

    /// Like [`Engine::run_layer`], for one sublayer. Returns `Break` if `observer` does.
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

    /// `hidden += x · weightᵀ`, as in the last linear layer of a sublayer: `x` is [tokens, in],
    /// `hidden` [tokens, out].
    pub fn add_linear(&self, weight: &Weight, x: &[f32], hidden: &mut [f32]) {
        let (pool, mut out) = (self.pool.or_serial(false), Vec::new());
        apply(self.isa, pool, &mut LinearScratch::default(), [weight], x, [&mut out]);
        add(pool, hidden, &out);
    }

    /// Applies RoPE in place to the heads of `x`, [tokens, width], at the start of a sequence. With
    /// `inverse`, applies the inverse rotation, which is the transpose.
    pub fn rotate(&self, x: &mut [f32], width: usize, inverse: bool) {
        let mut angles = RopeAngles::default();
        self.rope.angles(0..x.len() / width, &mut angles);
        if inverse {
            angles.invert();
        }
        angles.rotate(self.pool.or_serial(false), x, width);
    }
}
