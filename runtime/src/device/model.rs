//! [`DeviceModel`]: the part of a model on a device.

use std::sync::{Mutex, PoisonError};

use stb_kernels::cuda::{self, ActivationPrecision, AttentionShape, Buffer, Device, Matrix};
use stb_kernels::kv::KvKind;

use super::caches::DeviceCaches;
use super::common::{attention_shape, require_supported, upload_norm};
use super::scratch::StepScratch;
use crate::error::{Error, Result};
use crate::layer::Layer;
use crate::model::Model;
use crate::pass::{Output, OutputKind, OutputSink, Pass};
use crate::weights::Weight;

/// Memory that a model needs in addition to its weights: activations and the first blocks of the KV
/// cache.
const SPARE_BYTES: u64 = 256 << 20;

/// Options of [`DeviceModel::load`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeviceOptions {
    /// Decoder layers on the device, counted from the last; `None` for all.
    pub layers: Option<usize>,
    /// The type of the KV cache.
    pub kv: KvKind,
    /// Whether activations stay f32.
    pub exact: bool,
}

/// The last layers and the lm_head of a model on a device.
#[derive(Debug)]
pub(crate) struct DeviceModel {
    pub(super) device: Device,
    /// The first layer on the device.
    pub(super) first: usize,
    pub(super) layers: Vec<Layer<Matrix, Buffer<f32>>>,
    pub(super) norm: Buffer<f32>,
    /// The embeddings, if all layers are on the device or the lm_head is tied to them.
    pub(super) embeddings: Option<Matrix>,
    /// The lm_head, unless it is tied to the embeddings.
    own_lm_head: Option<Matrix>,
    pub(super) attention: AttentionShape,
    pub(super) precision: ActivationPrecision,
    pub(super) eps: f32,
    /// Only one pass runs at a time.
    scratch: Mutex<StepScratch>,
}

impl DeviceModel {
    /// Copies the last layers and the lm_head of `model` to the device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is too little memory (the message includes the size), or an encoding
    /// or a shape has no kernel.
    pub(crate) fn load(device: &Device, model: &Model, options: DeviceOptions) -> Result<Self> {
        require_supported(model)?;
        let all = model.layers.len();
        let first = all - options.layers.unwrap_or(all).min(all);
        check_memory(device, model, first)?;
        let upload = |w: &Weight| {
            Matrix::upload(device, w.encoding(), w.rows(), w.cols(), w.bytes()).map_err(Error::from)
        };
        let norm = |values: &Vec<f32>| upload_norm(device, values);
        let layers = model.layers[first..].iter().map(|layer| layer.try_map(upload, norm));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let is_tied = model.own_lm_head.is_none();
        let attention = attention_shape(model, all - first, options.kv);
        Ok(Self {
            layers,
            norm: norm(&model.norm)?,
            embeddings: (first == 0 || is_tied).then(|| upload(&model.embeddings)).transpose()?,
            own_lm_head: model.own_lm_head.as_ref().map(upload).transpose()?,
            attention,
            precision: match options.exact {
                true => ActivationPrecision::F32,
                false => ActivationPrecision::Q8,
            },
            eps: model.spec.norm_eps as f32,
            scratch: Mutex::new(StepScratch::new(device, model, attention, options.exact)?),
            device: device.clone(),
            first,
        })
    }

    /// The number of layers before those on the device.
    pub(crate) fn host_layers(&self) -> usize {
        self.first
    }

    /// The name of the device, and the first layer on it unless it has all layers.
    pub(crate) fn describe(&self) -> String {
        let name = &self.device.info().name;
        match self.first {
            0 => name.clone(),
            first => format!("{name}, layers from {} on", first + 1),
        }
    }

    /// Runs `pass`: appends its tokens to the sequences and sends its outputs to `sink`. `hidden` is the
    /// residual stream before the first layer on the device, [tokens, hidden], or `None` if the device
    /// has all layers. Logits of several sequences have the index of the first one.
    ///
    /// # Errors
    /// [`Error::Device`] if the device has too little memory, or failed.
    pub(crate) fn run(
        &self,
        caches: &mut DeviceCaches<'_>,
        pass: Pass<'_>,
        hidden: Option<&[f32]>,
        sink: &mut OutputSink<'_>,
    ) -> Result<()> {
        let scratch = &mut *self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let vocabulary = self.vocabulary();
        let mut logits = Vec::new();
        self.steps(scratch, caches, pass, hidden, &mut |scratch, first, count| {
            if let OutputKind::TopK(request) = pass.output {
                let best = scratch.candidates.find(&scratch.logits, vocabulary, request)?;
                sink(Output::TopK(best));
                return Ok(());
            }
            logits.resize(count * vocabulary, 0.0);
            scratch.logits.read(&mut logits)?;
            sink(Output::Logits { id: 0, first, logits: &logits });
            Ok(())
        })
    }

    /// The number of logits of a token.
    pub(crate) fn vocabulary(&self) -> usize {
        self.lm_head().rows()
    }

    pub(super) fn lm_head(&self) -> &Matrix {
        self.own_lm_head.as_ref().or(self.embeddings.as_ref()).expect("a tied lm_head is loaded")
    }
}

/// Checks the free memory of the device. The error includes the size needed and how many layers fit.
fn check_memory(device: &Device, model: &Model, first: usize) -> Result<()> {
    let bytes = |w: &Weight| w.byte_len() as u64;
    let layer = |layer: &Layer| layer.linears().iter().map(|(_, w)| bytes(w)).sum::<u64>();
    let tied = model.own_lm_head.is_none();
    let mut ends = bytes(model.lm_head());
    if first == 0 && !tied {
        ends += bytes(&model.embeddings);
    }
    let needed = SPARE_BYTES + ends + model.layers[first..].iter().map(layer).sum::<u64>();
    let free = device.free_memory()?;
    if needed <= free {
        return Ok(());
    }
    let mut left = free.saturating_sub(SPARE_BYTES + bytes(model.lm_head()));
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
