//! Attention of prompts and of single tokens, compared with the definition in f64, and the speed of prompts.

use serde_json::{Value, json};
use stb_kernels::cuda::{
    Attention, AttentionArgs, AttentionShape, Buffer, Device, KvCache, SlotMapping,
};
use stb_kernels::kv::KvKind;
use stb_random::Rng;

use crate::report::Report;
use crate::speed::time_graph;

/// Tokens of a step.
const STEP: usize = 512;

/// Heads, KV heads, width; tokens in the cache and in the step. Covers groups of 1 to 8 heads, every prefill
/// kernel, ragged ends, one token and a few.
const CASES: [([usize; 3], [usize; 2]); 11] = [
    ([32, 8, 128], [300, 1]),
    ([32, 8, 128], [300, 9]),
    ([32, 8, 128], [300, 170]),
    ([8, 8, 128], [0, 512]),
    ([8, 1, 128], [63, 65]),
    ([6, 2, 80], [77, 45]),
    ([12, 4, 64], [62, 131]),
    ([3, 1, 96], [513, 40]),
    ([4, 2, 40], [1, 200]),
    ([4, 1, 256], [31, 66]),
    ([2, 2, 258], [10, 70]),
];

/// A sequence on a device, and the queries, keys and values of all its tokens on the host, [tokens, heads ·
/// width].
struct Sequence {
    shape: AttentionShape,
    frequencies: Vec<f32>,
    all: [Vec<f32>; 3],
    cache: KvCache,
    slots: SlotMapping,
    attend: Attention,
}

impl Sequence {
    fn new(
        device: &Device,
        rng: &mut Rng,
        shape: AttentionShape,
        tokens: usize,
    ) -> anyhow::Result<Self> {
        let frequencies: Vec<f32> = (0..shape.width / 2)
            .map(|i| 0.01f32.powf(2.0 * i as f32 / shape.width as f32))
            .collect();
        let mut make =
            |heads: usize| (0..tokens * heads * shape.width).map(|_| rng.float()).collect();
        let all = [make(shape.heads), make(shape.kv_heads), make(shape.kv_heads)];
        let mut cache = KvCache::new(device, shape)?;
        cache.reserve(tokens, tokens)?;
        let slots = SlotMapping::new(device, STEP)?;
        let attend = Attention::new(device, shape, &frequencies)?;
        Ok(Self { shape, frequencies, all, cache, slots, attend })
    }

    /// Sets the slots of the next `now` tokens. Returns their queries, keys and values, and room for results.
    fn upload_step(
        &mut self,
        device: &Device,
        before: usize,
        now: usize,
    ) -> anyhow::Result<[Buffer<f32>; 4]> {
        self.slots.set((before..before + now).map(|at| (&self.cache, at)))?;
        let upload = |i: usize, heads: usize| {
            let row = heads * self.shape.width;
            device.upload("tokens", &self.all[i][before * row..(before + now) * row])
        };
        // Elements that are not written stay NaN.
        let out =
            device.upload("results", &vec![f32::NAN; now * self.shape.heads * self.shape.width])?;
        Ok([
            upload(0, self.shape.heads)?,
            upload(1, self.shape.kv_heads)?,
            upload(2, self.shape.kv_heads)?,
            out,
        ])
    }

    /// Queues the attention of the tokens whose slots are set.
    fn queue(&mut self, [q, k, v, out]: &mut [Buffer<f32>; 4]) -> stb_kernels::cuda::Result<()> {
        let visible = self.slots.visible();
        self.attend.queue(AttentionArgs { slots: &self.slots, layer: 0, visible, q, k, v, out })
    }

    /// Row `head` of token `at` in the queries (0), keys (1) or values (2). Queries and keys are rotated by
    /// their position.
    fn row(&self, which: usize, head: usize, at: usize) -> Vec<f64> {
        let AttentionShape { width, heads, kv_heads, .. } = self.shape;
        let n = if which == 0 { heads } else { kv_heads };
        let from = &self.all[which][(at * n + head) * width..][..width];
        let mut row: Vec<f64> = from.iter().map(|v| f64::from(*v)).collect();
        if which < 2 {
            for (i, frequency) in self.frequencies.iter().enumerate() {
                let (low, high) = (row[i], row[i + width / 2]);
                let (s, c) = f64::from(at as f32 * frequency).sin_cos();
                row[i] = low * c - high * s;
                row[i + width / 2] = high * c + low * s;
            }
        }
        row
    }

    /// A row of the cache, and the tolerance of each element.
    fn kept(&self, which: usize, head: usize, at: usize) -> (Vec<f64>, f64) {
        let row = self.row(which, head, at);
        let most = row.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        let off = match self.shape.kind {
            KvKind::F32 => most * 1e-6,
            KvKind::F16 => most * 0.5f64.powi(11),
            KvKind::Q8 => most / 254.0 + most * 0.5f64.powi(11),
        };
        (row, off * 1.01)
    }

