//! A model in memory: weights in place, vectors decoded, tokenizer and template compiled on demand.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stb_format::{File, MetaView, ModelSpec, ValueRef};
use stb_kernels::cuda::Device;
use stb_kernels::kv::KvKind;
use stb_kernels::{Isa, Pool};

use crate::checkpoint::Checkpoint;
use crate::device::{DeviceChoice, DeviceModel};
use crate::error::{Error, Result};
use crate::map::Bytes;
use crate::rotary::inverse_frequencies;
use crate::template::ChatTemplate;
use crate::threads::default_threads;
use crate::tokenizer::{Tokenizer, own_begin_token};
use crate::weights::Weight;

/// How much of a file is checked before it is used. Structure, table and metadata always are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Checksums of all tensors if the file has at most 1 GiB.
    #[default]
    Auto,
    /// Checksums and content of all tensors.
    Full,
    /// No tensor.
    Off,
}

/// The largest file whose checksums `Verify::Auto` compares: a fraction of a second's work.
const AUTO_VERIFY_BYTES: usize = 1 << 30;

/// Options of [`Model::open`].
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Map the file instead of reading it.
    pub map: bool,
    /// What to check.
    pub verify: Verify,
    /// Never round activations; see [`Model::exact`].
    pub exact: bool,
    /// How the keys and values of earlier tokens are kept.
    pub kv: KvKind,
    /// Threads that compute; `None` for [`crate::default_threads`].
    pub threads: Option<usize>,
    /// Lock the file in memory, so that it is never paged out.
    pub lock: bool,
    /// Where to compute.
    pub device: DeviceChoice,
    /// With a GPU: how many decoder layers it computes, the last ones; `None` for all.
    pub device_layers: Option<usize>,
}

impl OpenOptions {
    /// Computes with what the file holds, without the approximations that make it fast.
    #[must_use]
    pub fn exact() -> Self {
        Self { exact: true, kv: KvKind::F32, ..Self::default() }
    }
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            map: true,
            verify: Verify::Auto,
            exact: false,
            kv: KvKind::default(),
            threads: None,
            lock: false,
            device: DeviceChoice::Cpu,
            device_layers: None,
        }
    }
}

/// The weights of one decoder layer; shapes as [out, in].
#[derive(Clone, Debug)]
pub struct Layer {
    /// Scale of the norm before attention, `[hidden]`.
    pub attention_norm: Vec<f32>,
    /// Queries, [heads · head_dim, hidden].
    pub q: Weight,
    /// Keys, [kv_heads · head_dim, hidden].
    pub k: Weight,
    /// Values, [kv_heads · head_dim, hidden].
    pub v: Weight,
    /// Attention output, [hidden, heads · head_dim].
    pub o: Weight,
    /// Scale of the norm before the feed-forward network, `[hidden]`.
    pub mlp_norm: Vec<f32>,
    /// Gate, [intermediate, hidden].
    pub gate: Weight,
    /// Up, [intermediate, hidden].
    pub up: Weight,
    /// Down, [hidden, intermediate].
    pub down: Weight,
}

impl Layer {
    /// The names of its matrices in a checkpoint, behind those of the layer, in order of use.
    pub const PARTS: [&str; 7] = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];

    /// Its matrices in the order of [`Layer::PARTS`].
    #[must_use]
    pub fn matrices(&self) -> [&Weight; 7] {
        [&self.q, &self.k, &self.v, &self.o, &self.gate, &self.up, &self.down]
    }

    /// The matrix of this name in [`Layer::PARTS`].
    pub fn matrix_mut(&mut self, part: &str) -> Option<&mut Weight> {
        let all = [
            &mut self.q,
            &mut self.k,
            &mut self.v,
            &mut self.o,
            &mut self.gate,
            &mut self.up,
            &mut self.down,
        ];
        let place = Self::PARTS.iter().position(|name| *name == part)?;
        all.into_iter().nth(place)
    }
}

