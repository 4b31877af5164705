//! Decoding a token allocates no memory once earlier tokens have reserved it.

use std::alloc::System;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use stb_kernels::kv::KvKind;
use stb_runtime::{Engine, OpenOptions, Sampler, SamplerOptions, State};
use stb_tests::paths::quill;
use stb_tests::programs::convert;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Enough for attention over several pieces of the KV cache.
const TOKENS: u32 = 300;

#[test]
fn decoding_does_not_allocate() {
    let folder = tempfile::tempdir().unwrap();
    for recipe in ["nm-1of8", "nm-2of4", "stbllm-6of8", "int4", "source"] {
        let file = folder.path().join(format!("{recipe}.stb"));
        convert(&quill(), &file, &["--recipe", recipe, "--calib-samples", "2"]);
        for kv in [KvKind::F16, KvKind::Q8, KvKind::F32] {
            let options = OpenOptions { kv, threads: Some(2), ..OpenOptions::default() };
            let engine = Engine::open(&file, &options).unwrap();
            let mut state = State::new(&engine, TOKENS as usize);
            let mut sampler =
                Sampler::new(SamplerOptions { repeat_penalty: 1.1, ..SamplerOptions::default() });
            let mut answer = || {
                state.truncate(0);
                for token in 0..TOKENS {
                    let logits = engine.forward(&mut state, &[token]).unwrap();
                    let _ = sampler.sample(logits);
                }
            };
            answer();
            // The first answer has allocated all memory that the second one needs.
            let region = Region::new(ALLOCATOR);
            answer();
            let change = region.change();
            assert_eq!(
                (change.allocations, change.reallocations),
                (0, 0),
                "{recipe} {kv:?}: {change:?}"
            );
        }
    }
}
