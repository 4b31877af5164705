//! The decoder on a GPU: the last layers of a model, the head, and with all layers the embeddings.
//!
//! The graph is that of `forward.rs`, with what lies between the products inside them: norm and SiLU at
//! their inputs, the residual sums at their outputs. Five launches per layer. A single token is recorded
//! once as a CUDA graph and run from then on.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use stb_kernels::cuda::{
    self, Attend, Attention, Buffer, Device, Graph, Input, KvCache, MatVec, Matrix, Numbers, Slots,
};

use crate::error::{Error, Result};
use crate::model::{Layer, Model};
use crate::weights::Weight;

/// Tokens that a step computes at most: what the matrix-vector kernels are for. A product for many
/// tokens would go into `Products`, which all of them pass.
const BATCH: usize = 16;
/// Memory beside the weights that a model needs at least: activations, tables, the first keys and values.
const SPARE_BYTES: u64 = 64 << 20;

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
#[derive(Debug)]
struct DeviceLayer {
    attention_norm: Buffer<f32>,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    o: Matrix,
    mlp_norm: Buffer<f32>,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

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
    attention: Attention,
    numbers: Numbers,
    eps: f32,
    /// Steps run one after another.
    work: Mutex<Work>,
}

/// Reusable memory of steps, all [tokens, width].
#[derive(Debug)]
struct Work {
    matvec: MatVec,
    attend: Attend,
    slots: Slots,
    ids: Buffer<u32>,
    hidden: Buffer<f32>,
    q: Buffer<f32>,
    k: Buffer<f32>,
    v: Buffer<f32>,
    mixed: Buffer<f32>,
    gate: Buffer<f32>,
    up: Buffer<f32>,
    last: Buffer<f32>,
    logits: Buffer<f32>,
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
        let vector = |values: &[f32]| device.upload("a norm", values).map_err(Error::from);
        let layer = |layer: &Layer| -> Result<DeviceLayer> {
            Ok(DeviceLayer {
                attention_norm: vector(&layer.attention_norm)?,
                q: upload(&layer.q)?,
                k: upload(&layer.k)?,
                v: upload(&layer.v)?,
                o: upload(&layer.o)?,
                mlp_norm: vector(&layer.mlp_norm)?,
                gate: upload(&layer.gate)?,
                up: upload(&layer.up)?,
                down: upload(&layer.down)?,
            })
        };
        let loaded = model.layers[first..].iter().map(layer).collect::<Result<Vec<_>>>()?;
        let is_tied = model.head.is_none();
        let attention = model.device_attention(all - first);
        Ok(Self {
            layers: loaded,
            norm: vector(&model.norm)?,
            embeddings: (first == 0 || is_tied).then(|| upload(&model.embeddings)).transpose()?,
            head: model.head.as_ref().map(upload).transpose()?,
            attention,
            numbers: if model.exact { Numbers::Exact } else { Numbers::Rounded },
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
        let (width, vocabulary) = (self.norm.len(), self.head().rows());
        let mut logits = Vec::new();
        for first in (0..tokens.len()).step_by(BATCH) {
            let count = BATCH.min(tokens.len() - first);
            caches.place(&mut work.slots, &self.device, self.attention, first, count)?;
            match hidden {
                Some(hidden) => {
                    work.hidden.write(&hidden[first * width..(first + count) * width])?
                }
                None => work.ids.write(&tokens[first..first + count])?,
            }
            let is_end = first + count == tokens.len();
            let wanted = match which {
                Logits::All => count,
                Logits::Last => usize::from(is_end),
            };
            if count == 1 && wanted == 1 {
                self.single(work)?;
            } else {
                self.queue(work, count, work.slots.visible(), wanted)?;
            }
            if wanted > 0 {
                logits.resize(wanted * vocabulary, 0.0);
                work.logits.read(&mut logits)?;
                sink(first + count - wanted, &logits);
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
                    self.queue(work, 1, visible, 1).map_err(|e| match e {
                        Error::Device { error } => error,
                        // Nothing else can fail in a step.
                        other => cuda::Error::Unsupported { why: other.to_string() },
                    })
                })?;
                graph.run()?;
                work.graphs.insert(visible, Some(graph));
            }
            None => {
                self.queue(work, 1, visible, 1)?;
                work.graphs.insert(visible, None);
            }
        }
        Ok(())
    }

    /// Queues a step of `n` tokens that see up to `visible`, with the logits of the last `wanted`.
    fn queue(&self, work: &mut Work, n: usize, visible: usize, wanted: usize) -> Result<()> {
        let Work {
            matvec, attend, slots, ids, hidden, q, k, v, mixed, gate, up, last, logits, ..
        } = work;
        let eps = self.eps;
        if self.first == 0
            && let Some(embeddings) = &self.embeddings
        {
            matvec.queue_rows(embeddings, ids, n, hidden)?;
        }
        let mut products = Products { matvec, numbers: self.numbers, tokens: n };
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = Input::Norm { x: &*hidden, weight: &layer.attention_norm, eps };
            products.queue(&[&layer.q, &layer.k, &layer.v], normed, &mut [q, k, v], false)?;
            attend.queue(slots, i, visible, q, k, v, mixed)?;
            products.queue(&[&layer.o], Input::Plain(mixed), &mut [hidden], true)?;
            let normed = Input::Norm { x: &*hidden, weight: &layer.mlp_norm, eps };
            products.queue(&[&layer.gate, &layer.up], normed, &mut [gate, up], false)?;
            products.queue(&[&layer.down], Input::Silu { gate, up }, &mut [hidden], true)?;
        }
        if wanted == 0 {
            return Ok(());
        }
        let source = if wanted == n {
            hidden
        } else {
            let width = self.norm.len();
            last.copy_part(0, hidden, (n - wanted) * width, wanted * width)?;
            last
        };
        let normed = Input::Norm { x: &*source, weight: &self.norm, eps };
        products.tokens = wanted;
        products.queue(&[self.head()], normed, &mut [logits], false)
    }

    fn head(&self) -> &Matrix {
        self.head.as_ref().or(self.embeddings.as_ref()).expect("a tied head is loaded")
    }
}

