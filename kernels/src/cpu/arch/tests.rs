//! Compares every vector operation of every instruction set of this machine with the portable code, bit for
//! bit, including special values that instructions treat differently.

use stb_format::encoding::trellis::window;
use stb_random::Rng;

use super::bytes::{Bytes, MAX_DOTS, MAX_SMALL, NONE, Task};
use super::scalar::Scalar;
use super::simd::{Simd, lanes};
use crate::isa::Isa;

const SPECIAL: [f32; 16] = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    0.5,
    -2.5,
    3.5,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    f32::MIN_POSITIVE,
    -1e-40,
    1e-45,
    f32::MAX,
    16_777_217.0,
    8_388_607.5,
];

/// Pairs of every two special numbers, then random bits.
fn inputs(rng: &mut Rng) -> Vec<[[f32; 16]; 3]> {
    let turned = |by: usize| std::array::from_fn(|i| SPECIAL[(i + by) % 16]);
    let mut all: Vec<_> = (0..16).map(|k| [SPECIAL, turned(k), turned(3 * k + 1)]).collect();
    all.extend((0..200).map(|_| {
        std::array::from_fn(|_| std::array::from_fn(|_| f32::from_bits(rng.bits() as u32)))
    }));
    all
}

/// Checks that both have the same bits or are both NaN: processors differ in the bits of a new NaN.
fn same(found: [f32; 16], expected: [f32; 16], what: &str) {
    for i in 0..16 {
        let (found, expected) = (found[i], expected[i]);
        let equal = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(equal, "{what}, lane {i}: {found:e} instead of {expected:e}");
    }
}

fn floats<S: Simd>(s: S, v: S::F) -> [f32; 16] {
    let mut out = [0.0; 16];
    s.store(v, &mut out);
    out
}

fn ints<S: Simd>(s: S, v: S::I) -> [u32; 16] {
    floats(s, s.cast_f(v)).map(f32::to_bits)
}

fn from_ints<S: Simd>(s: S, v: [u32; 16]) -> S::I {
    s.cast_i(s.load(&v.map(f32::from_bits)))
}

/// Windows of random streams of each number of bits per step, against the definition in the format.
#[inline(always)]
fn check_windows<S: Bytes>(s: S, rng: &mut Rng, name: &str) {
    macro_rules! streams {
        ($($bits:literal)+) => {$(
            let stream: [[u8; 8]; $bits] = std::array::from_fn(|_| rng.bytes());
            let expected: [u8; 64] =
                std::array::from_fn(|step| window(stream.as_flattened(), $bits, step));
            let mut found = [0; 64];
            s.store_b(s.windows(&stream), &mut found);
            assert_eq!(found, expected, "{name}: windows of {} bits", $bits);
        )+};
    }
    streams!(1 2 3 4 5);
}

struct FloatChecks(&'static str);

impl Task for FloatChecks {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let name = self.0;
        let mut rng = Rng(1);
        for [a, b, c] in inputs(&mut rng) {
            macro_rules! check {
                ($op:ident, $($v:ident),+) => {{
                    let found = floats(s, s.$op($(s.load(&$v)),+));
                    let what = format!("{name} {}", stringify!($op));
                    same(found, floats(Scalar, Scalar.$op($($v),+)), &what);
                    found
                }};
            }
            check!(add, a, b);
            check!(sub, a, b);
            check!(mul, a, b);
            check!(div, a, b);
            check!(mul_add, a, b, c);
            check!(select_less, a, b, c, a);
            check!(round, a);
            let max = check!(max, a, b);
            let min = check!(min, a, b);
            for i in 0..16 {
                // Both return one of the operands unchanged, also for NaN and zeros.
                let expected = if a[i] > b[i] { a[i] } else { b[i] };
                assert_eq!(max[i].to_bits(), expected.to_bits(), "{name} max");
                let expected = if a[i] < b[i] { a[i] } else { b[i] };
                assert_eq!(min[i].to_bits(), expected.to_bits(), "{name} min");
            }
            let turned: [[f32; 16]; 16] =
                std::array::from_fn(|k| std::array::from_fn(|i| a[(i + k) % 16]));
            let found = s.sums(turned.map(|v| s.load(&v)));
            same(found, turned.map(|v| Scalar.sum(v)), &format!("{name} sums"));
            let mut bytes = [0; 64];
            for (to, v) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(a) {
                *to = v.to_le_bytes();
            }
            let exact = |v: [f32; 16]| v.map(f32::to_bits);
            assert_eq!(exact(floats(s, s.load_bytes(&bytes))), exact(a), "{name} load_bytes");
            assert_eq!(ints(s, s.cast_i(s.load(&a))), exact(a), "{name} cast_i");
            let small = a.map(|v| if v.abs() < 2e9 { v } else { -2e9 });
            assert_eq!(ints(s, s.to_i32(s.load(&small))), Scalar.to_i32(small), "{name} to_i32");
            let index: [u32; 16] = std::array::from_fn(|_| rng.bits() as u32);
            let found = floats(s, s.lookup(s.load(&a), from_ints(s, index)));
            assert_eq!(exact(found), exact(Scalar.lookup(a, index)), "{name} lookup");
        }
        for first in (0..=u16::MAX).step_by(16) {
            let mut half = [0; 32];
            for (to, v) in half.as_chunks_mut::<2>().0.iter_mut().zip(first..=u16::MAX) {
                *to = v.to_le_bytes();
            }
            same(floats(s, s.f16_to_f32(&half)), Scalar.f16_to_f32(&half), name);
            assert_eq!(ints(s, s.widen_u16(&half)), Scalar.widen_u16(&half), "{name} widen_u16");
        }
    }
}

