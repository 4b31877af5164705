//! AMX: products of 8-bit tiles of 16 rows of 64 bytes. The instructions are written in assembly,
//! because the compiler's intrinsics are not stable.

#[cfg(target_os = "linux")]
use std::arch::{
    asm,
    x86_64::{__cpuid, __cpuid_count},
};

use std::cell::Cell;
use std::marker::PhantomData;

use super::bytes::{TILE_COLS, TileLines, TileSums, TileUnit};

/// Whether the CPU has 8-bit tiles and Linux lets this process use them. A process has to request them, because
/// tiles enlarge the state of every thread.
#[cfg(target_os = "linux")]
pub(crate) fn detect() -> bool {
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    const SYS_ARCH_PRCTL: u64 = 158;
    let features = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
    let (tiles, int8) = (features >> 24 & 1 != 0, features >> 25 & 1 != 0);
    // OSXSAVE: the system saves extended state, so that XGETBV exists.
    let saved = __cpuid(1).ecx >> 27 & 1 != 0;
    if !(tiles && int8 && saved) {
        return false;
    }
    let state: u32;
    // SAFETY: XGETBV exists (checked above); it reads a register.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") state, out("edx") _, options(nomem, nostack));
    }
    if state >> 17 & 3 != 3 {
        return false;
    }
    let result: i64;
    // SAFETY: the system call changes what the kernel saves for this process and no memory; an old kernel
    // returns an error. `syscall` overwrites rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn detect() -> bool {
    false
}

/// Configures the tiles of this thread for [`AmxTiles::products`]: eight of 16 rows of 64 bytes.
///
/// # Safety
/// [`detect`] must have returned true in this process.
#[inline(always)]
unsafe fn configure() {
    #[repr(C, align(64))]
    struct Config {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    static CONFIG: Config = {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut tile = 0;
        while tile < 8 {
            row_bytes[tile] = 64;
            rows[tile] = 16;
            tile += 1;
        }
        Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
    };
    // SAFETY: the instruction exists by the caller's promise and reads the 64 bytes of `CONFIG`.
    unsafe {
        std::arch::asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly));
    }
}

/// Releases the tiles of this thread, so that the system no longer saves them.
///
/// # Safety
/// [`detect`] must have returned true in this process.
#[inline(always)]
unsafe fn release() {
    // SAFETY: the instruction exists by the caller's promise and touches no memory.
    unsafe { std::arch::asm!("tilerelease", options(nostack, nomem)) };
}

/// The proof that the tiles of this thread are configured. It is handed out by reference and is bound
/// to its thread, so that it exists only while [`with_tiles`] runs.
pub(crate) struct AmxTiles(PhantomData<*const ()>);

thread_local! {
    /// The number of calls of [`with_tiles`] that have not returned. The last one to return releases the tiles.
    static USERS: Cell<u32> = const { Cell::new(0) };
}

/// Releases the tiles when the last call of [`with_tiles`] ends, also by a panic.
struct ReleaseTiles;

impl Drop for ReleaseTiles {
    #[inline(always)]
    fn drop(&mut self) {
        USERS.set(USERS.get() - 1);
        if USERS.get() == 0 {
            // SAFETY: only `with_tiles` makes this value, where the instructions exist.
            unsafe { release() };
        }
    }
}

/// Calls `run` with the tiles of this thread configured.
///
/// # Safety
/// [`detect`] must have returned true in this process.
#[inline(always)]
pub(crate) unsafe fn with_tiles<R>(run: impl FnOnce(&AmxTiles) -> R) -> R {
    if USERS.get() == 0 {
        // SAFETY: the caller promises that `detect` has returned true.
        unsafe { configure() };
    }
    USERS.set(USERS.get() + 1);
    let _release = ReleaseTiles;
    run(&AmxTiles(PhantomData))
}

// Parts of `AmxTiles::row_products`. Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 activations.

macro_rules! zero_sums {
    () => {
        "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3"
    };
}

/// The products over 64 columns, which begin `$at` behind the start of the arrays, with 16 tokens.
macro_rules! sixteen_tokens {
    ($at:literal) => {
        concat!(
            "tileloadd tmm4, [{w0} + {line}",
            $at,
            "]\n",
            "tileloadd tmm6, [{x0} + {line}",
            $at,
            "]\n",
            "tdpbssd tmm0, tmm4, tmm6\n",
            "tileloadd tmm5, [{w1} + {line}",
            $at,
            "]\n",
            "tdpbssd tmm2, tmm5, tmm6 /* {x1} is not used */"
        )
    };
}

/// The same with 32 tokens.
macro_rules! thirty_two_tokens {
    ($at:literal) => {
        concat!(
            "tileloadd tmm4, [{w0} + {line}",
            $at,
            "]\n",
            "tileloadd tmm6, [{x0} + {line}",
            $at,
            "]\n",
            "tdpbssd tmm0, tmm4, tmm6\n",
            "tileloadd tmm7, [{x1} + {line}",
            $at,
            "]\n",
            "tdpbssd tmm1, tmm4, tmm7\n",
            "tileloadd tmm5, [{w1} + {line}",
            $at,
            "]\n",
            "tdpbssd tmm2, tmm5, tmm6\n",
            "tdpbssd tmm3, tmm5, tmm7"
        )
    };
}

macro_rules! store_sixteen {
    () => {
        "tilestored [{to} + {line}], tmm0\ntilestored [{to} + {line} + 2048], tmm2"
    };
}

