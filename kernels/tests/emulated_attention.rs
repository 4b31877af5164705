//! Compares the CUDA kernels of attention, planned as for a device and run by the emulator, with the definition
//! in f64.

mod common;

use std::sync::{Arc, Mutex};

use common::emulator::{Emulator, Launch, bytes_of, floats};
use common::kernels::{build, module_named};
use common::machine::simulated;
use common::plans::{address, launch};
use stb_format::half::f16;
use stb_kernels::cuda::{
    Attention, AttentionAddresses, AttentionArgs, AttentionBatch, AttentionShape, KvCache,
    RopeAddresses, ScratchAddresses, SlotMapping,
};
use stb_kernels::kv::KvKind;
use stb_random::Rng;

/// A step with tokens of several sequences: for each, the tokens before the step and those in it.
struct Step<'a> {
    shape: AttentionShape,
    sequences: &'a [(usize, usize)],
}

/// Keys, values and queries of all tokens of a sequence, [tokens, heads · width].
type Tokens = [Vec<f32>; 3];

impl Step<'_> {
    const LAYER: usize = 1;

    fn check(&self, rng: &mut Rng, emulator: &Emulator, tolerance: f64) {
        let Self { shape, sequences } = *self;
        let AttentionShape { heads, kv_heads, width, .. } = shape;
        let widths = [heads, kv_heads, kv_heads].map(|n| n * width);
        let frequencies: Vec<f32> = (0..width / 2).map(|i| 0.7f32.powi(i as i32)).collect();
        let all: Vec<Tokens> = sequences
            .iter()
            .map(|(before, now)| widths.map(|n| rng.floats((before + now) * n)))
            .collect();
        // Buffers: q, k, v, out, frequencies, slots, partial, counters; then the caches.
        let longest = sequences.iter().map(|(before, now)| before + now).max().unwrap();
        let capacity = longest + 3;
        let mut buffers = vec![Vec::new(); 8];
        buffers[4] = bytes_of(&frequencies);
        buffers.extend(sequences.iter().map(|_| vec![0; shape.cache_bytes(capacity)]));
        let mut launches = Vec::new();
        let mut first = 0;
        for is_now in [false, true] {
            let count = |s: &(usize, usize)| if is_now { s.1 } else { s.0 };
            let tokens: usize = sequences.iter().map(count).sum();
            for (s, (of, sequence)) in all.iter().zip(sequences).enumerate() {
                let from = if is_now { sequence.0 } else { 0 };
                for position in from..from + count(sequence) {
                    for i in 0..3 {
                        let token = &of[i][position * widths[i]..][..widths[i]];
                        buffers[i].extend(bytes_of(token));
                    }
                    let place = buffers[5].len();
                    buffers[5].extend([0; 16]);
                    let set = Launch::new("set_slot").pointer(5, place).buffer(8 + s);
                    launches.push(set.u32(capacity as u32).u32(position as u32));
                }
            }
            if tokens == 0 {
                continue;
            }
            let at = |buffer, bytes: usize| address(buffer) + (first * bytes) as u64;
            let rope = RopeAddresses {
                q: at(0, widths[0] * 4),
                k: at(1, widths[1] * 4),
                v: at(2, widths[2] * 4),
                frequencies: address(4),
                slots: at(5, 16),
            };
            launches.push(launch(&shape.plan_rope(rope, Self::LAYER, tokens).unwrap()));
            if is_now {
                let size = shape.decode_scratch(tokens, longest);
                buffers[3] = vec![0xff; tokens * widths[0] * 4];
                buffers[6] = vec![0xff; size.partial * 4];
                buffers[7] = vec![0; size.arrived * 4];
                let scratch = ScratchAddresses { partial: address(6), arrived: address(7) };
                let at = AttentionAddresses { q: rope.q, out: address(3), slots: rope.slots };
                let batch = AttentionBatch { layer: Self::LAYER, tokens, visible: longest };
                launches.push(launch(&shape.plan_decode(at, scratch, batch).unwrap()));
            }
            first += tokens;
        }
        let clear = Launch::new("clear_slots").block(1024, 1, 1).buffer(5).u32(first as u32);
        launches.push(clear);
        let what = format!("{shape:?} {sequences:?}");
        let found = emulator.run(&buffers, &launches, &[0, 5]).expect(&what);
        assert!(found[7].iter().all(|b| *b == 0), "{what}: counters are left as they were");
        let out = floats(&found[3]);
        let mut token = 0;
        for (of, (before, now)) in all.iter().zip(sequences) {
            for position in *before..before + now {
                for head in 0..heads {
                    let expected = self.naive(of, &frequencies, position, head);
                    let found = &out[(token * heads + head) * width..][..width];
                    for (found, expected) in found.iter().zip(expected) {
                        let error = (f64::from(*found) - expected).abs();
                        assert!(error < tolerance, "{what} {position}: {found} {expected}");
                    }
                }
                token += 1;
            }
        }
    }

    /// The attention output of a head by definition, in f64.
    fn naive(
        &self,
        tokens: &Tokens,
        frequencies: &[f32],
        position: usize,
        head: usize,
    ) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, width, interleaved, .. } = self.shape;
        let row = |i: usize, n: usize, at: usize, head: usize| -> Vec<f64> {
            tokens[i][(at * n + head) * width..][..width].iter().map(|v| f64::from(*v)).collect()
        };
        let rotated = |x: Vec<f64>, at: usize| -> Vec<f64> {
            let mut out = x.clone();
            for (pair, frequency) in frequencies.iter().enumerate() {
                let (low, high) = match interleaved {
                    true => (2 * pair, 2 * pair + 1),
                    false => (pair, pair + width / 2),
                };
                let (s, c) = f64::from(at as f32 * frequency).sin_cos();
                out[low] = x[low] * c - x[high] * s;
                out[high] = x[high] * c + x[low] * s;
            }
            out
        };
        let kv_head = head / (heads / kv_heads);
        let q = rotated(row(0, heads, position, head), position);
        let weights: Vec<f64> = (0..=position)
            .map(|at| {
                let k = rotated(row(1, kv_heads, at, kv_head), at);
                let dot: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                (dot / (width as f64).sqrt()).exp()
            })
            .collect();
        let total: f64 = weights.iter().sum();
        let mut out = vec![0.0; width];
        for (at, weight) in weights.iter().enumerate() {
            let v = row(2, kv_heads, at, kv_head);
            out.iter_mut().zip(v).for_each(|(out, v)| *out += weight / total * v);
        }
        out
    }
}

