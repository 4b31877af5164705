//! The emulator of CUDA kernels: its matrix instructions against naive products with the index formulas of the
//! PTX ISA, its built-in functions, and the misuse that it has to detect.

mod common;

use std::sync::OnceLock;

use common::emulator::{Emulator, Launch, bytes_of, floats};

use stb_format::half::f16;
use stb_random::Rng;

const KERNELS: [&str; 21] = [
    "run_mma_f16",
    "run_mma_bf16",
    "run_mma_s8",
    "run_mma_sp_f16_0",
    "run_mma_sp_f16_1",
    "run_mma_sp_bf16_0",
    "run_mma_sp_bf16_1",
    "run_mma_sp_s8",
    "row_sums",
    "missing_barrier",
    "divergent_barrier",
    "lanes_that_stay_away",
    "absent_lane",
    "barrier_nobody_reaches",
    "beyond_global",
    "beyond_shared",
    "misaligned",
    "early_read",
    "copies",
    "conversions",
    "words",
];

fn emulator() -> Option<&'static Emulator> {
    static BUILT: OnceLock<Option<Emulator>> = OnceLock::new();
    let checks = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/emulator/checks.cu");
    BUILT.get_or_init(|| Emulator::build(&[checks], &KERNELS, &[]).unwrap()).as_ref()
}

#[derive(Clone, Copy, PartialEq)]
enum Type {
    F16,
    Bf16,
    S8,
}

/// The bits of a small integer, exact in every type.
fn encode(kind: Type, v: i32) -> u32 {
    match kind {
        Type::F16 => u32::from(f16::from_f32(v as f32).to_bits()),
        Type::Bf16 => (v as f32).to_bits() >> 16,
        Type::S8 => u32::from(v as i8 as u8),
    }
}

/// Puts element `i` of a lane's fragment into its registers, the first in the lowest bits.
fn put(registers: &mut [u32], kind: Type, i: usize, v: i32) {
    let (per, width) = if kind == Type::S8 { (4, 8) } else { (2, 16) };
    registers[i / per] |= encode(kind, v) << (i % per * width);
}

