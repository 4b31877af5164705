//! From the kernels' source to an image for one architecture.

use std::fmt;
use std::sync::OnceLock;

use super::cache::{Cache, Key};
use super::nvrtc::Nvrtc;
use super::{Error, OLDEST, Result};

/// Text that kernels include.
const HEADERS: &[(&str, &str)] = &[
    ("attention.cuh", include_str!("../../cuda/attention.cuh")),
    ("common.cuh", include_str!("../../cuda/common.cuh")),
    ("codec.cuh", include_str!("../../cuda/codec.cuh")),
    ("gemm.cuh", include_str!("../../cuda/gemm.cuh")),
    ("gemm_nm.cuh", include_str!("../../cuda/gemm_nm.cuh")),
    ("ptx.cuh", include_str!("../../cuda/ptx.cuh")),
];

/// A source with its definitions: what is compiled and loaded as one. Modules are small, so that a model
/// compiles only what it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Module {
    /// For messages.
    pub name: &'static str,
    /// Its file in `kernels/cuda`.
    pub file: &'static str,
    pub(super) source: &'static str,
    /// Macros, as NAME=VALUE.
    pub defines: &'static [&'static str],
}

macro_rules! module {
    ($name:literal, $file:literal $(, $define:literal)*) => {
        Module {
            name: $name,
            file: $file,
            source: include_str!(concat!("../../cuda/", $file)),
            defines: &[$($define),*],
        }
    };
}

impl Module {
    pub(super) const OPS: Self = module!("ops", "ops.cu");
    pub(super) const CANDIDATES: Self = module!("candidates", "candidates.cu");
    pub(super) const MOMENTS: Self = module!("moments", "moments.cu");
    pub(super) const NM_1_8: Self = module!("nm 1:8", "gemv_nm.cu", "NM_N=1", "NM_M=8");
    pub(super) const NM_1_4: Self = module!("nm 1:4", "gemv_nm.cu", "NM_N=1", "NM_M=4");
    pub(super) const NM_2_8: Self = module!("nm 2:8", "gemv_nm.cu", "NM_N=2", "NM_M=8");
    pub(super) const NM_2_4: Self = module!("nm 2:4", "gemv_nm.cu", "NM_N=2", "NM_M=4");
    pub(super) const F32: Self = module!("f32", "gemv.cu", "CODEC=DenseF32");
    pub(super) const F16: Self = module!("f16", "gemv.cu", "CODEC=DenseF16");
    pub(super) const BF16: Self = module!("bf16", "gemv.cu", "CODEC=DenseBf16");
    pub(super) const INT1: Self = module!("int1", "gemv.cu", "CODEC=Int1");
    pub(super) const INT2: Self = module!("int2", "gemv.cu", "CODEC=Int2");
    pub(super) const INT3: Self = module!("int3", "gemv.cu", "CODEC=Int3");
    pub(super) const INT4: Self = module!("int4", "gemv.cu", "CODEC=Int4");
    pub(super) const INT8: Self = module!("int8", "gemv.cu", "CODEC=Int8");
    pub(super) const STBLLM: Self = module!("stbllm", "gemv.cu", "CODEC=Stbllm");
    pub(super) const ATTENTION_F32: Self = module!("attention f32", "attention.cu", "KV=KvF32");
    pub(super) const ATTENTION_F16: Self = module!("attention f16", "attention.cu", "KV=KvF16");
    pub(super) const ATTENTION_Q8: Self = module!("attention q8", "attention.cu", "KV=KvQ8");
    pub(super) const ATTENTION_MANY_F16: Self =
        module!("attention many f16", "attention_many.cu", "KV=KvF16");
    pub(super) const ATTENTION_MANY_Q8: Self =
        module!("attention many q8", "attention_many.cu", "KV=KvQ8");
    pub(super) const GEMM_PREPARE: Self = module!("gemm activations", "gemm_prepare.cu");
    pub(super) const GEMM_NM_1_8: Self = module!("gemm 1:8", "gemm_nm.cu", "NM_N=1", "NM_M=8");
    pub(super) const GEMM_NM_1_4: Self = module!("gemm 1:4", "gemm_nm.cu", "NM_N=1", "NM_M=4");
    pub(super) const GEMM_NM_2_8: Self = module!("gemm 2:8", "gemm_nm.cu", "NM_N=2", "NM_M=8");
    pub(super) const GEMM_NM_2_4: Self = module!("gemm 2:4", "gemm_nm.cu", "NM_N=2", "NM_M=4");
    pub(super) const GEMM_NM_S8_1_8: Self =
        module!("gemm s8 1:8", "gemm_nm_s8.cu", "NM_N=1", "NM_M=8");
    pub(super) const GEMM_NM_S8_1_4: Self =
        module!("gemm s8 1:4", "gemm_nm_s8.cu", "NM_N=1", "NM_M=4");
    pub(super) const GEMM_NM_S8_2_8: Self =
        module!("gemm s8 2:8", "gemm_nm_s8.cu", "NM_N=2", "NM_M=8");
    pub(super) const GEMM_NM_S8_2_4: Self =
        module!("gemm s8 2:4", "gemm_nm_s8.cu", "NM_N=2", "NM_M=4");
    pub(super) const GEMM_F32: Self = module!("gemm f32", "gemm_rows.cu", "CODEC=DenseF32");
    pub(super) const GEMM_F16: Self = module!("gemm f16", "gemm_rows.cu", "CODEC=DenseF16");
    pub(super) const GEMM_BF16: Self = module!("gemm bf16", "gemm_rows.cu", "CODEC=DenseBf16");
    pub(super) const GEMM_INT1: Self = module!("gemm int1", "gemm_rows.cu", "CODEC=Int1");
    pub(super) const GEMM_INT2: Self = module!("gemm int2", "gemm_rows.cu", "CODEC=Int2");
    pub(super) const GEMM_INT3: Self = module!("gemm int3", "gemm_rows.cu", "CODEC=Int3");
    pub(super) const GEMM_INT4: Self = module!("gemm int4", "gemm_rows.cu", "CODEC=Int4");
    pub(super) const GEMM_INT8: Self = module!("gemm int8", "gemm_rows.cu", "CODEC=Int8");
    pub(super) const GEMM_STBLLM: Self = module!("gemm stbllm", "gemm_rows.cu", "CODEC=Stbllm");

