//! Compares top-k on a device whose launches the emulator runs with a sort of all logits.

mod common;

use common::machine::device_in_orders;
use stb_kernels::cuda::{TopK, TopKRequest};

/// Few different values, so that many are equal, and some special ones.
fn logits(n: usize, seed: u32) -> Vec<f32> {
    let special = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40];
    let mut state = seed.wrapping_mul(747_796_405) + 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let mut logit = || match next() % 50 {
        0 => special[next() as usize % special.len()],
        _ => (next() % 300) as f32 / 10.0 - 15.0,
    };
    (0..n).map(|_| logit()).collect()
}

#[test]
fn top_k_are_the_first_of_all() {
    let Some(device) = device_in_orders(&[0, 1, 2]) else { return };
    let mut top_k = TopK::new(&device).unwrap();
    for (i, (n, count)) in
        [(1, 5), (40, 40), (1000, 1), (1024, 128), (1025, 40), (5000, 64), (70_000, 128)]
            .into_iter()
            .enumerate()
    {
        let all = logits(n, i as u32);
        let penalized: Vec<u32> = (0..n as u32).step_by(n / 30 + 1).collect();
        let banned = [n as u32 / 2, n as u32 / 3];
        let penalty = 1.3;
        for greedy in [false, true] {
            let mut expected: Vec<(u32, f32)> = (0..).zip(all.iter().copied()).collect();
            for (token, logit) in &mut expected {
                if banned.contains(token) {
                    *logit = f32::NEG_INFINITY;
                } else if penalized.contains(token) {
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
            }
            let value = |v: f32| {
                if !greedy {
                    v
                } else if v.is_nan() {
                    -f32::NAN
                } else {
                    v + 0.0
                }
            };
            let order = |a: &(u32, f32), b: &(u32, f32)| {
                value(b.1).total_cmp(&value(a.1)).then(a.0.cmp(&b.0))
            };
            expected.sort_by(order);
            expected.truncate(count);
            let on = device.upload("logits", &all).unwrap();
            let request =
                TopKRequest { count, greedy, penalty, penalized: &penalized, banned: &banned };
            let found = top_k.find(&on, n, &request).unwrap();
            assert_eq!(found.len(), expected.len(), "{n} {count}");
            for (place, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found.0, expected.0, "{n} {count} {greedy}: place {place}");
                if !greedy {
                    assert_eq!(found.1.to_bits(), expected.1.to_bits(), "{n} {count}: {place}");
                }
            }
        }
    }
}

/// A greedy request returns the first of equal logits, and never NaN.
#[test]
fn the_best_is_the_first_of_equals() {
    let Some(device) = device_in_orders(&[0, 1, 2]) else { return };
    let mut top_k = TopK::new(&device).unwrap();
    for cols in [1, 700, 256] {
        let mut x = logits(cols, 9);
        x.iter_mut().for_each(|v| *v = if v.abs() <= 4.0 { *v } else { 0.5 });
        x[cols / 2] = 5.0;
        x[cols - 1] = 5.0;
        if cols > 2 {
            x[1] = f32::NAN;
        }
        let mut best = 0;
        for (i, v) in x.iter().enumerate() {
            best = if *v > x[best] { i } else { best };
        }
        let request =
            TopKRequest { count: 1, greedy: true, penalty: 1.0, penalized: &[], banned: &[] };
        let on = device.upload("logits", &x).unwrap();
        let found = top_k.find(&on, cols, &request).unwrap();
        assert_eq!(found[0].0 as usize, best);
    }
}
