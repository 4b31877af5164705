//! The decoder on a GPU: the last layers of a model, the head, and with all layers the embeddings.
//!
//! The graph is that of `forward.rs`, with what lies between the products inside them: norm and SiLU at
//! their inputs, the residual sums at their outputs. Six launches per layer. A single token is recorded
//! once as a CUDA graph and run from then on.

mod exact;
mod layer;

use std::collections::HashMap;
use std::fmt;
use std::ops::ControlFlow;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use stb_kernels::cuda::{
    self, ActivationInput, ActivationPrecision, Attention, AttentionShape, Buffer, Device, Gemm,
    Gemv, Graph, KvCache, Matrix, SlotMapping, TopK, TopKRequest,
};

use crate::error::{Error, Result};
use crate::forward::LinearInput;
use crate::model::{Layer, Model};
use crate::weights::Weight;
pub use exact::{DeviceHalf, DeviceLayers, DeviceObserver, Half};
use layer::{AttentionHalf, AttentionWork, MlpHalf, Products};

/// Tokens that the matrix-vector kernels compute at most, and that get logits at a time.
const FEW: usize = 16;
/// Tokens of a step at most: bounds the memory for activations.
const BATCH: usize = 512;
/// Memory beside the weights that a model needs at least: activations, the first keys and values.
const SPARE_BYTES: u64 = 256 << 20;

/// Where a model computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA device if there is one that can, else the CPU.
    Auto,
    /// The CPU.
    #[default]
    Cpu,
    /// A CUDA device, or an error.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("{text} is not auto, cpu, cuda or cuda:N")),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

/// The weights of one decoder layer on the device.
type DeviceLayer = (AttentionHalf<Matrix>, MlpHalf<Matrix>);

/// The part of a model that is on a device.
#[derive(Debug)]
pub(crate) struct DeviceModel {
    device: Device,
    /// The first layer that is there.
    first: usize,
    layers: Vec<DeviceLayer>,
    norm: Buffer<f32>,
    /// The table of embeddings, if all layers are there.
    embeddings: Option<Matrix>,
    /// The head, if it is not the embeddings.
    head: Option<Matrix>,
    attention: AttentionShape,
    numbers: ActivationPrecision,
    eps: f32,
    /// Steps run one after another.
    work: Mutex<Work>,
}

/// Reusable memory of steps, all [tokens, width].
#[derive(Debug)]
struct Work {
    gemv: Gemv,
    gemm: Gemm,
    attend: Attention,
    slots: SlotMapping,
    ids: Buffer<u32>,
    hidden: Buffer<f32>,
    q: Buffer<f32>,
    k: Buffer<f32>,
    v: Buffer<f32>,
    attn_out: Buffer<f32>,
    gate: Buffer<f32>,
    up: Buffer<f32>,
    /// [FEW, hidden].
    last: Buffer<f32>,
    /// [FEW, vocabulary].
    logits: Buffer<f32>,
    candidates: TopK,
    /// Recorded steps of one token by the tokens that it may see; `None` after the first such step, which
    /// has made room for everything.
    graphs: HashMap<usize, Option<Graph>>,
}

/// Which tokens of a call have their logits computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Logits {
    Last,
    All,
}