/// Groups of 1 to 9 heads, both pairings, ragged widths, one split and several, steps of one token, of
/// several sequences and of parts of a prompt.
fn attention(kind: KvKind, tolerance: f64) {
    let mut rng = Rng(3);
    let shapes = [
        (4, 1, 24, true),
        (9, 1, 128, true),
        (2, 2, 64, false),
        (6, 2, 6, false),
        (1, 1, 2, false),
    ];
    // Each shape is compiled as a program of its own, so only one kind runs all of them.
    let shapes = if kind == KvKind::F16 { &shapes[..] } else { &shapes[1..3] };
    for &(heads, kv_heads, width, interleaved) in shapes {
        let shape = AttentionShape { heads, kv_heads, width, layers: 2, kind, interleaved };
        let Some(emulator) = build(&shape.decode_module()) else { return };
        for sequences in [&[(0, 1)][..], &[(255, 1), (3, 1)], &[(256, 3)], &[(0, 5), (520, 2)]] {
            Step { shape, sequences }.check(&mut rng, &emulator, tolerance);
        }
    }
}

#[test]
fn attention_over_f32() {
    attention(KvKind::F32, 2e-6);
}

#[test]
fn attention_over_f16() {
    attention(KvKind::F16, 1e-3);
}

#[test]
fn attention_over_8_bits() {
    attention(KvKind::Q8, 2e-2);
}

