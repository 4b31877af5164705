//! Compiles kernel sources to images for one architecture.

use std::sync::OnceLock;

use super::error::{Error, OLDEST, Result};
use super::image::{Arch, Image};
use super::image_cache::{ImageCache, ImageKey};
use super::module::{COMMON_HEADERS, Header, Module};
use super::nvrtc::Nvrtc;

/// NVRTC with the cache of its images. NVRTC (150 MB) is loaded only if an image is not in the cache.
#[derive(Debug)]
pub struct Compiler {
    nvrtc: OnceLock<Result<Nvrtc>>,
    cache: Option<ImageCache>,
    /// The newest major version of CUDA whose images the driver accepts; 0 for any.
    newest: u32,
}

impl Compiler {
    /// A compiler for a driver of CUDA `newest` (major number; 0 for any) with the user's cache.
    #[must_use]
    pub fn new(newest: u32) -> Self {
        Self { nvrtc: OnceLock::new(), cache: ImageCache::of_user(), newest }
    }

    /// This compiler with its cache in another folder, or without a cache.
    #[must_use]
    pub fn with_cache(self, folder: Option<&std::path::Path>) -> Self {
        Self { cache: folder.map(|f| ImageCache::new(f.to_owned())), ..self }
    }

    /// The folder of the cache.
    #[must_use]
    pub fn cache_folder(&self) -> Option<&std::path::Path> {
        self.cache.as_ref().map(ImageCache::folder)
    }

    /// The loaded NVRTC.
    ///
    /// # Errors
    /// [`Error::Compiler`] if it is not installed.
    pub fn nvrtc(&self) -> Result<&Nvrtc> {
        self.nvrtc.get_or_init(|| Nvrtc::load(self.newest)).as_ref().map_err(Error::clone)
    }

    /// The image of `module` for `arch`, from the cache or compiled.
    pub(super) fn image(&self, module: &Module, arch: Arch) -> Result<Image> {
        let image = |key, bytes, is_ptx| Image { bytes, is_ptx, log: String::new(), key };
        let cached = |key| self.cache.as_ref().and_then(|cache| cache.get(key));
        // The version of NVRTC is not part of this key: a program that finds its images needs no
        // compiler, and loading one takes longer than the rest of the start.
        let key = self.key(module, arch, "");
        if let Some(bytes) = cached(key) {
            return Ok(image(key, bytes, false));
        }
        // An NVRTC older than the device makes PTX, and a newer one better code: this key includes the
        // version.
        let ptx_key = self.key(module, arch, &format!("{:?}", self.nvrtc()?.version()));
        if let Some(bytes) = cached(ptx_key) {
            return Ok(image(ptx_key, bytes, true));
        }
        let mut image = self.compile(module, arch)?;
        image.key = if image.is_ptx { ptx_key } else { key };
        if let Some(cache) = &self.cache {
            // Without a cache the kernels are compiled again next time.
            let _ = cache.put(image.key, &image.bytes);
        }
        Ok(image)
    }

    /// Compiles `module` without the cache.
    pub(super) fn compile(&self, module: &Module, arch: Arch) -> Result<Image> {
        let nvrtc = self.nvrtc()?;
        // An NVRTC older than the device compiles PTX for the newest architecture that it knows.
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
        let name = module.name();
        let mut options = options(module);
        options.push(format!("--gpu-architecture={target}"));
        let compiled = nvrtc
            .compile(&name, module.source, &headers(module), &options, is_ptx)
            .map_err(|log| Error::Compile { module: name, arch: target, log })?;
        Ok(Image { bytes: compiled.image, is_ptx, log: compiled.log, key: 0 })
    }

    /// Removes an image that the driver rejected from the cache.
    pub(super) fn forget(&self, image: &Image) {
        if let Some(cache) = &self.cache {
            cache.remove(image.key);
        }
    }

    fn key(&self, module: &Module, arch: Arch, version: &str) -> u128 {
        let mut key = ImageKey::default();
        headers(module).iter().for_each(|header| key.add(header.text));
        key.add(module.source);
        options(module).iter().for_each(|o| key.add(o));
        key.add(&format!("{arch} {}", self.newest));
        key.add(version);
        key.value()
    }
}

fn headers(module: &Module) -> Vec<Header> {
    [COMMON_HEADERS, module.headers].concat()
}

fn options(module: &Module) -> Vec<String> {
    let fixed = ["-std=c++17", "-default-device", "--ptxas-options=-v"];
    let defines = module.defines().into_iter().map(|d| format!("-D{d}"));
    fixed.iter().map(|o| (*o).to_owned()).chain(defines).collect()
}
