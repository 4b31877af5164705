//! [`Model`]: architecture, weights in place, tokenizer and chat template. A [`crate::Engine`] runs it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stb_format::arch::{MlpKind, NormPlacement, NormSite, Role, TensorSpec};
use stb_format::{File, MetaView, ModelSpec, Quality, ValueRef};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::layer::Layer;
use crate::map::Bytes;
use crate::sampler::SamplerOptions;
use crate::template::ChatTemplate;
use crate::tokenizer::{Tokenizer, own_begin_token};
use crate::weights::Weight;

/// A decoder: its architecture and its weights, from an `.stb` file or a dense checkpoint.
#[derive(Debug)]
pub struct Model {
    /// The architecture.
    pub spec: ModelSpec,
    /// Token embeddings, [vocab, embedding].
    pub embeddings: Weight,
    /// Decoder layers.
    pub layers: Vec<Layer>,
    /// Learned position embeddings, [context, hidden], if the model has them.
    pub positions: Option<Weight>,
    /// The projection of token embeddings to the residual stream, [hidden, embedding], if their widths differ.
    pub project_in: Option<Weight>,
    /// The projection of the residual stream to the input of the lm_head, [embedding, hidden].
    pub project_out: Option<Weight>,
    /// The weight of the last norm, `[hidden]`; empty if the model has no last norm.
    pub norm: Vec<f32>,
    /// The bias of the last norm, `[hidden]`.
    pub norm_bias: Option<Vec<f32>>,
    /// The lm_head, [vocab, embedding]; `None` with tied embeddings ([`Model::lm_head`] returns either).
    pub own_lm_head: Option<Weight>,
    /// The file or folder that the model was loaded from.
    pub source: PathBuf,
    /// Bytes of the file, or of all weight files.
    pub file_bytes: u64,
    /// Whether tensor checksums were compared.
    pub verified: bool,
    texts: Texts,
}

/// Tokenizer, chat template, token ids and sampling defaults as stored.
#[derive(Clone, Debug, Default)]
struct Texts {
    tokenizer: Option<String>,
    template: Option<String>,
    bos: Option<u64>,
    eos: Vec<u64>,
    add_bos: bool,
    sampling: Vec<(&'static str, f64)>,
    quality: Option<Quality>,
    architecture: Option<String>,
    recipe: Option<String>,
}

/// Sampling defaults that a model file may carry.
const SAMPLING_KEYS: [&str; 5] = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"];

/// The source of a model.
struct Origin<'a> {
    source: &'a Path,
    file_bytes: u64,
    verified: bool,
}

impl Model {
    /// A model from an `.stb` file. Its weights point into `bytes`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a block or an encoding that this version lacks.
    pub(crate) fn from_stb(
        path: &Path,
        bytes: &Arc<Bytes>,
        file: &File<'_>,
        spec: ModelSpec,
        verified: bool,
    ) -> Result<Self> {
        let texts = Texts::from_meta(file.meta());
        let base = bytes.as_ptr().addr();
        let find = |name: &str| {
            let tensor = file
                .tensor(name)
                .ok_or_else(|| Error::Internal { what: format!("no tensor {name}") })?;
            let start = tensor.payload().as_ptr().addr() - base;
            let range = start..start + tensor.payload().len();
            let (rows, cols) = tensor.matrix_shape();
            Weight::new(bytes.clone(), range, tensor.encoding().clone(), rows, cols)
        };
        let origin = Origin { source: path, file_bytes: bytes.len() as u64, verified };
        let layers = load_layers(&spec, find)?;
        Self::assemble(spec, texts, origin, layers, find)
    }