/// Consecutive tokens of a prompt, and the rows of the cache as stored.
struct Prompt {
    shape: AttentionShape,
    before: usize,
    now: usize,
    /// [now, heads · width].
    q: Vec<f32>,
    /// Keys and values, [kv_heads, before + now, width].
    rows: [Vec<f32>; 2],
    /// Scales of 8-bit rows, [kv_heads, before + now].
    scales: [Vec<f32>; 2],
}

/// The rounding errors of a query as f16 times a power of two.
fn lost(q: &[f32]) -> Vec<f64> {
    let largest = q.iter().fold(2e-30f32, |most, v| most.max(v.abs()));
    let power = f64::from(f32::from_bits(largest.to_bits() & 0xff80_0000));
    q.iter()
        .map(|v| {
            let v = f64::from(*v);
            (f16::from_f64(v / power).to_f64() * power - v).abs()
        })
        .collect()
}

impl Prompt {
    const LAYER: usize = 1;

    /// Uniform in −1..1; 8-bit rows with scales of many sizes.
    fn random(rng: &mut Rng, shape: AttentionShape, before: usize, now: usize) -> Self {
        let tokens = shape.kv_heads * (before + now);
        let is_q8 = shape.kind == KvKind::Q8;
        let mut row = || match is_q8 {
            true => (127.0 * rng.float()).round(),
            false => f16::from_f32(rng.float()).to_f32(),
        };
        let rows = [0, 1].map(|_| (0..tokens * shape.width).map(|_| row()).collect());
        let scales = [0, 1].map(|_| (0..tokens).map(|_| rng.float() / 127.0).collect());
        Self { shape, before, now, q: rng.floats(now * shape.heads * shape.width), rows, scales }
    }

    /// Element `i` of a row, times its scale.
    fn value(&self, which: usize, head: usize, token: usize, i: usize) -> f64 {
        let row = head * (self.before + self.now) + token;
        let scale = match self.shape.kind {
            KvKind::Q8 => f64::from(self.scales[which][row]),
            _ => 1.0,
        };
        f64::from(self.rows[which][row * self.shape.width + i]) * scale
    }

    /// The cache of a sequence, with room for a few more tokens. Unwritten elements are NaN.
    fn cache(&self, capacity: usize) -> Vec<u8> {
        let AttentionShape { kv_heads, width, kind, .. } = self.shape;
        let tokens = self.before + self.now;
        let mut all = vec![0xff; self.shape.cache_bytes(capacity)];
        let part = all.len() / (2 * self.shape.layers);
        let size = if kind == KvKind::Q8 { 1 } else { 2 };
        let stride = width.next_multiple_of(8) * size;
        for which in 0..2 {
            let part = &mut all[(2 * Self::LAYER + which) * part..][..part];
            let (rows, scales) = part.split_at_mut(kv_heads * capacity * stride);
            for (head, token) in (0..kv_heads).flat_map(|h| (0..tokens).map(move |t| (h, t))) {
                let (from, to) = (head * tokens + token, head * capacity + token);
                let row = &mut rows[to * stride..][..stride];
                row.fill(0);
                let values = &self.rows[which][from * width..][..width];
                for (to, v) in row.chunks_mut(size).zip(values) {
                    match kind {
                        KvKind::Q8 => to[0] = *v as i8 as u8,
                        _ => to.copy_from_slice(&f16::from_f32(*v).to_le_bytes()),
                    }
                }
                if kind == KvKind::Q8 {
                    let scale = self.scales[which][from].to_le_bytes();
                    scales[to * 4..][..4].copy_from_slice(&scale);
                }
            }
        }
        all
    }

