//! Compares cached keys and values on every instruction set with f64 and the conversions of `half`.

use stb_format::half::f16;
use stb_kernels::Isa;
use stb_kernels::kv::{KvKind, KvRows, mix, scores};

fn numbers(n: usize, k: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * k) % 997) as f32 / 498.0 - 1.0).collect()
}

/// Rows read back are exactly the input, its nearest binary16, or within half a step of 8 bits.
#[test]
fn rows_read_back_within_their_precision_on_every_isa() {
    for width in [1, 8, 16, 20, 64, 128, 200] {
        let rows = numbers(width * 9, 37);
        for kind in [KvKind::F32, KvKind::F16, KvKind::Q8] {
            let mut reference: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut kept = KvRows::with_capacity(kind, width, 9);
                rows.chunks(width).for_each(|row| kept.push(isa, row));
                let mut found = vec![f32::NAN; rows.len()];
                kept.read(isa, 0, &mut found);
                let mut end = vec![f32::NAN; 4 * width];
                kept.read(isa, 5, &mut end);
                assert_eq!(end, found[5 * width..]);
                for (row, found) in rows.chunks(width).zip(found.chunks(width)) {
                    let max = row.iter().fold(0.0f32, |max, v| max.max(v.abs()));
                    for (x, y) in row.iter().zip(found) {
                        let error = (x - y).abs();
                        match kind {
                            KvKind::F32 => assert_eq!(x, y),
                            KvKind::F16 => assert_eq!(f16::from_f32(*x).to_f32(), *y),
                            KvKind::Q8 => assert!(error <= max / 254.0 * 1.0001, "{x} {y}"),
                        }
                    }
                }
                let bits: Vec<u32> = found.iter().map(|v| v.to_bits()).collect();
                assert_eq!(*reference.get_or_insert_with(|| bits.clone()), bits, "{}", isa.name());
                kept.truncate(4);
                assert_eq!(kept.len(), 4);
                let bytes = kind.row_bytes(width);
                assert!(bytes >= width && bytes <= 4 * (width + 16));
            }
        }
    }
}

/// Conversion of all kinds of floats to binary16: subnormal, on a tie, too large, NaN.
#[test]
fn conversion_to_half_matches_the_reference() {
    let mut values: Vec<f32> = (0..1 << 16)
        .map(|bits| f16::from_bits(bits as u16).to_f32())
        .flat_map(|v| {
            let next = |by: i32| f32::from_bits(v.to_bits().wrapping_add_signed(by));
            // Midway between two neighbors, and just off the middle.
            [v, next(1), next(-1), next(1 << 12), next((1 << 12) + 1), next((1 << 12) - 1)]
        })
        .collect();
    values.extend([f32::MAX, f32::MIN_POSITIVE, 1e-30, 65519.9, 65520.0, 1e5, -1e9]);
    for isa in Isa::available() {
        let mut kept = KvRows::with_capacity(KvKind::F16, values.len(), 1);
        kept.push(isa, &values);
        let mut found = vec![0.0; values.len()];
        kept.read(isa, 0, &mut found);
        for (x, y) in values.iter().zip(&found) {
            let exact = f16::from_f32(x.clamp(-65504.0, 65504.0)).to_f32();
            let same = exact.to_bits() == y.to_bits() || exact.is_nan() && y.is_nan();
            assert!(same, "{}: {x:e} ({:x}) became {y:e}, not {exact:e}", isa.name(), x.to_bits());
        }
    }
}

#[test]
fn products_match_f64_on_every_isa() {
    for (width, count) in [(8, 5), (64, 33), (20, 1), (128, 70), (136, 3)] {
        let q = numbers(width, 11);
        let rows = numbers(width * count, 13);
        for kind in [KvKind::F32, KvKind::F16, KvKind::Q8] {
            let mut reference: Option<Vec<u32>> = None;
            for isa in Isa::available() {
                let mut kept = KvRows::with_capacity(kind, width, count);
                rows.chunks(width).for_each(|row| kept.push(isa, row));
                let mut exact = vec![0.0; rows.len()];
                kept.read(isa, 0, &mut exact);
                let exact: Vec<f64> = exact.iter().map(|v| f64::from(*v)).collect();
                let what = format!("{kind:?} {width} x {count} {}", isa.name());
                let close = |found: f32, exact: f64, size: f64| {
                    assert!(
                        (f64::from(found) - exact).abs() <= 2e-5 * size,
                        "{what}: {found} {exact}"
                    );
                };
                let mut query = q.clone();
                query.resize(kept.padded_width(), 0.0);
                let first = count / 3;
                let mut found = vec![f32::NAN; count - first];
                scores(isa, &query, &kept, first, 0.5, &mut found);
                for (t, score) in found.iter().enumerate() {
                    let row = &exact[(first + t) * width..][..width];
                    let terms = row.iter().zip(&q).map(|(k, q)| k * f64::from(*q));
                    close(*score, 0.5 * terms.sum::<f64>(), width as f64);
                }
                let mut out = vec![0.0; kept.padded_width()];
                out[0] = 2.0;
                mix(isa, &found, &kept, first, &mut out);
                for i in 0..width {
                    let terms = found.iter().enumerate();
                    let sum: f64 =
                        terms.map(|(t, w)| f64::from(*w) * exact[(first + t) * width + i]).sum();
                    let before = if i == 0 { 2.0 } else { 0.0 };
                    close(out[i], before + sum, width as f64 * count as f64);
                }
                found.extend(out);
                let bits: Vec<u32> = found.iter().map(|v| v.to_bits()).collect();
                assert_eq!(*reference.get_or_insert_with(|| bits.clone()), bits, "{what}");
            }
        }
    }
}

/// A NaN in a row is still a NaN when read back.
#[test]
fn nan_is_kept() {
    let isa = Isa::available().next().unwrap();
    for kind in [KvKind::F32, KvKind::F16, KvKind::Q8] {
        let mut kept = KvRows::with_capacity(kind, 16, 1);
        let mut row = [1.0; 16];
        row[3] = f32::NAN;
        kept.push(isa, &row);
        let mut found = [0.0; 16];
        kept.read(isa, 0, &mut found);
        assert!(found[3].is_nan(), "{kind:?}");
    }
}
