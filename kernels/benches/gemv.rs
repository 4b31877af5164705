//! Matrix-vector products at 4096 × 4096, weights in cache and from memory, on every instruction set of the
//! machine. Criterion reports stored bytes per second; the line after it has weights per second and shares of
//! the machine's limits. `STB_ISA` selects one set.
//!
//! `cargo bench -p stb-kernels --bench gemv -- nm`

#![allow(missing_docs, reason = "made by the macros of criterion")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use stb_format::Encoding;
use stb_format::encoding::{IntGroup, Nm, Stbllm};
use stb_kernels::{GemvScratch, gemv, packed};

mod report;
use report::{Limits, Work};

const COLS: usize = 4096;

fn encodings() -> Vec<Encoding> {
    let nm = |n, m| Encoding::Nm(Nm::new(n, m, 4, 128, false).expect("valid parameters"));
    let int4 = Encoding::IntGroup(IntGroup::new(4, 32).expect("valid parameters"));
    let stbllm = Encoding::Stbllm(Stbllm::new(4, 128).expect("valid parameters"));
    vec![nm(1, 8), nm(1, 4), nm(2, 8), nm(2, 4), int4, stbllm]
}

fn benches(c: &mut Criterion) {
    let x: Vec<f32> = (0..COLS).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let sets = Limits::all();
    for encoding in encodings() {
        // 256 rows stay in the L2 cache; 65,536 rows fit no cache.
        for (place, rows) in [("cache", 256), ("memory", 65536)] {
            let shape = [rows as u64, COLS as u64];
            let bytes = encoding.payload_len(&shape).expect("a valid shape").expect("known");
            // Any bits are valid codes, and speed does not depend on their values.
            let payload: Vec<u8> =
                (0..bytes).map(|i| ((i * 2654435761) >> 7) as u8 & 0x3b).collect();
            let view = encoding.view(shape[0], shape[1], &payload).expect("the right length");
            let mut group = c.benchmark_group(format!("{encoding} {place}"));
            group.throughput(Throughput::Bytes(bytes));
            group.sample_size(20);
            let work = Work { weights: (rows * COLS) as u64, bytes, tokens: 1 };
            for set in &sets {
                let mut y = vec![0.0; rows];
                let (isa, matrix) = (set.isa(), packed(&view));
                let mut scratch = GemvScratch::default();
                let input = matrix.prepare_q8(isa, &x, &mut scratch);
                set.bench(&mut group, &work, || gemv(isa, matrix, input, 0, &mut y));
            }
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