    /// Expected results and tolerances, [now, heads · width]. To first order, with weights w whose sum is 1, a
    /// relative error ε of a weight moves a result by w · ε · (v − result). The errors are:
    ///
    /// * errors δ of the scores: the rounding error of each query in f16, times the key; 2⁻²⁰ of Σ|q·k| for
    ///   sums and scales in f32. Relative to the key with the largest score a weight is off by at most e^(δ + δ
    ///   of that key) − 1;
    /// * ε of 2⁻¹¹ for a weight in f16 (2⁻²⁵ of the largest weight where it is subnormal), and 2⁻¹⁶ for exponentials;
    /// * as much for an 8-bit value that is converted to f16 with its scale.
    fn naive(&self) -> Vec<[f64; 2]> {
        let AttentionShape { heads, kv_heads, width, kind, .. } = self.shape;
        let scale = 1.0 / (width as f64).sqrt();
        let half = 0.5f64.powi(11) * if kind == KvKind::Q8 { 2.0 } else { 1.0 } + 0.5f64.powi(16);
        let mut all = Vec::new();
        for (i, q) in self.q.chunks(width).enumerate() {
            let (last, head) = (self.before + i / heads, i % heads / (heads / kv_heads));
            if q.iter().any(|v| !v.is_finite()) {
                all.extend(vec![[f64::NAN; 2]; width]);
                continue;
            }
            let lost = lost(q);
            let score = |at| {
                let (mut score, mut error) = (0.0, 0.0);
                for (i, (q, lost)) in q.iter().zip(&lost).enumerate() {
                    let (q, k) = (f64::from(*q), self.value(0, head, at, i));
                    score += q * k * scale;
                    error += (lost + q.abs() * 0.5f64.powi(20)) * k.abs() * scale;
                }
                (score, error)
            };
            let scores: Vec<(f64, f64)> = (0..=last).map(score).collect();
            let top = scores.iter().fold(scores[0], |top, s| if s.0 > top.0 { *s } else { top });
            let weights: Vec<f64> = scores.iter().map(|s| (s.0 - top.0).exp()).collect();
            let off = scores.iter().zip(&weights);
            let off: Vec<f64> = off.map(|(s, w)| (s.0 - top.0 + s.1 + top.1).exp() - w).collect();
            let total: f64 = weights.iter().sum();
            for i in 0..width {
                let values = (0..=last).map(|at| self.value(1, head, at, i));
                let each = || weights.iter().zip(&off).zip(values.clone());
                let result = each().map(|((w, _), v)| w * v).sum::<f64>() / total;
                let share = |((w, off), v): ((&f64, &f64), f64)| {
                    // If one key has all the weight, the result is exact, and `off` may be infinite.
                    let moved = if v == result { 0.0 } else { off * (v - result).abs() };
                    let rounded = w * half * (v.abs() + result.abs());
                    (moved + rounded) / total + 0.5f64.powi(25) * (v.abs() + w)
                };
                all.push([result, 1.01 * each().map(share).sum::<f64>()]);
            }
        }
        all
    }

    /// Checks every element, including NaN. Returns the largest error divided by its tolerance.
    fn check(&self, emulator: &Emulator, seeds: &[u64]) -> f64 {
        let Self { shape, before, now, .. } = *self;
        let capacity = before + now + 3;
        let what = format!("{shape:?}, {now} tokens after {before}");
        // Buffers: queries, results, the slot of the first token, the cache.
        let out = vec![0xff; self.q.len() * 4];
        let buffers = [bytes_of(&self.q), out, vec![0; 16], self.cache(capacity)];
        let at = AttentionAddresses { q: address(0), out: address(1), slots: address(2) };
        let plan = shape.plan_prefill(at, Self::LAYER, now).unwrap().expect(&what);
        // Every device has this much for a block.
        assert!(plan.shared <= 98 << 10, "{what}");
        let set = Launch::new("set_slot").buffer(2).buffer(3);
        let set = set.u32(capacity as u32).u32(before as u32);
        let clear = Launch::new("clear_slots").block(32, 1, 1).buffer(2).u32(1);
        let launches = [set, launch(&plan), clear];
        let found = floats(&emulator.run(&buffers, &launches, seeds).expect(&what)[1]);
        let mut worst = 0.0f64;
        for (i, (found, [expected, tolerance])) in found.iter().zip(self.naive()).enumerate() {
            let place = || {
                format!(
                    "{what}: token {}, number {}",
                    i / (shape.heads * shape.width),
                    i % (shape.heads * shape.width)
                )
            };
            if expected.is_nan() {
                assert!(found.is_nan(), "{}: {found} instead of NaN", place());
                continue;
            }
            let error = (f64::from(*found) - expected).abs();
            assert!(error <= tolerance, "{}: {found} instead of {expected} ± {tolerance}", place());
            worst = worst.max(error / tolerance);
        }
        worst
    }
}

