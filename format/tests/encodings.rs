//! Every encoding: pack and unpack are inverse, decoding equals a naive formula, and views refuse
//! payloads of the wrong length.

use proptest::prelude::*;
use stb_format::encoding::{
    Dense, DenseView, Encoding, IntGroup, IntGroupParts, MatrixView, Nm, NmParts, Stbllm,
    StbllmParts, Trellis, TrellisParts, TrellisRate,
};
use stb_format::half::f16;

fn scale() -> impl Strategy<Value = f16> {
    (-2.0f32..2.0).prop_map(f16::from_f32)
}

fn view<'a>(encoding: &Encoding, rows: usize, cols: usize, payload: &'a [u8]) -> MatrixView<'a> {
    let shape = [rows as u64, cols as u64];
    assert_eq!(encoding.payload_len(&shape).unwrap(), Some(payload.len() as u64), "{encoding}");
    assert!(encoding.view(shape[0], shape[1], &payload[1..]).is_err());
    encoding.check_payload(shape[0], shape[1], payload).unwrap();
    assert_eq!(&Encoding::parse(encoding.id(), encoding.params()).unwrap(), encoding);
    encoding.view(shape[0], shape[1], payload).unwrap()
}

fn int_group() -> impl Strategy<Value = IntGroupParts> {
    let bits = prop::sample::select(vec![1, 2, 3, 4, 8]);
    let groups = prop::sample::select(vec![32, 64, 128]);
    (bits, groups, 1usize..20, 1usize..200).prop_flat_map(|(bits, group, rows, cols)| {
        let spec = IntGroup::new(bits, group).unwrap();
        let (low, high) = spec.limits();
        // The odd integers, or all.
        let codes = (low..=high).prop_map(move |c| if bits < 4 && c % 2 == 0 { c + 1 } else { c });
        let scales = rows * cols.div_ceil(spec.group());
        let codes = prop::collection::vec(codes, rows * cols);
        (codes, prop::collection::vec(scale(), scales))
            .prop_map(move |(codes, scales)| IntGroupParts { spec, rows, cols, codes, scales })
    })
}

fn stbllm() -> impl Strategy<Value = StbllmParts> {
    let blocks = prop::sample::select(vec![32u16, 64, 96, 128, 1024]);
    (1u8..=8, blocks, 1usize..12, 1usize..300).prop_flat_map(|(n, block, rows, cols)| {
        let spec = Stbllm::new(n, block).unwrap();
        let scales = rows * cols.div_ceil(spec.block()) * 5;
        (
            prop::collection::vec(any::<bool>(), cols),
            prop::collection::vec((any::<u32>(), 0u8..6), rows * cols),
            prop::collection::vec(scale(), scales),
        )
            .prop_map(move |(salient, raw, scales)| {
                let mut states = vec![0; rows * cols];
                let mut negative = vec![false; rows * cols];
                for row in 0..rows {
                    for first in (0..cols).step_by(8) {
                        let width = (cols - first).min(8);
                        let mut order: Vec<usize> = (first..first + width).collect();
                        order.sort_by_key(|c| raw[row * cols + c].0);
                        for &col in &order[..spec.kept(width)] {
                            let value = raw[row * cols + col].1;
                            let region = if salient[col] { 1 + value % 2 } else { 1 + value % 3 };
                            states[row * cols + col] = region;
                            negative[row * cols + col] = value >= 3;
                        }
                    }
                }
                StbllmParts { spec, rows, cols, salient, states, negative, scales }
            })
    })
}

fn nm() -> impl Strategy<Value = NmParts> {
    let patterns = prop::sample::select(vec![(1u8, 4u8), (1, 8), (2, 4), (2, 8)]);
    let scales = prop::sample::select(vec![(0u8, 0u16), (4, 32), (4, 128), (8, 64)]);
    (patterns, scales, any::<bool>(), 1usize..40, 1usize..400).prop_flat_map(
        |((n, m), (bits, block), factors, rows, cols)| {
            let spec = Nm::new(n, m, bits, block, factors).unwrap();
            let blocks = if block == 0 { 0 } else { cols.div_ceil(spec.block()) };
            let code_end = 1u16 << spec.code_bits();
            let block_end = if bits == 8 { 255u8 } else { 15 };
            (
                prop::collection::vec(scale(), if factors { cols } else { 0 }),
                prop::collection::vec(scale(), rows),
                prop::collection::vec(0..=block_end, rows * blocks),
                prop::collection::vec(0..code_end, rows * cols.div_ceil(spec.m())),
            )
                .prop_map(move |(col_factors, row_scales, block_codes, codes)| {
                    NmParts { spec, rows, cols, col_factors, row_scales, block_codes, codes }
                })
        },
    )
}

