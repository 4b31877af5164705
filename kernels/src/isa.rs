//! Which instruction set to use: detected once, or forced by `STB_ISA`.

use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::cpu::avx512::{self, Avx512};
use crate::cpu::{Bytes, Simd, scalar::Scalar};

/// An instruction set that this machine supports. Values exist only for supported sets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Isa(Kind);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(crate::cpu::avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<{ avx512::BASE }>),
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi(Avx512<{ avx512::VBMI }>),
    #[cfg(target_arch = "x86_64")]
    Avx512Amx(Avx512<{ avx512::AMX }>),
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon(crate::cpu::neon::Neon<false>),
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    NeonDotprod(crate::cpu::neon::Neon<true>),
}

/// `STB_ISA` names a set that does not exist or that this machine lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsaError {
    asked: String,
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Isa::available().map(Isa::name).collect();
        write!(
            f,
            "STB_ISA={} is not available on this machine; use one of: {}",
            self.asked.escape_debug(),
            names.join(", ")
        )
    }
}

impl std::error::Error for IsaError {}

impl Isa {
    /// The set to use: the one `STB_ISA` names, else the best. Read once per process.
    ///
    /// # Errors
    /// If `STB_ISA` names a set that is unknown or not supported here.
    pub fn detect() -> Result<Self, IsaError> {
        static CHOICE: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        let choose = || match std::env::var("STB_ISA") {
            Ok(name) if !name.is_empty() => {
                Self::available().find(|isa| isa.name() == name).ok_or(IsaError { asked: name })
            }
            _ => Ok(Self::available().next().unwrap_or(Self::scalar())),
        };
        CHOICE.get_or_init(choose).clone()
    }

    /// The portable code, which runs everywhere.
    #[must_use]
    pub fn scalar() -> Self {
        Self(Kind::Scalar)
    }

    /// All sets of this machine, best first.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let simd = [
            Avx512::detect().map(Kind::Avx512Amx),
            Avx512::detect().map(Kind::Avx512Vbmi),
            Avx512::detect().map(Kind::Avx512),
            crate::cpu::avx2::Avx2::detect().map(Kind::Avx2),
        ];
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        let simd = [
            crate::cpu::neon::Neon::detect().map(Kind::NeonDotprod),
            crate::cpu::neon::Neon::detect().map(Kind::Neon),
        ];
        #[cfg(not(any(
            target_arch = "x86_64",
            all(target_arch = "aarch64", target_endian = "little")
        )))]
        let simd: [Option<Kind>; 0] = [];
        simd.into_iter().flatten().chain([Kind::Scalar]).map(Self)
    }

    /// The name that `STB_ISA` takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vbmi(_) => "avx512vbmi",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Amx(_) => "avx512amx",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Kind::Neon(_) => "neon",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Kind::NeonDotprod(_) => "neon-dotprod",
        }
    }

    /// Calls `f`, compiled for this set: loops that are inlined into it (a closure, and what it calls,
    /// says `#[inline(always)]`) use its vectors. Results are those of any other set, as the compiler
    /// neither reorders nor fuses operations on floats.
    pub fn compiled<R>(self, f: impl FnOnce() -> R) -> R {
        self.run(Plain(f))
    }

    /// Runs `task` with the vector operations of this set.
    #[inline]
    pub(crate) fn run<T: Task>(self, task: T) -> T::Output {
        match self.0 {
            Kind::Scalar => Scalar.enter(task),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(s) => s.enter(task),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(s) => s.enter(task),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Vbmi(s) => s.enter(task),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Amx(s) => s.enter(task),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Kind::Neon(s) => s.enter(task),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Kind::NeonDotprod(s) => s.enter(task),
        }
    }
}

/// Code without explicit vectors.
struct Plain<F>(F);

impl<R, F: FnOnce() -> R> Task for Plain<F> {
    type Output = R;

    #[inline(always)]
    fn run<S: Bytes>(self, _: S) -> R {
        (self.0)()
    }
}

/// A computation written once for all instruction sets.
pub(crate) trait Task {
    /// What it returns.
    type Output;

    /// The computation. `#[inline(always)]` in every implementation, and so is what it calls: only
    /// code inlined into the entry of an instruction set is compiled for that set.
    fn run<S: Bytes>(self, s: S) -> Self::Output;
}