    /// All modules.
    pub const ALL: &[Self] = &[
        Self::OPS,
        Self::CANDIDATES,
        Self::MOMENTS,
        Self::NM_1_8,
        Self::NM_1_4,
        Self::NM_2_8,
        Self::NM_2_4,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::INT1,
        Self::INT2,
        Self::INT3,
        Self::INT4,
        Self::INT8,
        Self::STBLLM,
        Self::ATTENTION_F32,
        Self::ATTENTION_F16,
        Self::ATTENTION_Q8,
        Self::ATTENTION_MANY_F16,
        Self::ATTENTION_MANY_Q8,
        Self::GEMM_PREPARE,
        Self::GEMM_NM_1_8,
        Self::GEMM_NM_1_4,
        Self::GEMM_NM_2_8,
        Self::GEMM_NM_2_4,
        Self::GEMM_NM_S8_1_8,
        Self::GEMM_NM_S8_1_4,
        Self::GEMM_NM_S8_2_8,
        Self::GEMM_NM_S8_2_4,
        Self::GEMM_F32,
        Self::GEMM_F16,
        Self::GEMM_BF16,
        Self::GEMM_INT1,
        Self::GEMM_INT2,
        Self::GEMM_INT3,
        Self::GEMM_INT4,
        Self::GEMM_INT8,
        Self::GEMM_STBLLM,
    ];
}

/// An architecture of GPUs: 80 for compute capability 8.0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Arch(pub u32);

impl Arch {
    /// From 9.0 on, code with the features of this one architecture (`wgmma`, block-scaled `mma`).
    fn suffix(self) -> &'static str {
        if self.0 >= 90 { "a" } else { "" }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.0, self.suffix())
    }
}

/// An image that the driver loads.
pub(super) struct Image {
    pub bytes: Vec<u8>,
    /// PTX, which the driver compiles; else a CUBIN.
    pub is_ptx: bool,
    /// What the compiler says, resources of kernels among it; empty if it was not asked.
    pub log: String,
    key: u128,
}

/// NVRTC and the cache of what it has made. NVRTC (150 MB) is loaded when something is not in the
/// cache.
#[derive(Debug)]
pub struct Compiler {
    nvrtc: OnceLock<Result<Nvrtc>>,
    cache: Option<Cache>,
    /// The newest major version of CUDA whose images the driver takes; 0 for any.
    newest: u32,
}

impl Compiler {
    /// A compiler for a driver of CUDA `newest` (major number; 0 for any) with the user's cache.
    #[must_use]
    pub fn new(newest: u32) -> Self {
        Self { nvrtc: OnceLock::new(), cache: Cache::of_user(), newest }
    }

