//! Decoder layers over whole sequences in f32 on the calling thread, for calibration and the backward
//! pass.

use std::ops::ControlFlow;

use stb_format::arch::Block;
use stb_kernels::kv::KvKind;

use crate::attention::{AttendLayer, AttentionScratch, QkvRows, attend};
use crate::block::{BlockInput, BlockScratch, finish_sublayer, run_sublayer};
use crate::cpu::{CpuOps, CpuScratch};
use crate::engine::Engine;
use crate::kv_cache::{Heads, KvCache, KvShape};
use crate::layer::Layer;
use crate::linear::{RowKind, Threads};
use crate::observer::Observer;
use crate::pass::{OutputKind, Segment};
use crate::rope::RopeAngles;
use crate::sublayer::Sublayer;

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
        let tokens = hidden.len() / self.model.hidden_size();
        let (mut angles, mut attention) = (RopeAngles::default(), AttentionScratch::default());
        let shape = KvShape { kind: KvKind::F32, heads: Heads::of(&self.model.spec), layers: 1 };
        let mut cache = KvCache::new(shape, tokens);
        if sublayer == Sublayer::Attention {
            self.sequence_angles(tokens, &mut angles);
            cache.reserve(tokens);
        }
        let mut sequence = [Segment {
            id: 0,
            cache: &mut cache,
            count: tokens,
            tokens: &[],
            kind: RowKind::Prefill,
            output: OutputKind::CacheOnly,
        }];
        let threads = Threads { isa: self.isa, pool };
        let mut ops = CpuOps {
            isa: self.isa,
            pool,
            norm: self.model.spec.norm(),
            activation: self.model.spec.activation,
            head_dim: self.model.spec.head_dim as usize,
            angles: &angles,
            attend: |x: QkvRows<'_>, settings| {
                let at = AttendLayer { threads, settings, layer: 0 };
                attend(at, &mut sequence, &mut attention, x);
            },
            scratch: &mut CpuScratch::default(),
            observer,
            prefill: several(tokens),
        };
        let Ok(flow) =
            run_sublayer(&mut ops, sublayer, layer, &mut BlockScratch::default(), hidden);
        flow
    }

    /// The last linear layer of `sublayer` and what follows it: `x`, [tokens, in], is its input, `hidden`,
    /// [tokens, hidden], the residual stream, which is updated.
    pub fn finish_sublayer(
        &self,
        sublayer: Sublayer,
        layer: &Layer,
        x: &Vec<f32>,
        hidden: &mut [f32],
    ) {
        let pool = self.pool.or_serial(false);
        let mut ops = CpuOps {
            isa: self.isa,
            pool,
            norm: self.model.spec.norm(),
            activation: self.model.spec.activation,
            head_dim: self.model.spec.head_dim as usize,
            angles: &RopeAngles::default(),
            attend: |_: QkvRows<'_>, _| {},
            scratch: &mut CpuScratch::default(),
            observer: &mut (),
            prefill: several(hidden.len() / self.model.hidden_size()),
        };
        // The CPU cannot fail, and no observer stops the layer.
        let Ok(_) = finish_sublayer(&mut ops, sublayer, layer, BlockInput::Plain(x), hidden);
    }

    /// Applies the RoPE of `layer` in place to the heads of `x`, [tokens, width], at the start of a sequence.
    /// With `transposed`, applies the transposed rotation: the inverse, unless the scaling of RoPE scales the
    /// rotated values.
    pub fn rotate(&self, layer: &Block, x: &mut [f32], width: usize, transposed: bool) {
        let Some(table) = layer.attention.rope else { return };
        let mut angles = RopeAngles::default();
        self.sequence_angles(x.len() / width, &mut angles);
        if transposed {
            angles.transpose();
        }
        angles.table(table).rotate(self.pool.or_serial(false), x, width);
    }

    /// The angles of a whole sequence of `tokens` tokens.
    fn sequence_angles(&self, tokens: usize, angles: &mut RopeAngles) {
        self.rope.angles((0..tokens).map(|position| (position, tokens)), angles);
    }
}

/// The number of prefill rows among `tokens` rows: a single one is a decode row.
fn several(tokens: usize) -> usize {
    if tokens > 1 { tokens } else { 0 }
}