/// Heads, key heads, width; tokens before and now: groups of 1 to 8, every kernel with its width and
/// narrower ones, prompts and tiles that end anywhere.
const PROMPTS: [([usize; 3], [usize; 2]); 12] = [
    ([1, 1, 16], [0, 17]),
    ([2, 2, 64], [0, 64]),
    ([6, 2, 40], [77, 45]),
    ([3, 1, 64], [64, 65]),
    ([4, 1, 80], [62, 33]),
    ([4, 2, 96], [130, 19]),
    ([8, 1, 128], [63, 25]),
    ([2, 1, 128], [0, 200]),
    ([1, 1, 128], [1, 130]),
    ([4, 1, 256], [30, 18]),
    ([1, 1, 256], [0, 70]),
    ([3, 1, 2], [200, 21]),
];

fn prompt_shape(kind: KvKind, [heads, kv_heads, width]: [usize; 3]) -> AttentionShape {
    AttentionShape { heads, kv_heads, width, layers: 2, kind, interleaved: false }
}

fn prompts(kind: KvKind, module: &str) {
    let Some(emulator) = build(&module_named(module)) else { return };
    let mut rng = Rng(5);
    for (i, (sizes, [before, now])) in PROMPTS.into_iter().enumerate() {
        let shape = prompt_shape(kind, sizes);
        let seeds: &[u64] = if i % 3 == 0 { &[0, 1, 2] } else { &[0, 3] };
        let mut prompt = Prompt::random(&mut rng, shape, before, now);
        prompt.check(&emulator, seeds);
        // Queries far outside the range of f16 on both sides, so that a row attends to one key or to all of
        // them. They have few bits, so that f16 is exact and the one key is certain.
        for q in prompt.q.chunks_mut(shape.width) {
            let size = [1e-30, 1e-6, 30.0, 1e6, 3e30][rng.below(5)];
            q.iter_mut().for_each(|v| *v = (*v * 32.0).round() * size);
        }
        if i % 2 == 0 {
            prompt.check(&emulator, &[4]);
        }
    }
}

/// Scores of ±10⁴ that rise and fall from tile to tile. Queries have few bits, so that f16 is exact and the
/// weights are certain.
fn outliers(kind: KvKind, module: &str) {
    let Some(emulator) = build(&module_named(module)) else { return };
    let mut rng = Rng(6);
    let shape = prompt_shape(kind, [4, 2, 64]);
    let mut prompt = Prompt::random(&mut rng, shape, 150, 70);
    prompt.q.iter_mut().for_each(|v| *v = (*v * 32.0).round() * 96.0);
    for (row, keys) in prompt.rows[0].chunks_mut(shape.width).enumerate() {
        let size = [0.0, 1.0 / 1024.0, 1.0, 4.0][rng.below(4)];
        match kind {
            KvKind::Q8 => prompt.scales[0][row] *= size,
            _ => keys.iter_mut().for_each(|k| *k = f16::from_f32(*k * size).to_f32()),
        }
    }
    let (mut most, mut least) = (0.0f64, 0.0f64);
    for q in prompt.q.chunks(shape.width).step_by(4) {
        for at in 0..150 {
            let dot = |(i, q): (usize, &f32)| f64::from(*q) * prompt.value(0, 0, at, i) / 8.0;
            let score: f64 = q.iter().enumerate().map(dot).sum();
            most = most.max(score);
            least = least.min(score);
        }
    }
    assert!(most > 1e4 && least < -1e4, "{least} to {most}");
    prompt.check(&emulator, &[0, 1]);
}

