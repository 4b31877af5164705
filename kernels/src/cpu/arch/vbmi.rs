//! Look-ups of 64 bytes for 8 tokens and their sums, in assembly: from intrinsics, the compiler schedules all
//! look-ups first and then lacks registers for their results.

use std::arch::x86_64::*;

/// Adds to `acc` the sums of the bytes that `$look` finds by `index` in each of 8 tables. `$zero` clears the
/// destination register first.
macro_rules! sums_of {
    ($look:literal, $acc:ident, $tables:ident, $index:ident $(, $zero:literal)?) => {{
        let mut acc: [__m512i; 8] = $acc;
        let tables: &[[u8; 64]; 8] = $tables;
        let (one, mut _found) = (_mm512_set1_epi8(1), [_mm512_setzero_si512(); 2]);
        // SAFETY: reads the 512 bytes behind the reference, at any alignment, and changes registers
        // only; the enclosing function is compiled for the instructions.
        unsafe {
            std::arch::asm!(
                $(concat!($zero, " {t0}, {t0}, {t0}"),)?
                concat!($look, " {t0}, {i}, [{p} + 0]"),
                "vpdpbusd {a0}, {one}, {t0}",
                $(concat!($zero, " {t1}, {t1}, {t1}"),)?
                concat!($look, " {t1}, {i}, [{p} + 64]"),
                "vpdpbusd {a1}, {one}, {t1}",
                $(concat!($zero, " {t0}, {t0}, {t0}"),)?
                concat!($look, " {t0}, {i}, [{p} + 128]"),
                "vpdpbusd {a2}, {one}, {t0}",
                $(concat!($zero, " {t1}, {t1}, {t1}"),)?
                concat!($look, " {t1}, {i}, [{p} + 192]"),
                "vpdpbusd {a3}, {one}, {t1}",
                $(concat!($zero, " {t0}, {t0}, {t0}"),)?
                concat!($look, " {t0}, {i}, [{p} + 256]"),
                "vpdpbusd {a4}, {one}, {t0}",
                $(concat!($zero, " {t1}, {t1}, {t1}"),)?
                concat!($look, " {t1}, {i}, [{p} + 320]"),
                "vpdpbusd {a5}, {one}, {t1}",
                $(concat!($zero, " {t0}, {t0}, {t0}"),)?
                concat!($look, " {t0}, {i}, [{p} + 384]"),
                "vpdpbusd {a6}, {one}, {t0}",
                $(concat!($zero, " {t1}, {t1}, {t1}"),)?
                concat!($look, " {t1}, {i}, [{p} + 448]"),
                "vpdpbusd {a7}, {one}, {t1}",
                p = in(reg) tables.as_ptr(),
                i = in(zmm_reg) $index,
                one = in(zmm_reg) one,
                t0 = out(zmm_reg) _found[0],
                t1 = out(zmm_reg) _found[1],
                a0 = inout(zmm_reg) acc[0],
                a1 = inout(zmm_reg) acc[1],
                a2 = inout(zmm_reg) acc[2],
                a3 = inout(zmm_reg) acc[3],
                a4 = inout(zmm_reg) acc[4],
                a5 = inout(zmm_reg) acc[5],
                a6 = inout(zmm_reg) acc[6],
                a7 = inout(zmm_reg) acc[7],
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        acc
    }};
}

/// `acc[k]` plus sums of four bytes each that `index` looks up in table k.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
pub(super) fn add_lookups(
    acc: [__m512i; 8],
    tables: &[[u8; 64]; 8],
    index: __m512i,
) -> [__m512i; 8] {
    sums_of!("vpermb", acc, tables, index)
}

/// [`add_lookups`] with zero for each index whose bit 6 is clear.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,avx512vnni")]
pub(super) fn add_lookups_or_zero(
    acc: [__m512i; 8],
    tables: &[[u8; 64]; 8],
    index: __m512i,
) -> [__m512i; 8] {
    sums_of!("vpermt2b", acc, tables, index, "vpxord")
}