impl DeviceModel {
    /// Copies the last `layers` decoder layers (all, if `None` or there are not so many) and the head of
    /// `model` to the device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is too little memory, with how much is needed, or an encoding or a
    /// shape has no kernel.
    pub(crate) fn load(device: &Device, model: &Model, layers: Option<usize>) -> Result<Self> {
        let all = model.layers.len();
        let first = all - layers.unwrap_or(all).min(all);
        check_memory(device, model, first)?;
        let upload = |w: &Weight| {
            Matrix::upload(device, w.encoding(), w.rows(), w.cols(), w.bytes()).map_err(Error::from)
        };
        let layer = |layer: &Layer| -> Result<DeviceLayer> {
            let attention = AttentionHalf::load(device, layer, upload)?;
            Ok((attention, MlpHalf::load(device, layer, upload)?))
        };
        let loaded = model.layers[first..].iter().map(layer).collect::<Result<Vec<_>>>()?;
        let is_tied = model.head.is_none();
        let attention = model.device_attention(all - first);
        Ok(Self {
            layers: loaded,
            norm: device.upload("a norm", &model.norm)?,
            embeddings: (first == 0 || is_tied).then(|| upload(&model.embeddings)).transpose()?,
            head: model.head.as_ref().map(upload).transpose()?,
            attention,
            numbers: if model.exact { ActivationPrecision::F32 } else { ActivationPrecision::Q8 },
            eps: model.spec.norm_eps as f32,
            work: Mutex::new(Work::new(device, model, attention)?),
            device: device.clone(),
            first,
        })
    }

    /// Layers that are not on the device: the first ones.
    pub(crate) fn host_layers(&self) -> usize {
        self.first
    }

    /// Its name, with the layers if not all are there.
    pub(crate) fn describe(&self) -> String {
        let name = &self.device.info().name;
        match self.first {
            0 => name.clone(),
            first => format!("{name}, layers from {} on", first + 1),
        }
    }

    /// Appends tokens to sequences and hands logits to `sink`, [n, vocab] with the index of the first
    /// token. `tokens` are those of a sequence one after another, or one for each of several.
    /// `hidden` is what enters the first layer on the device, [tokens, hidden], if that is not the
    /// first of all.
    pub(crate) fn run(
        &self,
        caches: &mut Caches<'_>,
        tokens: &[u32],
        hidden: Option<&[f32]>,
        which: Logits,
        mut sink: impl FnMut(usize, &[f32]),
    ) -> Result<()> {
        let work = &mut *self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let vocabulary = self.head().rows();
        let mut logits = Vec::new();
        self.steps(work, caches, tokens, hidden, which, |work, first, count| {
            logits.resize(count * vocabulary, 0.0);
            work.logits.read(&mut logits)?;
            sink(first, &logits);
            Ok(())
        })
    }

    /// Appends tokens to a sequence as [`DeviceModel::run`] does; the most likely tokens after the last one.
    pub(crate) fn best(
        &self,
        caches: &mut Caches<'_>,
        tokens: &[u32],
        hidden: Option<&[f32]>,
        wanted: &TopKRequest<'_>,
    ) -> Result<Vec<(u32, f32)>> {
        let work = &mut *self.work.lock().unwrap_or_else(PoisonError::into_inner);
        let vocabulary = self.head().rows();
        let mut best = Vec::new();
        self.steps(work, caches, tokens, hidden, Logits::Last, |work, _, _| {
            best = work.candidates.find(&work.logits, vocabulary, wanted)?;
            Ok(())
        })?;
        Ok(best)
    }

    /// The steps of [`DeviceModel::run`]; `done` is told of which tokens logits are there: the first, and how many.
    fn steps(
        &self,
        work: &mut Work,
        caches: &mut Caches<'_>,
        tokens: &[u32],
        hidden: Option<&[f32]>,
        which: Logits,
        mut done: impl FnMut(&mut Work, usize, usize) -> Result<()>,
    ) -> Result<()> {
        let width = self.norm.len();
        // Without tensor cores, whose products round to f16, there is nothing to gain from more.
        let most = if self.numbers == ActivationPrecision::F32 { FEW } else { BATCH };
        for first in (0..tokens.len()).step_by(most) {
            let count = most.min(tokens.len() - first);
            caches.place(&mut work.slots, &self.device, self.attention, first, count)?;
            match hidden {
                Some(hidden) => {
                    work.hidden.write(&hidden[first * width..(first + count) * width])?
                }
                None => work.ids.write(&tokens[first..first + count])?,
            }
            let is_end = first + count == tokens.len();
            let wanted = match which {
                Logits::All => 0..count,
                Logits::Last if is_end => count - 1..count,
                Logits::Last => count..count,
            };
            if count == 1 && wanted == (0..1) {
                self.single(work)?;
            } else {
                self.queue_layers(work, count, work.slots.visible())?;
            }
            for from in wanted.clone().step_by(FEW) {
                let some = FEW.min(wanted.end - from);
                if count > 1 || from > 0 {
                    self.queue_logits(work, from, some)?;
                }
                done(work, first + from, some)?;
            }
        }
        Ok(())
    }