    /// A model from a checkpoint. Weights that are dense in the file are used in place, others are dequantized.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a broken tokenizer, [`Error::Unsupported`] for a block that this version
    /// lacks.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let texts = Texts::from_checkpoint(checkpoint)?;
        let file_bytes = checkpoint.files.iter().map(|f| f.bytes.len() as u64).sum();
        let origin = Origin { source: &checkpoint.source, file_bytes, verified: false };
        let spec = checkpoint.spec.clone();
        let find = |name: &str| checkpoint.weight(name);
        let layers = load_layers(&spec, find)?;
        Self::assemble(spec, texts, origin, layers, find)
    }

    /// A model from a checkpoint without its decoder layers, which [`Model::load_layer`] loads.
    ///
    /// # Errors
    /// The errors of [`Model::from_checkpoint`].
    pub(crate) fn without_layers(checkpoint: &Checkpoint) -> Result<Self> {
        let texts = Texts::from_checkpoint(checkpoint)?;
        let file_bytes = checkpoint.files.iter().map(|f| f.bytes.len() as u64).sum();
        let origin = Origin { source: &checkpoint.source, file_bytes, verified: false };
        (0..checkpoint.spec.layers).try_for_each(|i| require_supported(&checkpoint.spec, i))?;
        let spec = checkpoint.spec.clone();
        Self::assemble(spec, texts, origin, Vec::new(), |name| checkpoint.weight(name))
    }

    /// Decoder layer `index` of `checkpoint`.
    ///
    /// # Errors
    /// The errors of [`Checkpoint::weight`].
    pub fn load_layer(checkpoint: &Checkpoint, index: usize) -> Result<Layer> {
        load_layer(&checkpoint.spec, index as u64, |name| checkpoint.weight(name))
    }

    fn assemble(
        spec: ModelSpec,
        texts: Texts,
        origin: Origin<'_>,
        layers: Vec<Layer>,
        find: impl Fn(&str) -> Result<Weight>,
    ) -> Result<Self> {
        let matrix = |tensor: &TensorSpec| find(&tensor.name);
        let vector = |tensor: &TensorSpec| find(&tensor.name).map(|weight| weight.decode());
        let outside = |role: Role| spec.tensors().find(|tensor| tensor.role == role);
        let outside_matrix = |role| outside(role).as_ref().map(matrix).transpose();
        let outside_vector = |role| outside(role).as_ref().map(vector).transpose();
        let missing = || Error::Internal { what: "a model without embeddings".into() };
        Ok(Self {
            embeddings: outside_matrix(Role::TokenEmbedding)?.ok_or_else(missing)?,
            positions: outside_matrix(Role::PositionEmbedding)?,
            project_in: outside_matrix(Role::ProjectIn)?,
            project_out: outside_matrix(Role::ProjectOut)?,
            layers,
            norm: outside_vector(Role::Norm(NormSite::Final))?.unwrap_or_default(),
            norm_bias: outside_vector(Role::NormBias(NormSite::Final))?,
            own_lm_head: outside_matrix(Role::LmHead)?,
            source: origin.source.to_owned(),
            file_bytes: origin.file_bytes,
            verified: origin.verified,
            texts,
            spec,
        })
    }

    /// The number of parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.spec.tensors().map(|tensor| tensor.shape.iter().product::<u64>()).sum()
    }

    /// The matrix that turns hidden states into logits, [vocab, embedding].
    #[must_use]
    pub fn lm_head(&self) -> &Weight {
        self.own_lm_head.as_ref().unwrap_or(&self.embeddings)
    }

    /// The width of the residual stream.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.spec.hidden_size as usize
    }

    /// The matrices of all linear layers and the lm_head, in the order of a forward pass.
    pub fn matrices(&self) -> impl Iterator<Item = &Weight> {
        let layers = self.layers.iter().flat_map(Layer::matrices);
        let projections = self.project_in.iter().chain(&self.project_out);
        layers.map(|(_, weight)| weight).chain(projections).chain([self.lm_head()])
    }

    /// The number of weights that a token is multiplied with: those of the matrices, of mixtures of experts those
    /// of the active experts.
    #[must_use]
    pub fn active_weights(&self) -> u64 {
        self.active_sum(|weight| (weight.rows() * weight.cols()) as u64)
    }

    /// The sum of `size` over the matrices that a token uses. All experts of a layer count the same.
    fn active_sum(&self, size: impl Fn(&Weight) -> u64 + Copy) -> u64 {
        let all: u64 = self.matrices().map(size).sum();
        let idle: u64 = self.layers.iter().map(|layer| idle_experts(layer, size)).sum();
        all - idle
    }

    /// Bytes of weights that a forward pass of one token reads: the matrices, of mixtures of experts those of
    /// the active experts, and the vectors (f32), without the row of the embeddings.
    #[must_use]
    pub fn bytes_per_token(&self) -> u64 {
        let matrices = self.active_sum(|weight| weight.byte_len() as u64);
        let vectors = self.layers.iter().flat_map(Layer::vectors).map(|(_, vector)| vector.len());
        let vectors = vectors.sum::<usize>() + self.norm.len();
        matrices + 4 * vectors as u64
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model has no tokenizer or a broken one.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let json = self.texts.tokenizer.as_deref().ok_or_else(|| {
            Error::invalid(format!(
                "{} has no tokenizer; put the model's tokenizer.json or tokenizer.model beside the \
                 weights",
                self.source.display()
            ))
        })?;
        let id = |id: u64| u32::try_from(id).unwrap_or(u32::MAX);
        let bos = self.texts.bos.filter(|_| self.texts.add_bos).map(id);
        let eos = self.texts.eos.iter().copied().map(id).collect();
        Tokenizer::new(json, bos, eos, self.embeddings.rows())
    }

    /// The compiled chat template, if the model has one.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the template does not compile.
    pub fn chat_template(&self, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        let Some(source) = &self.texts.template else { return Ok(None) };
        let text = |id: Option<u64>| {
            id.and_then(|id| tokenizer.token_text(u32::try_from(id).ok()?)).unwrap_or_default()
        };
        let eos = self.texts.eos.first().copied();
        ChatTemplate::new(source, &text(self.texts.bos), &text(eos)).map(Some)
    }

    /// The value that the model file recommends for a sampling parameter: `temperature`, `top_k`,
    /// `top_p`, `min_p` or `repetition_penalty`.
    #[must_use]
    pub fn sampling_default(&self, key: &str) -> Option<f64> {
        self.texts.sampling.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    /// Sampling parameters from the model file, with the values of [`SamplerOptions::default`] for missing ones.
    #[must_use]
    pub fn suggested_sampling(&self) -> SamplerOptions {
        let default = SamplerOptions::default();
        let file = |key: &str| self.sampling_default(key);
        let number = |key: &str, default: f32| file(key).map_or(default, |v| v as f32);
        SamplerOptions {
            repeat_penalty: number("repetition_penalty", default.repeat_penalty),
            temperature: number("temperature", default.temperature),
            top_k: file("top_k").map_or(default.top_k, |v| v as usize),
            top_p: number("top_p", default.top_p),
            min_p: number("min_p", default.min_p),
            ..default
        }
    }

    /// The `model_type` of the configuration that the model comes from, such as `llama`.
    #[must_use]
    pub fn architecture(&self) -> Option<&str> {
        self.texts.architecture.as_deref()
    }

    /// The name of the recipe that the file was converted with; `None` for checkpoints and files that do not say.
    #[must_use]
    pub fn recipe(&self) -> Option<&str> {
        self.texts.recipe.as_deref()
    }

    /// What the converter measured with the file; `None` for checkpoints and files that do not say.
    #[must_use]
    pub fn quality(&self) -> Option<&Quality> {
        self.texts.quality.as_ref()
    }
}