fn trellis() -> impl Strategy<Value = TrellisParts> {
    let rates = prop::sample::select(TrellisRate::ALL);
    let scales = prop::sample::select(vec![(0u8, 0u16), (4, 32), (4, 128), (8, 64)]);
    let shape = (1usize..40, 1usize..200);
    (rates, scales, any::<bool>(), shape).prop_flat_map(|(rate, (bits, block), factors, shape)| {
        let (rows, cols) = shape;
        let (step_bits, step_weights) = (rate.step_bits() as u8, rate.step_weights() as u8);
        let spec = Trellis::new(step_bits, step_weights, bits, block).unwrap();
        let spec = spec.with_col_factors(factors);
        let blocks = if block == 0 { 0 } else { cols.div_ceil(spec.block()) };
        let block_end = if bits == 8 { 255u8 } else { 15 };
        let streams = rows.div_ceil(16) * cols.div_ceil(spec.unit_cols()) * spec.unit_bytes();
        let pair = (prop::array::uniform16(0u8..64), prop::array::uniform16(0u8..64));
        (
            prop::collection::vec(pair.prop_map(|(low, mixed)| [low, mixed]), spec.step_weights()),
            prop::collection::vec(scale(), if factors { cols } else { 0 }),
            prop::collection::vec(scale(), rows),
            prop::collection::vec(0..=block_end, rows * blocks),
            prop::collection::vec(any::<u8>(), streams),
        )
            .prop_map(move |(tables, col_factors, row_scales, block_codes, streams)| {
                TrellisParts {
                    spec,
                    rows,
                    cols,
                    tables,
                    col_factors,
                    row_scales,
                    block_codes,
                    streams,
                }
            })
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn int_group_round_trip(parts in int_group()) {
        let payload = parts.pack();
        let encoding = Encoding::IntGroup(parts.spec);
        let view = view(&encoding, parts.rows, parts.cols, &payload);
        let MatrixView::IntGroup(packed) = view else { unreachable!() };
        prop_assert_eq!(&packed.unpack(), &parts);
        let groups = parts.cols.div_ceil(parts.spec.group());
        for (i, w) in view.decode().into_iter().enumerate() {
            let (row, col) = (i / parts.cols, i % parts.cols);
            let scale = parts.scales[row * groups + col / parts.spec.group()].to_f32();
            prop_assert_eq!(w.to_bits(), (scale * f32::from(parts.codes[i])).to_bits());
        }
    }

    #[test]
    fn stbllm_round_trip(parts in stbllm()) {
        let payload = parts.pack();
        let view = view(&Encoding::Stbllm(parts.spec), parts.rows, parts.cols, &payload);
        let MatrixView::Stbllm(packed) = view else { unreachable!() };
        prop_assert_eq!(&packed.unpack(), &parts);
        let blocks = parts.cols.div_ceil(parts.spec.block());
        for (i, w) in view.decode().into_iter().enumerate() {
            let (row, col) = (i / parts.cols, i % parts.cols);
            let first = (row * blocks + col / parts.spec.block()) * 5;
            let scale = |k: usize| parts.scales[first + k].to_f32();
            let sign = |w: f32| if parts.negative[i] { -w } else { w };
            let expected = match (parts.states[i], parts.salient[col]) {
                (0, _) => 0.0,
                (s, false) => sign(scale(s as usize - 1)),
                (1, true) => sign(scale(3)) + scale(4),
                (_, true) => sign(scale(3)) - scale(4),
            };
            prop_assert_eq!(w.to_bits(), expected.to_bits(), "row {} col {}", row, col);
        }
    }

    #[test]
    fn nm_round_trip(parts in nm()) {
        let payload = parts.pack();
        let view = view(&Encoding::Nm(parts.spec), parts.rows, parts.cols, &payload);
        let MatrixView::Nm(packed) = view else { unreachable!() };
        prop_assert_eq!(&packed.unpack(), &parts);
        let (m, groups) = (parts.spec.m(), parts.cols.div_ceil(parts.spec.m()));
        let decoded = view.decode();
        for row in 0..parts.rows {
            for group in 0..groups {
                let mut expected = vec![0.0; m];
                for (position, negative) in
                    parts.spec.pattern(parts.codes[row * groups + group]).into_iter().flatten()
                {
                    let col = group * m + position;
                    if col >= parts.cols { continue; }
                    let mut w = parts.row_scales[row].to_f32();
                    if parts.spec.scale_bits() != 0 {
                        let blocks = parts.cols.div_ceil(parts.spec.block());
                        let code = parts.block_codes[row * blocks + col / parts.spec.block()];
                        w *= (f32::from(code) + 1.0) / f32::from(2u16.pow(parts.spec.scale_bits().into()));
                    }
                    if !parts.col_factors.is_empty() {
                        w *= parts.col_factors[col].to_f32();
                    }
                    expected[position] = if negative { -w } else { w };
                }
                for (position, expected) in expected.into_iter().enumerate() {
                    let col = group * m + position;
                    if col < parts.cols {
                        prop_assert_eq!(decoded[row * parts.cols + col].to_bits(), expected.to_bits());
                    }
                }
            }
        }
    }

    /// The oracle reads the stream bit by bit.
    #[test]
    fn trellis_round_trip(parts in trellis()) {
        let payload = parts.pack();
        let encoding = Encoding::Trellis(parts.spec);
        prop_assert!(encoding.check_payload(parts.rows as u64, parts.cols as u64, &payload).is_ok());
        let view = view(&encoding, parts.rows, parts.cols, &payload);
        let MatrixView::Trellis(packed) = view else { unreachable!() };
        prop_assert_eq!(&packed.unpack(), &parts);
        let (width, bytes) = (parts.spec.unit_cols(), parts.spec.unit_bytes());
        let units = parts.cols.div_ceil(width);
        for (i, w) in view.decode().into_iter().enumerate() {
            let (row, col) = (i / parts.cols, i % parts.cols);
            let stream = &parts.streams[(row / 16 * units + col / width) * bytes..][..bytes];
            let first = parts.spec.step_bits() * (row % 16 * 4 + col % 4);
            let window = (0..8).fold(0, |window, bit| {
                let at = (first + bit) % (8 * bytes);
                window | usize::from(stream[at / 8] >> (at % 8) & 1) << bit
            });
            let [low, mixed] = parts.tables[col % width / 4];
            let level = i32::from(low[window % 16]) + i32::from(mixed[(window ^ window >> 4) % 16]);
            let mut scale = parts.row_scales[row].to_f32();
            if parts.spec.scale_bits() != 0 {
                let blocks = parts.cols.div_ceil(parts.spec.block());
                let code = parts.block_codes[row * blocks + col / parts.spec.block()];
                scale *= (f32::from(code) + 1.0) / f32::from(2u16.pow(parts.spec.scale_bits().into()));
            }
            let factor = parts.col_factors.get(col).map_or(1.0, |factor| factor.to_f32());
            let expected = (level - 64) as f32 * factor * scale;
            prop_assert_eq!(w.to_bits(), expected.to_bits(), "row {} col {}", row, col);
        }
    }

    /// Any change of any byte of a payload either shows in the content or breaks a rule: no byte
    /// is free to carry something else.
    #[test]
    fn no_byte_is_ignored(parts in nm(), at in any::<prop::sample::Index>(), flip in 1u8..=255) {
        let mut payload = parts.pack();
        let at = at.index(payload.len());
        payload[at] ^= flip;
        let encoding = Encoding::Nm(parts.spec);
        let (rows, cols) = (parts.rows as u64, parts.cols as u64);
        if encoding.check_payload(rows, cols, &payload).is_ok() {
            let MatrixView::Nm(view) = encoding.view(rows, cols, &payload).unwrap() else { unreachable!() };
            prop_assert_ne!(view.unpack(), parts);
        }
    }

    #[test]
    fn dense_round_trip(values in prop::collection::vec(-1e4f32..1e4, 1..100)) {
        for kind in [Dense::F32, Dense::F16, Dense::Bf16] {
            let payload = kind.encode(&values);
            let view = view(&Encoding::Dense(kind), 1, values.len(), &payload);
            let decoded = view.decode();
            // Encoding what was decoded changes nothing.
            prop_assert_eq!(&kind.encode(&decoded), &payload);
            for (a, b) in decoded.iter().zip(&values) {
                let step = match kind { Dense::F32 => 0.0, Dense::F16 => 1.0 / 1024.0, Dense::Bf16 => 1.0 / 128.0 };
                prop_assert!((a - b).abs() <= b.abs() * step + 6e-8);
            }
        }
    }
}

#[test]
fn nm_codes_are_a_bijection() {
    for (n, m) in [(1, 4), (1, 8), (2, 4), (2, 8)] {
        let spec = Nm::new(n, m, 0, 0, false).unwrap();
        let mut seen = std::collections::HashSet::new();
        for code in 0..1u16 << spec.code_bits() {
            let pattern = spec.pattern(code);
            let mut kept: Vec<_> = pattern.into_iter().flatten().collect();
            let (first, second) = (kept[0], kept.get(1).copied());
            assert_eq!(spec.code(first, second), Some(code), "{n}:{m} {code}");
            if let Some(second) = second {
                assert_eq!(spec.code(second, Some(first)), Some(code), "{n}:{m} {code} swapped");
            }
            kept.sort_unstable();
            assert!(seen.insert(kept), "{n}:{m}: two codes for one pattern");
        }
    }
}

#[test]
fn parameters_out_of_range_are_refused() {
    assert!(IntGroup::new(5, 32).is_none() && IntGroup::new(4, 16).is_none());
    assert!(Stbllm::new(0, 128).is_none() && Stbllm::new(9, 128).is_none());
    assert!(Stbllm::new(4, 0).is_none() && Stbllm::new(4, 48).is_none());
    assert!(Nm::new(3, 8, 0, 0, false).is_none() && Nm::new(1, 16, 0, 0, false).is_none());
    assert!(Nm::new(1, 8, 4, 0, false).is_none() && Nm::new(1, 8, 0, 128, false).is_none());
    let mut params = [0; 16];
    params[15] = 1;
    for id in [1, 2, 3, 16, 17, 32, 48] {
        assert!(Encoding::parse(id, params).is_err(), "{id}");
    }
    // Few bits have an id of their own.
    for (bits, id, other) in [(1, 17, 16), (2, 17, 16), (3, 17, 16), (4, 16, 17), (8, 16, 17)] {
        let spec = IntGroup::new(bits, 32).unwrap();
        let params = Encoding::IntGroup(spec).params();
        assert_eq!(Encoding::parse(id, params).unwrap(), Encoding::IntGroup(spec));
        assert!(Encoding::parse(other, params).is_err(), "{bits} bits with id {other}");
    }
    assert!(matches!(Encoding::parse(999, params), Ok(Encoding::Unknown { id: 999, .. })));
}

#[test]
fn stored_bits_are_those_of_the_formulas() {
    let bits = |e: Encoding| {
        let len = e.payload_len(&[4096, 4096]).unwrap().unwrap();
        len as f64 * 8.0 / (4096.0 * 4096.0)
    };
    let nm = |n, m, b, k| bits(Encoding::Nm(Nm::new(n, m, b, k, false).unwrap()));
    let row = 16.0 / 4096.0;
    assert_eq!(nm(1, 8, 0, 0), 0.5 + row);
    assert_eq!(nm(1, 4, 0, 0), 0.75 + row);
    assert_eq!(nm(2, 8, 4, 128), 0.875 + row + 4.0 / 128.0);
    assert_eq!(nm(2, 4, 8, 128), 1.25 + row + 8.0 / 128.0);
    let tables = 256.0 / (4096.0 * 4096.0);
    let trellis = |k, v, b, block| bits(Encoding::Trellis(Trellis::new(k, v, b, block).unwrap()));
    // The tables of one weight per step are padded to 64 bytes.
    assert_eq!(trellis(2, 1, 4, 128), 2.0 + row + 4.0 / 128.0 + 2.0 * tables);
    assert_eq!(trellis(3, 2, 0, 0), 1.5 + row + 2.0 * tables);
    let factors = Trellis::new(3, 2, 0, 0).unwrap().with_col_factors(true);
    assert_eq!(bits(Encoding::Trellis(factors)), trellis(3, 2, 0, 0) + row);
    let stbllm = bits(Encoding::Stbllm(Stbllm::new(4, 128).unwrap()));
    assert_eq!(stbllm, 2.0 + 0.5 + 80.0 / 128.0 + 1.0 / 4096.0);
    assert_eq!(bits(Encoding::IntGroup(IntGroup::new(4, 32).unwrap())), 4.5);
    assert_eq!(bits(Encoding::IntGroup(IntGroup::new(8, 32).unwrap())), 8.5);
    for few in [1, 2, 3] {
        let encoding = Encoding::IntGroup(IntGroup::new(few, 128).unwrap());
        assert_eq!(bits(encoding), f64::from(few) + 0.125);
    }
}

#[test]
fn dense_views_refuse_the_wrong_length() {
    assert!(DenseView::new(Dense::F16, 2, 3, &[0; 12]).is_some());
    assert!(DenseView::new(Dense::F16, 2, 3, &[0; 11]).is_none());
    assert!(DenseView::new(Dense::F32, u64::MAX, 8, &[]).is_none());
}
