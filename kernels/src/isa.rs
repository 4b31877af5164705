//! The instruction set to use: detected once, or chosen by `STB_ISA`.

use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use crate::cpu::arch::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use crate::cpu::arch::avx512::{self, Avx512};
use crate::cpu::arch::bytes::{Bytes, Task};
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
use crate::cpu::arch::neon::Neon;
use crate::cpu::arch::scalar::Scalar;

/// An instruction set that this machine supports. Values exist only for supported sets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Isa(InstructionSet);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum InstructionSet {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<{ avx512::BASE }>),
    #[cfg(target_arch = "x86_64")]
    Avx512Vbmi(Avx512<{ avx512::VBMI }>),
    #[cfg(target_arch = "x86_64")]
    Avx512Amx(Avx512<{ avx512::AMX }>),
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    Neon(Neon<false>),
    #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
    NeonDotprod(Neon<true>),
}

/// `STB_ISA` names a set that does not exist or that this machine lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsaError {
    requested: String,
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Isa::available().map(Isa::name).collect();
        write!(
            f,
            "STB_ISA={} is not available on this machine; use one of: {}",
            self.requested.escape_debug(),
            names.join(", ")
        )
    }
}

impl std::error::Error for IsaError {}

impl Isa {
    /// The set that `STB_ISA` names, else the best one. The variable is read once per process.
    ///
    /// # Errors
    /// If `STB_ISA` names a set that is unknown or not supported here.
    pub fn detect() -> Result<Self, IsaError> {
        static CHOICE: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        let choose = || match std::env::var("STB_ISA") {
            Ok(name) if !name.is_empty() => {
                Self::available().find(|isa| isa.name() == name).ok_or(IsaError { requested: name })
            }
            _ => Ok(Self::available().next().unwrap_or(Self::scalar())),
        };
        CHOICE.get_or_init(choose).clone()
    }

    /// The portable code, which runs everywhere.
    #[must_use]
    pub fn scalar() -> Self {
        Self(InstructionSet::Scalar)
    }

    /// All sets of this machine, best first.
    pub fn available() -> impl Iterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let simd = [
            Avx512::detect().map(InstructionSet::Avx512Amx),
            Avx512::detect().map(InstructionSet::Avx512Vbmi),
            Avx512::detect().map(InstructionSet::Avx512),
            Avx2::detect().map(InstructionSet::Avx2),
        ];
        #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
        let simd = [
            Neon::detect().map(InstructionSet::NeonDotprod),
            Neon::detect().map(InstructionSet::Neon),
        ];
        #[cfg(not(any(
            target_arch = "x86_64",
            all(target_arch = "aarch64", target_endian = "little")
        )))]
        let simd: [Option<InstructionSet>; 0] = [];
        simd.into_iter().flatten().chain([InstructionSet::Scalar]).map(Self)
    }

    /// The name, as in `STB_ISA`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            InstructionSet::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Vbmi(_) => "avx512vbmi",
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Amx(_) => "avx512amx",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            InstructionSet::Neon(_) => "neon",
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            InstructionSet::NeonDotprod(_) => "neon-dotprod",
        }
    }

    /// Calls `f` compiled for this set: loops that are inlined into it use its vectors, so the closure and
    /// everything it calls should be `#[inline(always)]`. All sets give the same results, because the compiler
    /// neither reorders nor fuses operations on floats.
    pub fn compiled<R>(self, f: impl FnOnce() -> R) -> R {
        self.run(PlainTask(f))
    }

    /// Runs `task` with the vector operations of this set.
    #[inline]
    pub(crate) fn run<T: Task>(self, task: T) -> T::Output {
        match self.0 {
            InstructionSet::Scalar => Scalar.enter(task),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2(s) => s.enter(task),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512(s) => s.enter(task),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Vbmi(s) => s.enter(task),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Amx(s) => s.enter(task),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            InstructionSet::Neon(s) => s.enter(task),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            InstructionSet::NeonDotprod(s) => s.enter(task),
        }
    }
}

/// Code without explicit vectors.
struct PlainTask<F>(F);

impl<R, F: FnOnce() -> R> Task for PlainTask<F> {
    type Output = R;

    #[inline(always)]
    fn run<S: Bytes>(self, _: S) -> R {
        (self.0)()
    }
}