/// All decoder layers of a model, whose weights `find` finds by name.
fn load_layers(spec: &ModelSpec, find: impl Fn(&str) -> Result<Weight>) -> Result<Vec<Layer>> {
    let load = |layer| {
        require_supported(spec, layer)?;
        load_layer(spec, layer, &find)
    };
    (0..spec.layers).map(load).collect()
}

fn load_layer(
    spec: &ModelSpec,
    layer: u64,
    find: impl Fn(&str) -> Result<Weight>,
) -> Result<Layer> {
    let matrix = |tensor: &TensorSpec| find(&tensor.name);
    let vector = |tensor: &TensorSpec| find(&tensor.name).map(|weight| weight.decode());
    Layer::load(spec.block(layer), spec.layer_tensors(layer), matrix, vector)
}

/// The sum of `size` over the experts of a layer that a token does not use.
fn idle_experts(layer: &Layer, size: impl Fn(&Weight) -> u64) -> u64 {
    let Some(spec) = layer.block.mlp.experts else { return 0 };
    let experts = layer.experts().iter().flat_map(|expert| expert.iter());
    let all: u64 = experts.map(|(_, weight)| size(weight)).sum();
    all / spec.count.max(1) * spec.count.saturating_sub(spec.active)
}

/// Rejects combinations of features that the forward pass ([`crate::block`]) lacks.
fn require_supported(spec: &ModelSpec, layer: u64) -> Result<()> {
    let block = spec.block(layer);
    let is_plain = block.norm.placement == NormPlacement::Pre
        && block.mlp.kind == MlpKind::Gated
        && !block.mlp.bias;
    if block.mlp.experts.is_some() && !is_plain {
        return Err(Error::unsupported(
            "this model has experts with biases, without gates or with norms after them, which this version \
             cannot run"
                .to_owned(),
        ));
    }
    Ok(())
}