struct IntChecks(&'static str);

impl Task for IntChecks {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let name = self.0;
        let mut rng = Rng(2);
        for round in 0..300 {
            let mut word = |i: usize| match (round + i) % 7 {
                0 => 0,
                1 => u32::MAX,
                2 => 1 << 31,
                _ => rng.bits() as u32,
            };
            let a: [u32; 16] = std::array::from_fn(&mut word);
            let b: [u32; 16] = std::array::from_fn(|i| if i == 5 { a[5] } else { word(i + 3) });
            let (va, vb) = (from_ints(s, a), from_ints(s, b));
            assert_eq!(ints(s, s.add_i(va, vb)), Scalar.add_i(a, b), "{name} add_i");
            assert_eq!(ints(s, s.and(va, vb)), Scalar.and(a, b), "{name} and");
            assert_eq!(ints(s, s.or(va, vb)), Scalar.or(a, b), "{name} or");
            assert_eq!(ints(s, s.xor(va, vb)), Scalar.xor(a, b), "{name} xor");
            assert_eq!(ints(s, s.gt_i(va, vb)), Scalar.gt_i(a, b), "{name} gt_i");
            same(floats(s, s.to_f32(va)), Scalar.to_f32(a), name);
            for by in [0, 1, 4, 16, 31] {
                assert_eq!(ints(s, s.shl(va, by)), Scalar.shl(a, by), "{name} shl {by}");
                assert_eq!(ints(s, s.shr(va, by)), Scalar.shr(a, by), "{name} shr {by}");
            }
            let by = b.map(|b| b % 32);
            let found = ints(s, s.shr_each(va, from_ints(s, by)));
            assert_eq!(found, Scalar.shr_each(a, by), "{name} shr_each");
            let bits = a[7] as u16;
            assert_eq!(ints(s, s.select_bits(bits, b[1])), Scalar.select_bits(bits, b[1]));
            let (bits, mask) = (rng.bits(), rng.bits() | rng.bits() & rng.bits());
            assert_eq!(s.deposit(bits, mask), Scalar.deposit(bits, mask), "{name} deposit");
            assert_eq!(s.deposit(bits, u64::MAX), bits, "{name} deposit");
            let low = rng.bytes::<16>();
            assert_eq!(ints(s, s.widen_u8(&low)), Scalar.widen_u8(&low), "{name} widen_u8");
            let signed = low.map(u8::cast_signed);
            let mut found = [0; 16];
            let wide = signed.map(|v| i32::from(v).cast_unsigned());
            s.store_low_bytes(from_ints(s, wide), &mut found);
            assert_eq!(found, signed, "{name} store_low_bytes");
            let wide = wide.map(u32::cast_signed);
            assert_eq!(ints(s, s.load_i(&wide)), Scalar.load_i(&wide), "{name} load_i");
        }
        let x: Vec<f32> = (0..20).map(|v| v as f32).collect();
        assert_eq!(floats(s, s.load(lanes(&x, 3)))[15], 18.0);
    }
}

