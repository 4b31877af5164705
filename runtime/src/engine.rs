//! [`Engine`]: a model with the threads, instruction set, precision, KV cache type and device that
//! run it.

use std::path::Path;
use std::sync::Arc;

use stb_format::{File, ModelSpec};
use stb_kernels::cuda::Device;
use stb_kernels::kv::KvKind;
use stb_kernels::{Isa, Pool};

use crate::checkpoint::{Checkpoint, resolve};
use crate::device::{DeviceChoice, DeviceModel, DeviceOptions};
use crate::error::{Error, Result};
use crate::kind::open_stb_file;
use crate::map::Bytes;
use crate::model::Model;
use crate::rope::Rope;
use crate::scratch::ScratchPool;
use crate::threads::default_threads;
use crate::verified::VerifiedFiles;

/// How much of a file is checked when it is opened. Structure, tensor table and metadata are always
/// checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Checksums of all tensors. A file of more than 1 GiB that was found intact is not checked again while it stays
    /// the same.
    #[default]
    Auto,
    /// Checksums and content of all tensors.
    Full,
    /// No tensors.
    Off,
}

/// The largest file whose checksums `Verify::Auto` always compares. It takes a fraction of a second.
const AUTO_VERIFY_BYTES: usize = 1 << 30;

/// Options of [`Engine::open`].
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Map the file instead of reading it.
    pub map: bool,
    /// What to check.
    pub verify: Verify,
    /// Never quantize activations; see [`Engine::exact`].
    pub exact: bool,
    /// The type of the KV cache.
    pub kv: KvKind,
    /// The number of threads; `None` for [`crate::default_threads`].
    pub threads: Option<usize>,
    /// Lock the file in memory, so that it is never paged out.
    pub lock: bool,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Decoder layers on the GPU, counted from the last; `None` for all.
    pub device_layers: Option<usize>,
}

impl OpenOptions {
    /// Options without approximations: activations are not quantized and the KV cache is f32.
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

/// Runs a [`Model`] on the CPU, or with its last layers on a GPU.
#[derive(Debug)]
pub struct Engine {
    /// Architecture and weights.
    pub model: Model,
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// Whether products with packed weights use unquantized activations. Otherwise activations are
    /// quantized to 8 bits with one scale per 128 columns if a kernel supports it, which is several
    /// times faster.
    pub exact: bool,
    /// The type of the KV cache.
    pub kv: KvKind,
    /// The worker threads.
    pub pool: Pool,
    /// Why [`DeviceChoice::Auto`] fell back to the CPU.
    pub device_note: Option<String>,
    pub(crate) rope: Rope,
    pub(crate) tail: Tail,
    pub(crate) scratch: ScratchPool,
}

/// The backend of the last decoder layers and the logits.
#[derive(Debug)]
pub(crate) enum Tail {
    /// The CPU computes all layers.
    Cpu,
    /// A GPU with the layers that are loaded on it.
    Cuda(Box<DeviceModel>),
}

impl Engine {
    /// Opens an `.stb` file, or a checkpoint if `path` is a folder, a `.safetensors` file, an index of
    /// shards or a `.gguf` file, or if it is the id of a model in the cache of the Hugging Face hub.
    ///
    /// # Errors
    /// The errors of [`Engine::open_stb`] and [`Checkpoint::open`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let path = &*resolve(path)?;
        if Checkpoint::is_checkpoint(path) {
            let engine = Self::from_checkpoint(&Checkpoint::open(path, options.map)?)?;
            Self { kv: options.kv, pool: pool(options)?, ..engine }.on_device(options)
        } else {
            Self::open_stb(path, options)
        }
    }