/// A random matrix [16][k], [k][8], [16][8] through the instruction, against the naive product. Fragments as in
/// the PTX ISA: `groupID = lane >> 2`, `threadID_in_group = lane % 4`.
fn check(kernel: &str, kind: Type, selector: Option<usize>) {
    let Some(emulator) = emulator() else { return };
    let mut rng = Rng(7 + kernel.len() as u64);
    let half = if kind == Type::S8 { 16 } else { 8 }; // Stored columns in half a fragment of A.
    let k = if selector.is_some() { 4 * half } else { 2 * half };
    let mut a = vec![vec![0i32; k]; 16];
    let mut indices = vec![vec![0u32; k / 4]; 16];
    let mut stored = vec![vec![0i32; 2 * half]; 16];
    for row in 0..16 {
        if selector.is_none() {
            for col in 0..k {
                a[row][col] = rng.below(15) as i32 - 7;
                stored[row][col] = a[row][col];
            }
            continue;
        }
        for quad in 0..k / 4 {
            let (i, j) = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)][rng.below(6)];
            indices[row][quad] = i as u32 | (j as u32) << 2;
            for (place, at) in [i, j].into_iter().enumerate() {
                let v = rng.below(15) as i32 - 7;
                a[row][4 * quad + at] = v;
                stored[row][2 * quad + place] = v;
            }
        }
    }
    let b: Vec<[i32; 8]> = (0..k).map(|_| [0; 8].map(|_: i32| rng.below(15) as i32 - 7)).collect();
    let c: Vec<[i32; 8]> = (0..16).map(|_| [0; 8].map(|_: i32| rng.below(99) as i32)).collect();

    let (mut ra, mut rb, mut rc, mut re) = (vec![], vec![], vec![], vec![]);
    for lane in 0..32 {
        let (group, thread) = (lane >> 2, lane % 4);
        let mut left = [0u32; 4];
        let mut right = [0u32; 4];
        let per = half / 4; // Elements of one register.
        for i in 0..4 * per {
            // a_i: row groupID for i in the first and third register, else groupID + 8; columns of
            // the second half in the last two registers.
            let row = if i < per || (2 * per..3 * per).contains(&i) { group } else { group + 8 };
            let col = thread * per + i % per + if i >= 2 * per { half } else { 0 };
            put(&mut left, kind, i, stored[row][col]);
        }
        for i in 0..k / 4 {
            let row = thread * per + i % per + i / per * half;
            put(&mut right, kind, i, b[row][group]);
        }
        // The metadata operand, as in the figures of the PTX ISA.
        let metadata = match (selector, kind) {
            (None, _) => 0,
            (Some(_), Type::S8) => {
                let row = if thread % 2 == 0 { group } else { group + 8 };
                let first = if thread < 2 { 0 } else { 8 };
                (0..8).fold(0, |m, q| m | indices[row][first + q] << (4 * q))
            }
            (Some(selector), _) if thread / 2 == selector => {
                let first = thread % 2 * 4;
                (0..4).fold(0, |m, q| {
                    m | indices[group][first + q] << (4 * q)
                        | indices[group + 8][first + q] << (16 + 4 * q)
                })
            }
            _ => 0xdead_beef, // Not read.
        };
        ra.extend(left);
        rb.extend(right);
        re.push(metadata);
        for i in 0..4 {
            let row = if i < 2 { group } else { group + 8 };
            let v = c[row][thread * 2 + i % 2];
            rc.push(if kind == Type::S8 { v as u32 } else { (v as f32).to_bits() });
        }
    }
    let bytes = |v: Vec<u32>| v.into_iter().flat_map(u32::to_le_bytes).collect::<Vec<u8>>();
    let buffers = [bytes(rc), bytes(ra), bytes(rb), bytes(re)];
    let launch = Launch::new(kernel).block(32, 1, 1).buffer(0).buffer(1).buffer(2).buffer(3);
    let out = emulator.run(&buffers, &[launch], &[0, 1, 2]).unwrap();
    for (lane, d) in out[0].as_chunks::<16>().0.iter().enumerate() {
        for (i, d) in d.as_chunks::<4>().0.iter().enumerate() {
            let row = lane / 4 + if i < 2 { 0 } else { 8 };
            let col = lane % 4 * 2 + i % 2;
            let exact = c[row][col] + (0..k).map(|k| a[row][k] * b[k][col]).sum::<i32>();
            let found = match kind {
                Type::S8 => i32::from_le_bytes(*d),
                _ => f32::from_le_bytes(*d) as i32,
            };
            assert_eq!(found, exact, "{kernel}, row {row}, column {col}");
        }
    }
}

#[test]
fn matrix_instructions_match_naive_products() {
    check("run_mma_f16", Type::F16, None);
    check("run_mma_bf16", Type::Bf16, None);
    check("run_mma_s8", Type::S8, None);
    check("run_mma_sp_f16_0", Type::F16, Some(0));
    check("run_mma_sp_f16_1", Type::F16, Some(1));
    check("run_mma_sp_bf16_0", Type::Bf16, Some(0));
    check("run_mma_sp_bf16_1", Type::Bf16, Some(1));
    check("run_mma_sp_s8", Type::S8, Some(0));
}

#[test]
fn indices_out_of_order_are_detected() {
    let Some(emulator) = emulator() else { return };
    let buffers = [vec![0; 512], vec![0; 512], vec![0; 512], vec![0x11; 128]];
    let launch = Launch::new("run_mma_sp_f16_0").block(32, 1, 1);
    let launch = launch.buffer(0).buffer(1).buffer(2).buffer(3);
    let error = emulator.run(&buffers, &[launch], &[0]).unwrap_err().to_string();
    assert!(error.contains("indices 1, 0"), "{error}");
}

#[test]
fn blocks_and_barriers_work() {
    let Some(emulator) = emulator() else { return };
    let x: Vec<f32> = (0..320).map(|v| v as f32).collect();
    let launch =
        Launch::new("row_sums").grid(5, 1, 1).block(64, 1, 1).shared(256).buffer(0).buffer(1);
    let out = emulator.run(&[vec![0; 20], bytes_of(&x)], &[launch], &[0, 1, 2, 3]).unwrap();
    let sums: Vec<f32> = x.chunks(64).map(|r| r.iter().sum()).collect();
    assert_eq!(floats(&out[0]), sums);
}

/// The emulator's error for a kernel with 64 threads.
fn misuse(kernel: &str, seeds: &[u64]) -> Option<String> {
    let buffers = [vec![0; 256], bytes_of(&[1.0; 64])];
    let launch = Launch::new(kernel).block(64, 1, 1).shared(256).buffer(0).buffer(1);
    Some(emulator()?.run(&buffers, &[launch], seeds).unwrap_err().to_string())
}