/// Values that are not finite reach the tokens that attend to them, and no others.
fn not_finite(kind: KvKind, module: &str) {
    let Some(emulator) = build(&module_named(module)) else { return };
    let mut rng = Rng(7);
    for (width, before, now) in [(64, 40, 90), (256, 0, 40), (80, 3, 30)] {
        let shape = prompt_shape(kind, [4, 2, width]);
        let heads = 4 * width;
        let mut prompt = Prompt::random(&mut rng, shape, before, now);
        let tokens = before + now;
        // Two values late in the prompt for the first KV head, and a key for the second.
        for (which, head, token) in [(1, 0, tokens - 9), (1, 0, tokens - 3), (0, 1, tokens - 12)] {
            let row = head * tokens + token;
            match kind {
                KvKind::Q8 => prompt.scales[which][row] = f32::NAN,
                _ => prompt.rows[which][row * width + 5] = f32::NAN,
            }
        }
        prompt.q[7] = f32::NAN;
        prompt.q[3 * heads + 2 * width] = f32::INFINITY;
        prompt.check(&emulator, &[0, 1]);
        let nan = prompt.naive().iter().filter(|[v, _]| v.is_nan()).count();
        assert!(nan > 2 * width && nan < now * heads / 2, "{nan} are NaN");
    }
}

macro_rules! prompts {
    ($($check:ident $test:ident $kind:ident $module:literal)*) => { $(
        #[test]
        fn $test() {
            $check(KvKind::$kind, $module);
        }
    )* };
}

prompts! {
    prompts prompts_over_f16 F16 "attention prefill f16"
    prompts prompts_over_8_bits Q8 "attention prefill q8"
    outliers outliers_over_f16 F16 "attention prefill f16"
    outliers outliers_over_8_bits Q8 "attention prefill q8"
    not_finite not_finite_over_f16 F16 "attention prefill f16"
    not_finite not_finite_over_8_bits Q8 "attention prefill q8"
}

#[test]
fn few_tokens_wide_heads_and_exact_caches_use_the_decode_kernel() {
    let plan = |kind, width, tokens| {
        let at = AttentionAddresses { q: 0, out: 0, slots: 0 };
        prompt_shape(kind, [4, 2, width]).plan_prefill(at, 0, tokens).unwrap()
    };
    assert!(plan(KvKind::F16, 256, 17).is_some());
    assert!(plan(KvKind::F16, 256, 16).is_none());
    assert!(plan(KvKind::Q8, 258, 17).is_none());
    assert!(plan(KvKind::F32, 64, 512).is_none());
}

/// The prefill kernel runs only for consecutive tokens of one sequence.
#[test]
fn tokens_of_several_sequences_use_the_decode_kernel() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kernels = seen.clone();
    let device = simulated(move |launches, _| {
        kernels.lock().unwrap().extend(launches.iter().map(|l| (l.kernel, l.blocks)));
    });
    let shape = prompt_shape(KvKind::F16, [4, 2, 64]);
    let [one, other] = [0, 1].map(|_| {
        let mut cache = KvCache::new(&device, shape).unwrap();
        cache.reserve(100, 100).unwrap();
        cache
    });
    let run: Vec<_> = (5..75).map(|at| (&one, at)).collect();
    let mut gap = run.clone();
    gap[69].1 += 1;
    let mut two = run.clone();
    two[30].0 = &other;
    let many = vec![("rope_kv", [8, 70, 1]), ("attention_prefill_64", [3, 2, 1])];
    let few = vec![
        ("rope_kv", [8, 70, 1]),
        ("attention_decode_4", [1, 2, 64]),
        ("attention_decode_4", [1, 2, 6]),
    ];
    let mut slots = SlotMapping::new(&device, 70).unwrap();
    let mut attend = Attention::new(&device, shape, &[0.0; 32]).unwrap();
    let make = |heads: usize| device.zeros("tokens", 70 * heads * 64).unwrap();
    let (mut q, k, v, mut out) = (make(4), make(2), make(2), make(4));
    for (places, expected) in [(run, many), (gap, few.clone()), (two, few)] {
        slots.set(places).unwrap();
        let (slots, q, out) = (&slots, &mut q, &mut out);
        let args = AttentionArgs { slots, layer: 1, visible: 100, q, k: &k, v: &v, out };
        attend.queue(args).unwrap();
        device.synchronize().unwrap();
        assert_eq!(std::mem::take(&mut *seen.lock().unwrap()), expected);
    }
}
