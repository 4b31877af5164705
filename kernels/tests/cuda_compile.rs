//! Checks that all CUDA kernels compile for every generation of GPUs without arrays in local memory, and prints
//! the registers and spilled bytes of each. `tests/cuda.sh` installs the compiler and runs this test, which
//! takes minutes. It is skipped elsewhere.

use std::io::Write as _;
use std::{env, thread};

use stb_kernels::cuda::{Arch, ModuleLog, compile_all};

/// Ampere, Ada, Hopper, Blackwell.
const ARCHITECTURES: [u32; 4] = [80, 89, 90, 120];

/// Bytes that may be spilled: a few registers outside the loops, not an array.
const SPILLED: u32 = 64;

/// The assembler's report on the kernels of a module: name, registers, bytes of spills.
fn kernels(log: &str) -> Vec<(String, u32, u32)> {
    let number = |line: &str, before: &str| -> Option<u32> {
        let end = line.find(before)?;
        line[..end].split_whitespace().next_back()?.parse().ok()
    };
    let mut found: Vec<(String, u32, u32)> = Vec::new();
    for line in log.lines() {
        if line.contains("Compiling entry function") {
            let name = line.split('\'').nth(1).unwrap_or_default();
            found.push((name.to_owned(), 0, 0));
        }
        let Some(last) = found.last_mut() else { continue };
        last.1 = number(line, " registers").unwrap_or(last.1);
        last.2 = number(line, " bytes spill stores").unwrap_or(last.2);
    }
    found
}

#[test]
fn all_kernels_compile_for_all_architectures() {
    let mut out = std::io::stderr();
    if env::var_os("STB_REQUIRE_NVRTC").is_none() {
        writeln!(out, "skipped: tests/cuda.sh compiles the CUDA kernels").unwrap();
        return;
    }
    let compilers = ARCHITECTURES.map(|arch| thread::spawn(move || compile_all(Arch(arch))));
    let results = compilers.map(|t| t.join().expect("the compiler does not panic"));
    for (arch, result) in ARCHITECTURES.into_iter().zip(results) {
        for ModuleLog { module, log } in result.expect("kernels compile") {
            let kernels = kernels(&log);
            assert!(!kernels.is_empty(), "{module} for {}: what is in\n{log}", Arch(arch));
            for (kernel, registers, spilled) in kernels {
                let arch = Arch(arch);
                let name = format!("{module} {kernel}");
                writeln!(
                    out,
                    "{arch:>8}  {name:<32} {registers:>3} registers, {spilled:>2} bytes spilled"
                )
                .unwrap();
                assert!(spilled <= SPILLED, "{module}: {kernel} for {arch} spills registers");
            }
        }
    }
}