/// A LLaMA-type decoder, from an `.stb` file or a dense checkpoint.
#[derive(Debug)]
pub struct Model {
    /// The architecture.
    pub spec: ModelSpec,
    /// Token embeddings, [vocab, hidden].
    pub embeddings: Weight,
    /// Decoder layers.
    pub layers: Vec<Layer>,
    /// Scale of the last norm, `[hidden]`.
    pub norm: Vec<f32>,
    /// The head, [vocab, hidden]; `None` if it is the embeddings.
    pub head: Option<Weight>,
    /// The instruction set its kernels use.
    pub isa: Isa,
    /// Whether products with packed weights use activations as they are. If not, they are rounded to
    /// 8 bits, one scale per 128 columns, where there is a kernel for it
    /// ([`stb_kernels::PackedMatrix::prepare_q8`]): several times faster.
    pub exact: bool,
    /// How the keys and values of earlier tokens are kept.
    pub kv: KvKind,
    /// The threads that compute.
    pub pool: Pool,
    /// Turns of a head's pairs per token, `[head_dim / 2]`.
    pub(crate) frequencies: Vec<f32>,
    /// Where it was loaded from.
    pub source: PathBuf,
    /// Bytes of the file, or of all weight files.
    pub file_bytes: u64,
    /// Whether tensor checksums were compared.
    pub verified: bool,
    /// The part that a GPU computes.
    pub(crate) device: Option<DeviceModel>,
    /// Why no GPU computes though one was wanted if possible.
    pub device_note: Option<String>,
    texts: Texts,
}

/// Companion texts and token ids.
#[derive(Clone, Debug, Default)]
struct Texts {
    tokenizer: Option<String>,
    template: Option<String>,
    bos: Option<u64>,
    eos: Vec<u64>,
    add_bos: bool,
    sampling: Vec<(&'static str, f64)>,
}

/// Sampling defaults that a model file may carry.
const SAMPLING_KEYS: [&str; 5] = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty"];

impl Model {
    /// Opens an `.stb` file, or a dense checkpoint if `path` is a folder, a `.safetensors` file or
    /// an index of shards.
    ///
    /// # Errors
    /// As for [`Model::open_stb`] and [`Checkpoint::open`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let dense =
            path.is_dir() || path.extension().is_some_and(|e| e == "safetensors" || e == "json");
        if dense {
            let model = Self::from_checkpoint(&Checkpoint::open(path, options.map)?)?;
            Self { kv: options.kv, pool: pool(options)?, ..model }.on_device(options)
        } else {
            Self::open_stb(path, options)
        }
    }

    /// Opens an `.stb` file. Weights stay where they are in the file.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] with the broken rule; [`Error::Unsupported`] if a weight
    /// has an encoding that this version lacks.
    pub fn open_stb(path: &Path, options: &OpenOptions) -> Result<Self> {
        let isa = detect_isa()?;
        let bytes = Arc::new(Bytes::open(path, options.map)?);
        if options.lock {
            bytes.lock().map_err(|e| {
                let advice = format!("cannot lock it in memory ({e}); raise `ulimit -l`");
                Error::io(path, std::io::Error::new(e.kind(), advice))
            })?;
        }
        let pool = pool(options)?;
        let file = File::open(&bytes).map_err(|e| Error::format(path, e))?;
        let spec = ModelSpec::from_file(&file).map_err(|e| Error::format(path, e))?;
        let verified = verify(&file, options.verify, &pool).map_err(|e| Error::format(path, e))?;
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
        let model = Self::assemble(spec, isa, path, bytes.len() as u64, verified, texts, find)?;
        Self { exact: options.exact, kv: options.kv, pool, ..model }.on_device(options)
    }

    /// The model with its last `layers` decoder layers (all, if `None`) and its head on a device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is too little memory, or no kernel for an encoding or a shape.
    pub fn use_device(mut self, device: &Device, layers: Option<usize>) -> Result<Self> {
        self.device = Some(DeviceModel::load(device, &self, layers)?);
        Ok(self)
    }

