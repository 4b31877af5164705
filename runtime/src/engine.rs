//! What runs a model: threads, instruction set, precision, KV cache type, device.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use stb_format::{File, ModelSpec};
use stb_kernels::cuda::Device;
use stb_kernels::kv::KvKind;
use stb_kernels::{Isa, Pool};

use crate::checkpoint::Checkpoint;
use crate::device::{DeviceChoice, DeviceModel, DeviceOptions};
use crate::error::{Error, Result};
use crate::map::Bytes;
use crate::model::Model;
use crate::rope::Rope;
use crate::threads::default_threads;

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

/// Options of [`Engine::open`].
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Map the file instead of reading it.
    pub map: bool,
    /// What to check.
    pub verify: Verify,
    /// Never round activations; see [`Engine::exact`].
    pub exact: bool,
    /// The type of the KV cache.
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

/// A model and what runs it.
#[derive(Debug)]
pub struct Engine {
    /// Architecture and weights.
    pub model: Model,
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// Whether products with packed weights use activations as they are. If not, activations are
    /// quantized to 8 bits, one scale per 128 columns, where there is a kernel for that: several
    /// times faster.
    pub exact: bool,
    /// The type of the KV cache.
    pub kv: KvKind,
    /// The threads that compute.
    pub pool: Pool,
    /// Why no GPU computes though one was wanted if possible.
    pub device_note: Option<String>,
    pub(crate) rope: Rope,
    pub(crate) tail: Tail,
}

/// What computes the last decoder layers and the logits.
#[derive(Debug)]
pub(crate) enum Tail {
    /// The CPU, which computes all layers then.
    Cpu,
    /// A GPU, with the layers that are there.
    Cuda(DeviceModel),
}

impl Deref for Engine {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.model
    }
}

impl Engine {
    /// Opens an `.stb` file, or a dense checkpoint if `path` is a folder, a `.safetensors` file or
    /// an index of shards.
    ///
    /// # Errors
    /// As for [`Engine::open_stb`] and [`Checkpoint::open`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let dense =
            path.is_dir() || path.extension().is_some_and(|e| e == "safetensors" || e == "json");
        if dense {
            let engine = Self::from_checkpoint(&Checkpoint::open(path, options.map)?)?;
            Self { kv: options.kv, pool: pool(options)?, ..engine }.on_device(options)
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
        let model = Model::from_stb(path, &bytes, &file, spec, verified)?;
        let engine = Self::on_cpu(model, isa);
        Self { exact: options.exact, kv: options.kv, pool, ..engine }.on_device(options)
    }

    /// Runs a dense checkpoint on the calling thread with an exact KV cache: what a conversion
    /// needs.
    ///
    /// # Errors
    /// [`Error::Usage`] if `STB_ISA` is wrong, [`Error::Invalid`] for a broken tokenizer.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self::on_cpu(Model::from_checkpoint(checkpoint)?, detect_isa()?))
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
        }
    }

    /// The same with the last `layers` decoder layers (all, if `None`) and the lm_head on a device.
    ///
    /// # Errors
    /// [`Error::Device`] if there is too little memory, or no kernel for an encoding or a shape.
    pub fn use_device(mut self, device: &Device, layers: Option<usize>) -> Result<Self> {
        self.tail = Tail::Cuda(self.load_device(device, layers)?);
        Ok(self)
    }

    fn load_device(&self, device: &Device, layers: Option<usize>) -> Result<DeviceModel> {
        let options = DeviceOptions { layers, kv: self.kv, exact: self.exact };
        DeviceModel::load(device, &self.model, options)
    }

    /// The same with the last layers on the device that the options ask for.
    ///
    /// # Errors
    /// [`Error::Device`] if a device was asked for and cannot be used, [`Error::Usage`] for layers
    /// on the CPU.
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
        let load = |device| self.load_device(&device, options.device_layers);
        match Device::open(ordinal).map_err(Error::from).and_then(load) {
            Ok(loaded) => self.tail = Tail::Cuda(loaded),
            // A defect is told, whatever was asked for.
            Err(e) if options.device == DeviceChoice::Auto && e.kind().is_unsupported() => {
                self.device_note = Some(e.to_string());
            }
            Err(e) => return Err(e),
        }
        Ok(self)
    }

    /// The GPU that computes, and which part; `None` for the CPU.
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

/// Compares tensors with their checksums, in parallel; returns whether it did.
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