    /// A step of one token: a graph, recorded at the second step with as many tokens to see (rounded up).
    fn single(&self, work: &mut Work) -> Result<()> {
        let visible = work.slots.visible().next_power_of_two().max(256);
        match work.graphs.remove(&visible) {
            Some(Some(mut graph)) => {
                graph.run()?;
                work.graphs.insert(visible, Some(graph));
            }
            Some(None) => {
                let mut graph = self.device.record(|| {
                    self.queue_single(work, visible).map_err(|e| match e {
                        Error::Device { error } => error,
                        // Nothing else can fail in a step.
                        other => cuda::Error::Unsupported { why: other.to_string() },
                    })
                })?;
                graph.run()?;
                work.graphs.insert(visible, Some(graph));
            }
            None => {
                self.queue_single(work, visible)?;
                work.graphs.insert(visible, None);
            }
        }
        Ok(())
    }

    /// Queues a step of one token with its logits.
    fn queue_single(&self, work: &mut Work, visible: usize) -> Result<()> {
        self.queue_layers(work, 1, visible)?;
        self.queue_logits(work, 0, 1)
    }

    /// Queues the layers for `n` tokens that see up to `visible`.
    fn queue_layers(&self, work: &mut Work, n: usize, visible: usize) -> Result<()> {
        let Work { gemv, gemm, attend, slots, ids, .. } = work;
        let Work { hidden, q, k, v, attn_out, gate, up, .. } = work;
        let eps = self.eps;
        if self.first == 0
            && let Some(embeddings) = &self.embeddings
        {
            gemv.queue_rows(embeddings, ids, n, hidden)?;
        }
        let mut products = Packed { gemv, gemm, numbers: self.numbers, tokens: n };
        for (layer, (attention, mlp)) in self.layers.iter().enumerate() {
            let work = AttentionWork { attend, slots, layer, visible, q, k, v, attn_out };
            let _ = attention.queue(&mut products, work, eps, hidden)?;
            let _ = mlp.queue(&mut products, [gate, up], eps, hidden)?;
        }
        Ok(())
    }

    /// Queues the logits of `n` tokens of the step from token `first` on, at most [`FEW`].
    fn queue_logits(&self, work: &mut Work, first: usize, n: usize) -> Result<()> {
        let Work { gemv, hidden, last, logits, .. } = work;
        let width = self.norm.len();
        let x = if first == 0 {
            &*hidden
        } else {
            last.copy_part(0, hidden, first * width, n * width)?;
            &*last
        };
        let normed = ActivationInput::RmsNorm { x, weight: &self.norm, eps: self.eps };
        Ok(gemv.queue(&[self.head()], normed, self.numbers, &mut [logits], false, n)?)
    }

    fn head(&self) -> &Matrix {
        self.head.as_ref().or(self.embeddings.as_ref()).expect("a tied head is loaded")
    }
}

/// Products of a step with packed matrices.
struct Packed<'a> {
    gemv: &'a mut Gemv,
    gemm: &'a mut Gemm,
    numbers: ActivationPrecision,
    tokens: usize,
}

impl Products for Packed<'_> {
    type Matrix = Matrix;

    /// For a few tokens with kernels that read the weights once, for many on tensor cores.
    fn queue(
        &mut self,
        _: LinearInput,
        matrices: &[&Matrix],
        input: ActivationInput<&Buffer<f32>>,
        out: &mut [&mut Buffer<f32>],
        add: bool,
    ) -> Result<ControlFlow<()>> {
        if self.tokens <= FEW {
            self.gemv.queue(matrices, input, self.numbers, out, add, self.tokens)?;
        } else {
            self.gemm.queue(matrices, input, out, add, self.tokens)?;
        }
        Ok(ControlFlow::Continue(()))
    }
}