    /// The model with its last layers on the device that the options ask for.
    ///
    /// # Errors
    /// [`Error::Device`] if a device was asked for and cannot be used, [`Error::Usage`] for layers
    /// for the CPU.
    fn on_device(mut self, options: &OpenOptions) -> Result<Self> {
        let ordinal = match options.device {
            DeviceChoice::Cpu if options.device_layers.is_some_and(|n| n > 0) => {
                return Err(Error::usage("layers for a device (-ngl) need one: --device cuda"));
            }
            DeviceChoice::Cpu => return Ok(self),
            _ if options.device_layers == Some(0) => return Ok(self),
            DeviceChoice::Auto => 0,
            DeviceChoice::Cuda(ordinal) => ordinal,
        };
        let load = |device| DeviceModel::load(&device, &self, options.device_layers);
        match Device::open(ordinal).map_err(Error::from).and_then(load) {
            Ok(loaded) => self.device = Some(loaded),
            // A defect is told, whatever was asked for.
            Err(e) if options.device == DeviceChoice::Auto && e.exit_code() == 5 => {
                self.device_note = Some(e.to_string());
            }
            Err(e) => return Err(e),
        }
        Ok(self)
    }

    /// The GPU that computes, and which part; `None` for the CPU.
    #[must_use]
    pub fn device_name(&self) -> Option<String> {
        self.device.as_ref().map(DeviceModel::describe)
    }

    /// A model with the weights of a dense checkpoint, in place, that computes on the calling thread
    /// with an exact cache.
    ///
    /// # Errors
    /// [`Error::Usage`] if `STB_ISA` is wrong, [`Error::Invalid`] for a broken tokenizer.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let isa = detect_isa()?;
        let texts = Texts::from_checkpoint(checkpoint)?;
        let bytes = checkpoint.files.iter().map(|f| f.bytes.len() as u64).sum();
        let spec = checkpoint.spec.clone();
        let find = |name: &str| checkpoint.weight(name);
        Self::assemble(spec, isa, &checkpoint.folder, bytes, false, texts, find)
    }

    fn assemble(
        spec: ModelSpec,
        isa: Isa,
        source: &Path,
        file_bytes: u64,
        verified: bool,
        texts: Texts,
        find: impl Fn(&str) -> Result<Weight>,
    ) -> Result<Self> {
        let vector = |name: &str| find(name).map(|w| w.decode());
        let mut layers = Vec::new();
        for i in 0..spec.layers {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            layers.push(Layer {
                attention_norm: vector(&name("input_layernorm"))?,
                q: find(&name("self_attn.q_proj"))?,
                k: find(&name("self_attn.k_proj"))?,
                v: find(&name("self_attn.v_proj"))?,
                o: find(&name("self_attn.o_proj"))?,
                mlp_norm: vector(&name("post_attention_layernorm"))?,
                gate: find(&name("mlp.gate_proj"))?,
                up: find(&name("mlp.up_proj"))?,
                down: find(&name("mlp.down_proj"))?,
            });
        }
        let head = if spec.tied_embeddings { None } else { Some(find("lm_head.weight")?) };
        let frequencies =
            inverse_frequencies(spec.head_dim as usize, spec.rope_theta, spec.rope_scaling);
        Ok(Self {
            kv: KvKind::F32,
            pool: Pool::serial(),
            frequencies,
            embeddings: find("model.embed_tokens.weight")?,
            layers,
            norm: vector("model.norm.weight")?,
            head,
            isa,
            exact: false,
            source: source.to_owned(),
            file_bytes,
            verified,
            device: None,
            device_note: None,
            texts,
            spec,
        })
    }

    /// The number of parameters.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.spec.tensors().map(|(_, shape)| shape.iter().product::<u64>()).sum()
    }

    /// The matrix that turns hidden states into logits.
    #[must_use]
    pub fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embeddings)
    }

    /// All matrices that every token is multiplied with, in order.
    pub fn matrices(&self) -> impl Iterator<Item = &Weight> {
        self.layers.iter().flat_map(Layer::matrices).chain([self.head()])
    }

    /// Bytes of weights that one decoded token reads: all matrices, one row of the embeddings.
    #[must_use]
    pub fn bytes_per_token(&self) -> u64 {
        let matrices: u64 = self.matrices().map(|w| w.byte_len() as u64).sum();
        let norms = |l: &Layer| l.attention_norm.len() + l.mlp_norm.len();
        let norms = self.layers.iter().map(norms).sum::<usize>() + self.norm.len();
        matrices + 4 * norms as u64
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the model has none or a broken one.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let json = self.texts.tokenizer.as_deref().ok_or_else(|| {
            Error::invalid(format!(
                "{} has no tokenizer.json; put the model's tokenizer.json beside the weights",
                self.source.display()
            ))
        })?;
        let id = |id: u64| u32::try_from(id).unwrap_or(u32::MAX);
        let bos = self.texts.bos.filter(|_| self.texts.add_bos).map(id);
        let eos = self.texts.eos.iter().copied().map(id).collect();
        Tokenizer::new(json, bos, eos, self.embeddings.rows())
    }

    /// The compiled chat template; `None` if the model has none.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it does not compile.
    pub fn chat_template(&self, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        let Some(source) = &self.texts.template else { return Ok(None) };
        let text = |id: Option<u64>| {
            id.and_then(|id| tokenizer.token_text(u32::try_from(id).ok()?)).unwrap_or_default()
        };
        let eos = self.texts.eos.first().copied();
        ChatTemplate::new(source, &text(self.texts.bos), &text(eos)).map(Some)
    }

    /// A sampling default that the model carries: `temperature`, `top_k`, `top_p`, `min_p` or
    /// `repetition_penalty`.
    #[must_use]
    pub fn sampling_default(&self, key: &str) -> Option<f64> {
        self.texts.sampling.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }
}