/// Products of a step.
struct Products<'a> {
    matvec: &'a mut MatVec,
    numbers: Numbers,
    tokens: usize,
}

impl Products<'_> {
    /// `out[i]` (+)= `input` · `matrices[i]`ᵀ.
    fn queue(
        &mut self,
        matrices: &[&Matrix],
        input: Input<&Buffer<f32>>,
        out: &mut [&mut Buffer<f32>],
        add: bool,
    ) -> Result<()> {
        Ok(self.matvec.queue(matrices, input, self.numbers, out, add, self.tokens)?)
    }
}

impl Work {
    fn new(device: &Device, model: &Model, attention: Attention) -> Result<Self> {
        let make = |width: usize| device.zeros("activations", BATCH * width);
        let intermediate = model.layers.first().map_or(0, |layer| layer.gate.rows());
        let (hidden, heads) = (model.norm.len(), attention.heads * attention.width);
        let kv = attention.kv_heads * attention.width;
        Ok(Self {
            matvec: MatVec::new(device)?,
            attend: Attend::new(device, attention, &model.frequencies)?,
            slots: Slots::new(device, BATCH)?,
            ids: device.zeros("tokens", BATCH)?,
            hidden: make(hidden)?,
            q: make(heads)?,
            k: make(kv)?,
            v: make(kv)?,
            mixed: make(heads)?,
            gate: make(intermediate)?,
            up: make(intermediate)?,
            last: make(hidden)?,
            logits: make(model.head().rows())?,
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
        slots: &mut Slots,
        device: &Device,
        attention: Attention,
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