struct ByteChecks(&'static str);

impl ByteChecks {
    #[inline(always)]
    fn out<S: Bytes>(s: S, v: S::B) -> [u8; 64] {
        let mut out = [0; 64];
        s.store_b(v, &mut out);
        out
    }
}

impl Task for ByteChecks {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let name = self.0;
        let mut rng = Rng(3);
        for round in 0..300 {
            let (mut a, mut b) = (rng.bytes::<64>(), rng.bytes::<64>());
            if round < 8 {
                a.fill([0, 127, 128, 255][round % 4]);
                b.fill([128, 127][round / 4]);
            }
            b[9] = a[9];
            let (va, vb) = (s.load_b(&a), s.load_b(&b));
            assert_eq!(Self::out(s, va), a, "{name} load_b");
            assert_eq!(Self::out(s, s.splat_b(a[0])), [a[0]; 64], "{name} splat_b");
            assert_eq!(Self::out(s, s.and_b(va, vb)), Scalar.and_b(a, b), "{name} and_b");
            assert_eq!(Self::out(s, s.or_b(va, vb)), Scalar.or_b(a, b), "{name} or_b");
            assert_eq!(Self::out(s, s.xor_b(va, vb)), Scalar.xor_b(a, b), "{name} xor_b");
            assert_eq!(Self::out(s, s.sub_b(va, vb)), Scalar.sub_b(a, b), "{name} sub_b");
            // The bits that come from the neighbor are unspecified.
            macro_rules! shifts {
                ($($k:literal)+) => {$(
                    let found = Self::out(s, s.shr_b::<$k>(va)).map(|v| v & (255 >> $k));
                    assert_eq!(found, Scalar.shr_b::<$k>(a), "{name} shr_b");
                    let found = Self::out(s, s.shl_b::<$k>(va)).map(|v| v >> $k << $k);
                    assert_eq!(found, Scalar.shl_b::<$k>(a), "{name} shl_b");
                )+};
            }
            shifts!(0 1 2 3 4 5 6 7);
            let index = b.map(|v| if v < 128 { v & 15 } else { v });
            let found = Self::out(s, s.lookup_b(va, s.load_b(&index)));
            let expected = Scalar.lookup_b(a, index);
            assert_eq!(found, expected, "{name} lookup_b");
            // The order of arranged bytes depends on the instruction set.
            let arranged = |v: [u8; 64]| s.arrange(s.load_b(&v));
            let index = index.map(|v| if v < 128 { v } else { v & 15 | NONE });
            let expected = Scalar.lookup_b(a, index);
            let found = s.lookup_arranged_or_zero(va, arranged(index));
            assert_eq!(Self::out(s, found), Self::out(s, arranged(expected)), "{name} arranged");
            let index = index.map(|v| v & 15);
            let found = s.lookup_arranged(va, arranged(index));
            let expected = arranged(Scalar.lookup_b(a, index));
            assert_eq!(Self::out(s, found), Self::out(s, expected), "{name} arranged");

            assert_eq!(Self::out(s, s.add_b(va, vb)), Scalar.add_b(a, b), "{name} add_b");
            let words: [u64; 16] = std::array::from_fn(|_| rng.bits());
            let found = s.transpose(&words).map(|v| Self::out(s, v));
            assert_eq!(found, Scalar.transpose(&words), "{name} transpose");

            let found = Self::out(s, s.high_products(va, vb, [vb, va]));
            assert_eq!(found, Scalar.high_products(a, b, [b, a]), "{name} high_products");
            check_windows(s, &mut rng, name);

            let u = a.map(|v| v & 127);
            let start: [u32; 16] = std::array::from_fn(|_| rng.bits() as u32);
            let found = ints(s, s.dot4(from_ints(s, start), s.load_b(&u), vb));
            assert_eq!(found, Scalar.dot4(start, u, b), "{name} dot4");

            // As many calls as allowed, also with the largest factors.
            let (u, v) = (a.map(|v| v % 3), b.map(|v| if v == 128 { 129 } else { v }));
            let (vu, vv) = (s.load_b(&u), s.load_b(&v));
            let (mut acc, mut expected) = (s.zero_small(), [0; 16]);
            for _ in 0..MAX_SMALL / 2 {
                acc = s.dot4_small(acc, vu, vv);
                expected = Scalar.dot4(expected, u, v);
            }
            assert_eq!(ints(s, s.finish_small(acc)), expected, "{name} dot4_small");

            let halves = |v: [u8; 64]| -> [i16; 16] {
                std::array::from_fn(|i| i16::from_le_bytes([v[2 * i], v[2 * i + 1]]))
            };
            let (ha, hb) = (halves(a), halves(b));
            let (va, vb) = (s.load_h(&ha), s.load_h(&hb));
            let (mut sum, mut difference) = ([0; 16], [0; 16]);
            s.store_h(s.add_h(va, vb), &mut sum);
            s.store_h(s.sub_h(va, vb), &mut difference);
            assert_eq!(sum, Scalar.add_h(ha, hb), "{name} add_h");
            assert_eq!(difference, Scalar.sub_h(ha, hb), "{name} sub_h");
            assert_eq!(ints(s, s.widen_h(va)), Scalar.widen_h(ha), "{name} widen_h");

            let four: [[u8; 64]; 4] = std::array::from_fn(|_| rng.bytes());
            let found = s.transpose_words(four.map(|v| s.load_b(&v))).map(|v| Self::out(s, v));
            assert_eq!(found, Scalar.transpose_words(four), "{name} transpose_words");
            let lanes = four.each_ref().map(|v| v[5..].first_chunk().unwrap());
            let found = Self::out(s, s.load_lanes(lanes));
            assert_eq!(found, Scalar.load_lanes(lanes), "{name} load_lanes");
            let other: [u32; 16] = std::array::from_fn(|_| rng.bits() as u32);
            let found = ints(s, s.add_pairs(from_ints(s, start), from_ints(s, other)));
            assert_eq!(found, Scalar.add_pairs(start, other), "{name} add_pairs");

            // As many calls as allowed, also with the largest bytes.
            let above = |v: u8| if v == 128 { 129 } else { v };
            let (a, b) = (a.map(above), b.map(above));
            let (va, vb) = (s.arrange(s.load_b(&a)), s.arrange(s.load_b(&b)));
            let (mut acc, mut expected) = (s.zero_acc(), Scalar.zero_acc());
            for _ in 0..MAX_DOTS {
                acc = s.dot2(acc, va, vb);
                expected = Scalar.dot2(expected, a, b);
            }
            assert_eq!(ints(s, s.finish(acc)), Scalar.finish(expected), "{name} dot2");
            // Half as many calls with the lowest byte.
            let low = [128; 64];
            let (mut acc, mut expected) = (s.zero_acc(), Scalar.zero_acc());
            for _ in 0..MAX_DOTS / 2 {
                acc = s.dot2(acc, s.load_b(&low), vb);
                expected = Scalar.dot2(expected, low, b);
            }
            assert_eq!(ints(s, s.finish(acc)), Scalar.finish(expected), "{name} dot2 of −128");
            if S::WIDE {
                let tables: [[u8; 64]; 8] = std::array::from_fn(|_| rng.bytes::<64>().map(above));
                let some = rng.bytes::<64>().map(|v| if v < 200 { v & 15 } else { NONE });
                let index = some.map(|v| v & 15);
                let expected = Scalar.add_lookups::<false>([Scalar.zero_acc(); 8], &tables, index);
                let expected = Scalar.add_lookups::<true>(expected, &tables, some);
                let [some, index] = [some, index].map(|v| s.arrange(s.load_b(&v)));
                let found = s.add_lookups::<false>([s.zero_acc(); 8], &tables, index);
                let found = s.add_lookups::<true>(found, &tables, some);
                for (found, expected) in found.into_iter().zip(expected) {
                    assert_eq!(ints(s, s.finish(found)), Scalar.finish(expected), "{name} lookups");
                }
            }
            s.prefetch(std::ptr::null());
        }
    }
}

#[test]
fn float_operations_equal_the_portable_code() {
    Isa::available().for_each(|isa| isa.run(FloatChecks(isa.name())));
}

#[test]
fn integer_operations_equal_the_portable_code() {
    Isa::available().for_each(|isa| isa.run(IntChecks(isa.name())));
}

#[test]
fn byte_operations_equal_the_portable_code() {
    Isa::available().for_each(|isa| isa.run(ByteChecks(isa.name())));
}
