//! The list of all modules.

use super::compile::Compiler;
use super::error::Result;
use super::image::Arch;
use super::module::Module;
use super::{activations, attention, encoding, gemm, hessian, mixed_rows, top_k};

/// All modules.
#[must_use]
pub fn modules() -> Vec<Module> {
    let mut all = vec![activations::MODULE, top_k::MODULE, hessian::MODULE, gemm::PREPARE];
    all.push(mixed_rows::MODULE);
    all.extend(attention::MODULES);
    all.extend(encoding::modules());
    all
}

/// The log of the assembler for one module, with the registers and spills of its kernels.
#[derive(Clone, Debug)]
pub struct ModuleLog {
    /// The name of the module.
    pub module: String,
    /// The log.
    pub log: String,
}

/// Compiles every module for `arch`, without a cache and without a device.
///
/// # Errors
/// [`super::Error::Compiler`] if NVRTC is not installed, [`super::Error::Compile`] for the first
/// module that fails.
pub fn compile_all(arch: Arch) -> Result<Vec<ModuleLog>> {
    let compiler = Compiler::new(0).with_cache(None);
    let compile = |module: &Module| {
        let log = compiler.compile(module, arch)?.log;
        Ok(ModuleLog { module: module.name(), log })
    };
    modules().iter().map(compile).collect()
}
