//! Products of a 2048 × 4096 matrix with 512 tokens and with 8, on every instruction set of the machine.
//! Criterion reports multiplications (weights × tokens) per second; the line after it has weights per second
//! and shares of the machine's limits. `STB_ISA` selects one set.
//!
//! `cargo bench -p stb-kernels --bench gemm -- nm`

#![allow(missing_docs, reason = "made by the macros of criterion")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use stb_format::Encoding;
use stb_format::encoding::{IntGroup, Nm};
use stb_kernels::{ActivationsQ8, Panels, gemm, gemm_q8, packed};

mod report;
use report::{Limits, Work};

const COLS: usize = 4096;
const ROWS: usize = 2048;

fn encodings() -> Vec<Encoding> {
    let mut all = Vec::new();
    for (n, m) in [(1, 8), (1, 4), (2, 8), (2, 4)] {
        for (bits, block) in [(0, 0), (4, 128)] {
            all.push(Encoding::Nm(Nm::new(n, m, bits, block, false).expect("valid")));
        }
    }
    all.extend([2, 4].map(|bits| Encoding::IntGroup(IntGroup::new(bits, 128).expect("valid"))));
    all
}

fn benches(c: &mut Criterion) {
    let sets = Limits::all();
    for encoding in encodings() {
        let shape = [ROWS as u64, COLS as u64];
        let bytes = encoding.payload_len(&shape).expect("a valid shape").expect("known");
        // Any bits are valid codes, and speed does not depend on their values.
        let payload: Vec<u8> = (0..bytes).map(|i| ((i * 2654435761) >> 7) as u8 & 0x3b).collect();
        let view = encoding.view(shape[0], shape[1], &payload).expect("the right length");
        let kernel = packed(&view).gemm_q8().expect("an encoding with a q8 GEMM");
        for tokens in [8, 512] {
            let x: Vec<f32> =
                (0..tokens * COLS).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
            let mut group = c.benchmark_group(format!("{encoding} {tokens} tokens"));
            group.throughput(Throughput::Elements((ROWS * COLS * tokens) as u64));
            group.sample_size(10);
            let work = Work { weights: (ROWS * COLS) as u64, bytes, tokens: tokens as u64 };
            for set in &sets {
                let isa = set.isa();
                let mut activations = ActivationsQ8::default();
                let chunks = activations.chunks(kernel.layout(isa, tokens), &x, COLS);
                chunks.into_iter().for_each(|mut chunk| kernel.quantize(isa, &mut chunk));
                let (size, task) = (activations.group(), activations.task_rows());
                let mut y = vec![0.0; activations.groups() * size * ROWS];
                let mut y: Vec<_> = y.chunks_exact_mut(ROWS).collect();
                set.bench(&mut group, &work, || {
                    for (group, y) in y.chunks_exact_mut(size).enumerate() {
                        for first in (0..ROWS).step_by(task) {
                            let rows = first..ROWS.min(first + task);
                            let mut y: Vec<_> =
                                y.iter_mut().map(|y| &mut y[rows.clone()]).collect();
                            gemm_q8(isa, kernel, &activations, group, first, &mut y);
                        }
                    }
                });
                if tokens == 512 && isa.name() != "scalar" {
                    let mut panels = Panels::default();
                    panels.pack(&x, COLS);
                    let mut y = vec![0.0; ROWS * panels.all().row_stride()];
                    group.bench_function(format!("{} exact", isa.name()), |b| {
                        b.iter(|| gemm(isa, packed(&view), panels.all(), 0, &mut y));
                    });
                }
            }
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