    /// The largest error divided by its tolerance. The tolerance has the errors of keys and queries in the
    /// scores and of weights and values in the sums, to first order. The data is random, so errors add up like
    /// steps of a random walk: the tolerance is twice the root of the sum of squared bounds. The plain sum of
    /// the bounds would be too loose to detect that a token attends to a key too many.
    fn worst(&self, before: usize, now: usize, out: &[f32]) -> f64 {
        let AttentionShape { heads, kv_heads, width, kind, .. } = self.shape;
        let half = if kind == KvKind::F32 { 2e-6 } else { 0.5f64.powi(11) };
        let scale = 1.0 / (width as f64).sqrt();
        let mut worst = 0.0f64;
        for head in 0..heads {
            let of = head / (heads / kv_heads);
            let keys: Vec<_> = (0..before + now).map(|at| self.kept(1, of, at)).collect();
            let values: Vec<_> = (0..before + now).map(|at| self.kept(2, of, at)).collect();
            for token in 0..now {
                let q = self.row(0, head, before + token);
                let (mut sum, mut total, mut off) = (vec![0.0; width], 0.0, 0.0);
                for ((k, k_off), (v, v_off)) in keys.iter().zip(&values).take(before + token + 1) {
                    let (mut score, mut error) = (0.0, 0.0);
                    for (q, k) in q.iter().zip(k) {
                        score += q * k * scale;
                        error += (q * (k_off + (half + 1e-6) * k.abs()) * scale).powi(2);
                    }
                    let weight = score.exp();
                    total += weight;
                    // Values are within −1..1, and so is their mean.
                    let share = 2.0 * (error.sqrt() + half + 1e-5) + v_off;
                    off += (weight * share).powi(2);
                    sum.iter_mut().zip(v).for_each(|(sum, v)| *sum += weight * v);
                }
                let found = &out[(token * heads + head) * width..][..width];
                for (found, sum) in found.iter().zip(sum) {
                    let allowed = 2.0 * off.sqrt() / total;
                    let error = (f64::from(*found) - sum / total).abs() / allowed;
                    // NaN counts as an infinite error.
                    worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
                }
            }
        }
        worst
    }
}

fn attention([heads, kv_heads, width]: [usize; 3], kind: KvKind) -> AttentionShape {
    AttentionShape { heads, kv_heads, width, layers: 1, kind, interleaved: false }
}

/// Checks all shapes with all types of KV cache.
pub(crate) fn check(report: &mut Report, device: &Device, small: bool) -> anyhow::Result<()> {
    let mut rng = Rng(12);
    let mut all: Vec<Value> = Vec::new();
    let cases = if small { &CASES[5..] } else { &CASES };
    for &(sizes, [before, now]) in cases {
        for kind in [KvKind::F32, KvKind::F16, KvKind::Q8] {
            let shape = attention(sizes, kind);
            let mut sequence = Sequence::new(device, &mut rng, shape, before + now)?;
            for first in (0..before).step_by(STEP) {
                let count = STEP.min(before - first);
                let mut buffers = sequence.upload_step(device, first, count)?;
                sequence.queue(&mut buffers)?;
            }
            let mut buffers = sequence.upload_step(device, before, now)?;
            sequence.queue(&mut buffers)?;
            let mut out = vec![0.0; now * shape.heads * shape.width];
            buffers[3].read(&mut out)?;
            let worst = sequence.worst(before, now, &out);
            let case = format!("{sizes:?} {kind:?}, {now} tokens after {before}");
            if worst > 1.0 {
                report.wrong(
                    "attention",
                    &format!("{case}: the error is {worst:.3} times the tolerance"),
                );
            }
            all.push(json!({"case": case, "error_of_allowed": worst, "right": worst <= 1.0}));
            report.put("attention correctness", all.clone().into())?;
        }
    }
    let right = all.iter().filter(|c| c["right"] == true).count();
    report.line(&format!("  {right} of {} are within their tolerance", all.len()));
    Ok(())
}

/// Measures 512 tokens of a prompt with 32 heads of width 128 and 8 KV heads, at the start and after 3584
/// tokens. Counts 4 · width operations per head for each key that a token attends to. The time includes the
/// rotation.
pub(crate) fn measure(report: &mut Report, device: &Device) -> anyhow::Result<()> {
    let mut all: Vec<Value> = Vec::new();
    for kind in [KvKind::F16, KvKind::Q8] {
        for before in [0, 3584] {
            let shape = attention([32, 8, 128], kind);
            let now = STEP;
            let mut sequence = Sequence::new(device, &mut Rng(13), shape, before + now)?;
            for first in (0..before).step_by(STEP) {
                let mut buffers = sequence.upload_step(device, first, STEP)?;
                sequence.queue(&mut buffers)?;
            }
            let mut buffers = sequence.upload_step(device, before, now)?;
            sequence.queue(&mut buffers)?;
            let mut graph =
                device.record(|| (0..10).try_for_each(|_| sequence.queue(&mut buffers)))?;
            let [median, low, high] = time_graph(device, &mut graph)?.map(|s| s / 10.0);
            let seen: usize = (before + 1..=before + now).sum();
            let rate = 4.0 * (shape.heads * shape.width * seen) as f64 / median / 1e12;
            report.line(&format!(
                "  {kind:?}, {now} tokens after {before:>4}: {:8.1} us ({:.1} to {:.1}), {rate:6.1} TFLOP/s",
                median * 1e6,
                low * 1e6,
                high * 1e6,
            ));
            all.push(json!({
                "cache": format!("{kind:?}"), "heads": shape.heads, "kv_heads": shape.kv_heads,
                "width": shape.width, "before": before, "tokens": now,
                "seconds": median, "fastest": low, "slowest": high, "tflops": rate,
            }));
        }
    }
    report.put("attention", all.into())?;
    Ok(())
}