impl Work {
    fn new(device: &Device, model: &Model, attention: AttentionShape) -> Result<Self> {
        let most = if model.exact { FEW } else { BATCH };
        let make = |width: usize| device.zeros("activations", most * width);
        let intermediate = model.layers.first().map_or(0, |layer| layer.gate.rows());
        let (hidden, heads) = (model.norm.len(), attention.heads * attention.width);
        let kv = attention.kv_heads * attention.width;
        Ok(Self {
            gemv: Gemv::new(device)?,
            gemm: Gemm::new(device)?,
            attend: Attention::new(device, attention, &model.frequencies)?,
            slots: SlotMapping::new(device, BATCH)?,
            ids: device.zeros("tokens", BATCH)?,
            hidden: make(hidden)?,
            q: make(heads)?,
            k: make(kv)?,
            v: make(kv)?,
            attn_out: make(heads)?,
            gate: make(intermediate)?,
            up: make(intermediate)?,
            last: device.zeros("hidden states", FEW * hidden)?,
            logits: device.zeros("logits", FEW * model.head().rows())?,
            candidates: TopK::new(device)?,
            graphs: HashMap::new(),
        })
    }
}

/// The caches of a call: those of one sequence, which gets all tokens, or of several, which get one each.
pub(crate) struct Caches<'a> {
    /// The cache, if there is one yet; tokens before the call; the most it may hold.
    pub sequences: Vec<(&'a mut Option<KvCache>, usize, usize)>,
}

impl Caches<'_> {
    /// Makes room for `count` tokens from the `first` of the call on, and puts their places into `slots`.
    fn place(
        &mut self,
        slots: &mut SlotMapping,
        device: &Device,
        attention: AttentionShape,
        first: usize,
        count: usize,
    ) -> Result<()> {
        let is_one = self.sequences.len() == 1;
        let range = if is_one { 0..1 } else { first..first + count };
        let mut places = Vec::with_capacity(count);
        for (cache, before, limit) in &mut self.sequences[range] {
            let from = *before + if is_one { first } else { 0 };
            let tokens = if is_one { count } else { 1 };
            let cache = match cache {
                Some(cache) => cache,
                None => cache.insert(KvCache::new(device, attention)?),
            };
            cache.reserve(from + tokens, *limit)?;
            let cache = &*cache;
            places.extend((from..from + tokens).map(|position| (cache, position)));
        }
        slots.set(places)?;
        Ok(())
    }
}

/// Says how much memory is needed if there is too little, and what fits.
fn check_memory(device: &Device, model: &Model, first: usize) -> Result<()> {
    let bytes = |w: &Weight| w.byte_len() as u64;
    let layer = |layer: &Layer| layer.matrices().into_iter().map(bytes).sum::<u64>();
    let tied = model.head.is_none();
    let mut ends = bytes(model.head());
    if first == 0 && !tied {
        ends += bytes(&model.embeddings);
    }
    let needed = SPARE_BYTES + ends + model.layers[first..].iter().map(layer).sum::<u64>();
    let free = device.free_memory()?;
    if needed <= free {
        return Ok(());
    }
    let mut left = free.saturating_sub(SPARE_BYTES + bytes(model.head()));
    let fits = model.layers.iter().rev().take_while(|l| {
        let size = layer(l);
        let is_room = size <= left;
        left = left.saturating_sub(size);
        is_room
    });
    let advice = match fits.count().min(model.layers.len() - 1) {
        0 => "use --device cpu".to_owned(),
        n => format!("-ngl {n} would fit"),
    };
    let what =
        format!("{} of {} layers ({advice})", model.layers.len() - first, model.layers.len());
    Err(cuda::Error::Memory { what, needed, free }.into())
}