#[test]
fn misuse_is_detected() {
    for (kernel, says) in [
        ("divergent_barrier", "different barriers"),
        ("lanes_that_stay_away", "has ended"),
        ("absent_lane", "takes no part"),
        ("barrier_nobody_reaches", "nobody can go on"),
        ("beyond_global", "heap-buffer-overflow"),
        ("beyond_shared", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ] {
        let Some(error) = misuse(kernel, &[0]) else { return };
        assert!(error.contains(says), "{kernel}: {error}");
    }
    for kernel in ["missing_barrier", "early_read"] {
        let Some(error) = misuse(kernel, &[0, 1, 2, 3]) else { return };
        assert!(error.contains("a race"), "{kernel}: {error}");
    }
}

#[test]
fn copies_fill_up_with_zeros() {
    let Some(emulator) = emulator() else { return };
    let x: Vec<f32> = (0..137).map(|v| v as f32 + 1.0).collect();
    let launch = Launch::new("copies").block(64, 1, 1).shared(1024);
    let launch = launch.buffer(0).buffer(1).u32(137);
    let out = emulator.run(&[vec![0xff; 1024], bytes_of(&x)], &[launch], &[0, 1, 2]).unwrap();
    let mut expected = x;
    expected.resize(256, 0.0);
    assert_eq!(floats(&out[0]), expected);
}

#[test]
fn conversions_round_to_nearest_even() {
    let Some(emulator) = emulator() else { return };
    let mut rng = Rng(3);
    let mut x: Vec<f32> = (0..30000).map(|_| f32::from_bits(rng.below(1 << 32) as u32)).collect();
    // Near the limits of f16, with ties and subnormals.
    x.extend((0..30000).map(|_| f32::from_bits(0x3300_0000 + rng.below(0x1500_0000) as u32)));
    x.extend((0..4000).map(|i| f32::from_bits(0x3380_0000 + i * 0x1000)));
    x.retain(|x| !x.is_nan());
    let n = x.len();
    let launch = Launch::new("conversions").grid(n.max(65536).div_ceil(256), 1, 1).block(256, 1, 1);
    let launch = launch.buffer(0).buffer(1).buffer(2).u32(n as u32);
    let buffers = [vec![0; 4 * n], bytes_of(&x), vec![0; 4 * 65536]];
    let out = emulator.run(&buffers, &[launch], &[0]).unwrap();
    let halves: Vec<u16> =
        out[0].as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b)).collect();
    for (i, v) in x.iter().enumerate() {
        assert_eq!(halves[i], f16::from_f32(*v).to_bits(), "{v:e}");
        let bits = v.to_bits();
        let exact = f32::from_bits(u32::from(halves[n + i]) << 16);
        // No other bf16 is nearer.
        for other in [bits & 0xffff_0000, (bits & 0xffff_0000).saturating_add(0x1_0000)] {
            let other = f32::from_bits(other);
            if other.is_finite() && exact.is_finite() {
                let error = |w: f32| (f64::from(w) - f64::from(*v)).abs();
                assert!(error(exact) <= error(other), "{v:e}: {exact:e} {other:e}");
            }
        }
    }
    for (i, v) in floats(&out[2]).into_iter().enumerate() {
        let exact = f16::from_bits(i as u16).to_f32();
        assert!(v.to_bits() == exact.to_bits() || v.is_nan() && exact.is_nan(), "{i:04x}");
    }
}

#[test]
fn words_are_permuted_and_multiplied() {
    let Some(emulator) = emulator() else { return };
    let x = [0x8483_8281u32, 0x0807_0605];
    let launch = Launch::new("words").buffer(0).buffer(1);
    let x = x.into_iter().flat_map(u32::to_le_bytes).collect();
    let out = emulator.run(&[vec![0; 24], x], &[launch], &[0]).unwrap();
    let words: Vec<u32> =
        out[0].as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    let dot: i32 = 5 + -127 * 5 - 126 * 6 - 125 * 7 - 124 * 8;
    assert_eq!(words[0], 0x0806_8482);
    assert_eq!(words[1], 0x00ff_81ff);
    assert_eq!(words[2], dot as u32);
    assert_eq!(words[3], 0x4400_0000);
    assert_eq!(words[4], 0xc000_3c00);
    assert_eq!(words[5], 0x80);
}