    /// The same without a cache, or with one in another folder.
    #[must_use]
    pub fn with_cache(self, folder: Option<&std::path::Path>) -> Self {
        Self { cache: folder.map(|f| Cache::new(f.to_owned())), ..self }
    }

    /// The folder of the cache.
    #[must_use]
    pub fn cache_folder(&self) -> Option<&std::path::Path> {
        self.cache.as_ref().map(Cache::folder)
    }

    /// The compiler itself.
    ///
    /// # Errors
    /// [`Error::Compiler`] if it is not installed.
    pub fn nvrtc(&self) -> Result<&Nvrtc> {
        self.nvrtc.get_or_init(|| Nvrtc::load(self.newest)).as_ref().map_err(Error::clone)
    }

    /// `module` for `arch`, from the cache or compiled.
    pub(super) fn image(&self, module: &Module, arch: Arch) -> Result<Image> {
        let image = |key, bytes, is_ptx| Image { bytes, is_ptx, log: String::new(), key };
        let cached = |key| self.cache.as_ref().and_then(|cache| cache.get(key));
        // NVRTC's version is no part of this key: a program that finds its images needs no compiler,
        // and loading it takes longer than everything else at start.
        let key = self.key(module, arch, "");
        if let Some(bytes) = cached(key) {
            return Ok(image(key, bytes, false));
        }
        // PTX is what an NVRTC makes that is older than the device: a newer one does better.
        let ptx_key = self.key(module, arch, &format!("{:?}", self.nvrtc()?.version()));
        if let Some(bytes) = cached(ptx_key) {
            return Ok(image(ptx_key, bytes, true));
        }
        let mut image = self.compile(module, arch)?;
        image.key = if image.is_ptx { ptx_key } else { key };
        if let Some(cache) = &self.cache {
            // A cache that cannot be written costs the time to compile, nothing else.
            let _ = cache.put(image.key, &image.bytes);
        }
        Ok(image)
    }

    /// Compiles without looking into the cache.
    pub(super) fn compile(&self, module: &Module, arch: Arch) -> Result<Image> {
        let nvrtc = self.nvrtc()?;
        // An NVRTC older than the device: code for the newest architecture it knows, as PTX.
        let known = nvrtc.architectures()?;
        let is_ptx = !known.contains(&arch.0);
        let newest = known.iter().copied().filter(|a| *a <= arch.0).max();
        let oldest = OLDEST.0 * 10 + OLDEST.1;
        let target = match newest {
            Some(known) if is_ptx && known >= oldest => format!("compute_{known}"),
            Some(_) if !is_ptx => arch.to_string(),
            _ => {
                let (major, minor) = nvrtc.version();
                let why =
                    format!("NVRTC {major}.{minor} has no code for {arch}: install a newer one");
                return Err(Error::Compiler { why });
            }
        };
        let mut options = options(module);
        options.push(format!("--gpu-architecture={target}"));
        let compiled = nvrtc
            .compile(module.name, module.source, HEADERS, &options, is_ptx)
            .map_err(|log| Error::Compile { module: module.name.into(), arch: target, log })?;
        Ok(Image { bytes: compiled.image, is_ptx, log: compiled.log, key: 0 })
    }

    /// The driver has not taken the image: it is not to be used again.
    pub(super) fn forget(&self, image: &Image) {
        if let Some(cache) = &self.cache {
            cache.remove(image.key);
        }
    }

    fn key(&self, module: &Module, arch: Arch, version: &str) -> u128 {
        let mut key = Key::default();
        HEADERS.iter().for_each(|(_, text)| key.add(text));
        key.add(module.source);
        options(module).iter().for_each(|o| key.add(o));
        key.add(&format!("{arch} {}", self.newest));
        key.add(version);
        key.value()
    }
}

fn options(module: &Module) -> Vec<String> {
    let fixed = ["-std=c++17", "-default-device", "--ptxas-options=-v"];
    let defines = module.defines.iter().map(|d| format!("-D{d}"));
    fixed.iter().map(|o| (*o).to_owned()).chain(defines).collect()
}

/// Compiles every module for `arch` without cache and device: (module, log of the assembler with
/// registers and spills).
///
/// # Errors
/// [`Error::Compiler`] if NVRTC is not installed, [`Error::Compile`] for the first module that fails.
pub fn compile_all(arch: Arch) -> Result<Vec<(&'static str, String)>> {
    let compiler = Compiler::new(0).with_cache(None);
    let compile = |module: &Module| Ok((module.name, compiler.compile(module, arch)?.log));
    Module::ALL.iter().map(compile).collect()
}