fn pool(options: &OpenOptions) -> Result<Pool> {
    let threads = options.threads.unwrap_or_else(default_threads);
    Pool::new(threads)
        .map_err(|e| Error::usage(format!("cannot start {threads} threads: {e}; try fewer (-t)")))
}

fn detect_isa() -> Result<Isa> {
    Isa::detect().map_err(|e| Error::usage(e.to_string()))
}

/// Compares tensors with their checksums, in parallel; whether it did.
fn verify(file: &File<'_>, what: Verify, pool: &Pool) -> stb_format::Result<bool> {
    match what {
        Verify::Off => return Ok(false),
        Verify::Auto if file.bytes().len() > AUTO_VERIFY_BYTES => return Ok(false),
        Verify::Auto => {}
        Verify::Full => file.verify_padding()?,
    }
    let check = |tensor: &stb_format::Tensor<'_>| {
        tensor.verify_checksum()?;
        if what == Verify::Full { tensor.verify_payload() } else { Ok(()) }
    };
    // The first failure in file order, whichever thread finds one first.
    let tensors = file.tensors();
    let mut results: Vec<_> = tensors.iter().map(|_| Ok(())).collect();
    pool.run_chunks(&mut results, 1, |first, results| {
        for (result, tensor) in results.iter_mut().zip(&tensors[first..]) {
            *result = check(tensor);
        }
    });
    results.into_iter().collect::<stb_format::Result<()>>()?;
    Ok(true)
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
        })
    }
}

impl Checkpoint {
    /// The begin token and whether texts start with it: what the tokenizer itself does, else what
    /// `add_bos_token` of `tokenizer_config.json` says.
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
        let asked = config.get("add_bos_token") == Some(&serde_json::Value::Bool(true));
        Ok((configured, asked && configured.is_some()))
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