/// `model_type` of a `config.json`.
fn model_type(config: &str) -> Option<String> {
    let config: serde_json::Value = serde_json::from_str(config).ok()?;
    config.get("model_type")?.as_str().map(str::to_owned)
}

/// The name in the settings of a conversion, TOML.
fn recipe_name(settings: &str) -> Option<String> {
    let value = |line: &str| line.strip_prefix("name = \"")?.strip_suffix('"').map(str::to_owned);
    settings.lines().find_map(value)
}

impl Texts {
    fn from_meta(meta: &MetaView<'_>) -> Self {
        let text = |key: &str| meta.text(key).map(str::to_owned);
        let sampling = SAMPLING_KEYS.iter().filter_map(|key| {
            match meta.get(&format!("generation.{key}"))? {
                ValueRef::F64(v) => Some((*key, v)),
                _ => None,
            }
        });
        Self {
            tokenizer: text("tokenizer.json"),
            template: text("tokenizer.chat_template"),
            bos: match meta.get("tokenizer.bos_id") {
                Some(ValueRef::U64(id)) => Some(id),
                _ => None,
            },
            eos: meta.u64_list("tokenizer.eos_ids").unwrap_or_default(),
            add_bos: meta.get("tokenizer.add_bos") == Some(ValueRef::Bool(true)),
            sampling: sampling.collect(),
            quality: Quality::read(meta),
            architecture: text("source.config.json")
                .and_then(|config| model_type(&config))
                .or_else(|| text("model.architecture")),
            recipe: text("provenance.recipe").as_deref().and_then(recipe_name),
        }
    }

    fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let (bos, add_bos) = checkpoint.begin_token()?;
        Ok(Self {
            tokenizer: checkpoint.tokenizer.clone(),
            template: checkpoint.chat_template.clone(),
            bos,
            eos: checkpoint.tokens.eos.clone(),
            add_bos,
            sampling: checkpoint.sampling_defaults(),
            quality: None,
            architecture: model_type(&checkpoint.config),
            recipe: None,
        })
    }
}

impl Checkpoint {
    /// The begin token, and whether texts start with it. The post-processor of the tokenizer decides,
    /// else `add_bos_token` in `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a broken tokenizer.
    pub fn begin_token(&self) -> Result<(Option<u64>, bool)> {
        let configured = self.tokens.bos;
        if let Some(json) = &self.tokenizer
            && let Some(own) = own_begin_token(json)?
        {
            return Ok((Some(u64::from(own)), true));
        }
        let config = self.tokenizer_config.as_deref().unwrap_or("{}");
        let config: serde_json::Value = serde_json::from_str(config)
            .map_err(|e| Error::invalid(format!("tokenizer_config.json: {e}")))?;
        let add_bos = config.get("add_bos_token") == Some(&serde_json::Value::Bool(true));
        Ok((configured, add_bos && configured.is_some()))
    }

    /// Sampling parameters of `generation_config.json`.
    #[must_use]
    pub fn sampling_defaults(&self) -> Vec<(&'static str, f64)> {
        let text = self.generation_config.as_deref().unwrap_or("{}");
        let config: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
        let value = |key: &&'static str| Some((*key, config.get(*key)?.as_f64()?));
        SAMPLING_KEYS.iter().filter_map(value).collect()
    }
}