    /// Opens an `.stb` file. Weights are used in place.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read or locked; [`Error::Format`] with the broken rule;
    /// [`Error::Unsupported`] for a block or an encoding that this version lacks; [`Error::Usage`] if
    /// `STB_ISA`, the threads or the device options are wrong; [`Error::Device`] if the device cannot
    /// be used.
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
        let file = open_stb_file(path, &bytes)?;
        let spec = ModelSpec::from_file(&file).map_err(|e| Error::format(path, e))?;
        let verified =
            verify(&file, path, options.verify, &pool).map_err(|e| Error::format(path, e))?;
        let model = Model::from_stb(path, &bytes, &file, spec, verified)?;
        let engine = Self::on_cpu(model, isa);
        Self { exact: options.exact, kv: options.kv, pool, ..engine }.on_device(options)
    }

    /// Runs a dense checkpoint on the calling thread with an f32 KV cache, as conversions need it.
    ///
    /// # Errors
    /// [`Error::Usage`] if `STB_ISA` is wrong, [`Error::Invalid`] for a broken tokenizer,
    /// [`Error::Unsupported`] for a block that this version lacks.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self::on_cpu(Model::from_checkpoint(checkpoint)?, detect_isa()?))
    }

    /// An engine for the checkpoint without its decoder layers: it embeds tokens and runs layers that
    /// [`Model::load_layer`] loads, so that one of them is in memory at a time.
    ///
    /// # Errors
    /// The errors of [`Engine::from_checkpoint`].
    pub fn without_layers(checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self::on_cpu(Model::without_layers(checkpoint)?, detect_isa()?))
    }

    fn on_cpu(model: Model, isa: Isa) -> Self {
        Self {
            rope: Rope::new(&model.spec),
            model,
            isa,
            exact: false,
            kv: KvKind::F32,
            pool: Pool::serial(),
            device_note: None,
            tail: Tail::Cpu,
            scratch: ScratchPool::default(),
        }
    }

    /// Moves the last `layers` decoder layers (`None` for all) and the lm_head to a device.
    ///
    /// # Errors
    /// [`Error::Device`] if the device has too little memory, or no kernel for an encoding or a shape.
    pub fn use_device(mut self, device: &Device, layers: Option<usize>) -> Result<Self> {
        self.tail = Tail::Cuda(Box::new(self.load_device(device, layers)?));
        Ok(self)
    }

    fn load_device(&self, device: &Device, layers: Option<usize>) -> Result<DeviceModel> {
        let options = DeviceOptions { layers, kv: self.kv, exact: self.exact };
        DeviceModel::load(device, &self.model, options)
    }

    /// Moves the last layers to the device in `options`. [`DeviceChoice::Auto`] falls back to the
    /// CPU.
    ///
    /// # Errors
    /// [`Error::Device`] if a requested device cannot be used, [`Error::Usage`] if `options` has
    /// device layers without a device.
    fn on_device(mut self, options: &OpenOptions) -> Result<Self> {
        let ordinal = match options.device {
            DeviceChoice::Cpu if options.device_layers.is_some_and(|n| n > 0) => {
                return Err(Error::usage("-ngl needs a device: add --device cuda"));
            }
            DeviceChoice::Cpu => return Ok(self),
            _ if options.device_layers == Some(0) => return Ok(self),
            DeviceChoice::Auto => 0,
            DeviceChoice::Cuda(ordinal) => ordinal,
        };
        let load = |device| self.load_device(&device, options.device_layers);
        match Device::open(ordinal).map_err(Error::from).and_then(load) {
            Ok(loaded) => self.tail = Tail::Cuda(Box::new(loaded)),
            // Device failures are errors even with `Auto`.
            Err(e) if options.device == DeviceChoice::Auto && e.kind().is_unsupported() => {
                self.device_note = Some(e.to_string());
            }
            Err(e) => return Err(e),
        }
        Ok(self)
    }

    /// The name of the GPU and, unless it computes all layers, its first layer; `None` for the CPU.
    #[must_use]
    pub fn device_name(&self) -> Option<String> {
        match &self.tail {
            Tail::Cpu => None,
            Tail::Cuda(device) => Some(device.describe()),
        }
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

/// Compares tensors with their checksums in parallel. Returns whether checksums were compared, now or before.
fn verify(file: &File<'_>, path: &Path, level: Verify, pool: &Pool) -> stb_format::Result<bool> {
    let remembered = match level {
        Verify::Off => return Ok(false),
        Verify::Auto if file.bytes().len() > AUTO_VERIFY_BYTES => Some(VerifiedFiles::of_user()),
        Verify::Auto => None,
        Verify::Full => {
            file.verify_padding()?;
            None
        }
    };
    if remembered.as_ref().is_some_and(|files| files.has(path)) {
        return Ok(true);
    }
    let check = |tensor: &stb_format::Tensor<'_>| {
        tensor.verify_checksum()?;
        if level == Verify::Full { tensor.verify_payload() } else { Ok(()) }
    };
    // All results are kept so that the error is the first one in file order.
    let tensors = file.tensors();
    let mut results: Vec<_> = tensors.iter().map(|_| Ok(())).collect();
    pool.run_chunks(&mut results, 1, |first, results| {
        for (result, tensor) in results.iter_mut().zip(&tensors[first..]) {
            *result = check(tensor);
        }
    });
    results.into_iter().collect::<stb_format::Result<()>>()?;
    if let Some(files) = remembered {
        files.remember(path);
    }
    Ok(true)
}