macro_rules! store_thirty_two {
    () => {
        concat!(
            "tilestored [{to} + {line}], tmm0\ntilestored [{to} + {line} + 1024], tmm1\n",
            "tilestored [{to} + {line} + 2048], tmm2\ntilestored [{to} + {line} + 3072], tmm3"
        )
    };
}

impl TileUnit for AmxTiles {
    #[allow(
        clippy::multiple_unsafe_ops_per_block,
        reason = "one of two blocks runs, with one proof"
    )]
    #[inline(always)]
    fn products<const T: usize>(
        &self,
        w: [&[[u8; 64]; TILE_COLS / 4]; 2],
        x: &[[i8; TILE_COLS]; 32],
        to: &mut TileSums,
    ) {
        const { assert!(T == 1 || T == 2) };
        // Tiles 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
        //
        // SAFETY: the tiles are configured, as `self` proves. Loads of weights read 16 rows of 64
        // bytes, 64 apart, at the start and in the middle of arrays of 32 such rows. Loads of activations
        // read 64 bytes at columns 0 and 64 of 16 rows of 128 bytes, from row 0 or 16 of 32. Stores
        // write 16 rows of 64 bytes to the four arrays of `to`.
        unsafe {
            if T == 2 {
                std::arch::asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    "tileloadd tmm6, [{w0} + {line}]",
                    "tileloadd tmm4, [{x} + {wide}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w1} + {line}]",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{x} + {wide} + 2048]",
                    "tdpbssd tmm2, tmm5, tmm6",
                    "tdpbssd tmm3, tmm5, tmm7",
                    "tileloadd tmm6, [{w0} + {line} + 1024]",
                    "tileloadd tmm4, [{x} + {wide} + 64]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w1} + {line} + 1024]",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{x} + {wide} + 2112]",
                    "tdpbssd tmm2, tmm5, tmm6",
                    "tdpbssd tmm3, tmm5, tmm7",
                    "tilestored [{to} + {line}], tmm0",
                    "tilestored [{to} + {line} + 1024], tmm1",
                    "tilestored [{to} + {line} + 2048], tmm2",
                    "tilestored [{to} + {line} + 3072], tmm3",
                    w0 = in(reg) w[0].as_ptr(), w1 = in(reg) w[1].as_ptr(),
                    x = in(reg) x.as_ptr(), wide = in(reg) TILE_COLS,
                    line = in(reg) 64usize, to = in(reg) to.as_mut_ptr(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            } else {
                std::arch::asm!(
                    "tilezero tmm0", "tilezero tmm1",
                    "tileloadd tmm6, [{w0} + {line}]",
                    "tileloadd tmm4, [{x} + {wide}]",
                    "tdpbssd tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{w1} + {line}]",
                    "tdpbssd tmm1, tmm4, tmm7",
                    "tileloadd tmm6, [{w0} + {line} + 1024]",
                    "tileloadd tmm5, [{x} + {wide} + 64]",
                    "tdpbssd tmm0, tmm5, tmm6",
                    "tileloadd tmm7, [{w1} + {line} + 1024]",
                    "tdpbssd tmm1, tmm5, tmm7",
                    "tilestored [{to} + {line}], tmm0",
                    "tilestored [{to} + {line} + 1024], tmm1",
                    w0 = in(reg) w[0].as_ptr(), w1 = in(reg) w[1].as_ptr(),
                    x = in(reg) x.as_ptr(), wide = in(reg) TILE_COLS,
                    line = in(reg) 64usize, to = in(reg) to.as_mut_ptr(),
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _,
                    out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }

    #[allow(
        clippy::multiple_unsafe_ops_per_block,
        reason = "one of four blocks runs, with one proof"
    )]
    #[inline(always)]
    fn row_products<const T: usize, const H: usize>(
        &self,
        w: [&[TileLines; H]; 2],
        x: [&[TileLines; H]; 2],
        to: &mut TileSums,
    ) {
        const { assert!((T == 1 || T == 2) && (H == 1 || H == 2)) };
        macro_rules! product {
            ($($lines:expr),*) => {
                std::arch::asm!(
                    $($lines,)*
                    w0 = in(reg) w[0].as_ptr(), w1 = in(reg) w[1].as_ptr(),
                    x0 = in(reg) x[0].as_ptr(), x1 = in(reg) x[1].as_ptr(),
                    line = in(reg) 64usize, to = in(reg) to.as_mut_ptr(),
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        // SAFETY: the tiles are configured, as `self` proves. Loads read 16 rows of 64 bytes, 64 apart, at the
        // start of an array of `H` such tiles and, if `H` is 2, of its second tile. Stores write 16 rows of 64
        // bytes to the four arrays of `to`.
        unsafe {
            match (T, H) {
                (1, 1) => product!(zero_sums!(), sixteen_tokens!(""), store_sixteen!()),
                (1, _) => product!(
                    zero_sums!(),
                    sixteen_tokens!(""),
                    sixteen_tokens!(" + 1024"),
                    store_sixteen!()
                ),
                (_, 1) => product!(zero_sums!(), thirty_two_tokens!(""), store_thirty_two!()),
                _ => product!(
                    zero_sums!(),
                    thirty_two_tokens!(""),
                    thirty_two_tokens!(" + 1024"),
                    store_thirty_two!()
                ),
            }
        }
    }
}
