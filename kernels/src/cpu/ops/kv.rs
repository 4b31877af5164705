//! The KV cache of one head, and the two products of attention with it.

use crate::cpu::arch::bytes::{Bytes, Task};
use crate::cpu::arch::simd::Simd;
use crate::isa::Isa;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvKind {
    /// 32-bit floats: exact.
    F32,
    /// binary16, saturating at ±65504.
    #[default]
    F16,
    /// 8 bits with one scale per token and head.
    Q8,
}

impl KvKind {
    /// Bytes of a row of `width` elements.
    #[must_use]
    pub fn row_bytes(self, width: usize) -> usize {
        let numbers = width.next_multiple_of(LANES);
        match self {
            Self::F32 => numbers * 4,
            Self::F16 => numbers * 2,
            Self::Q8 => numbers + 4,
        }
    }
}

/// Elements per chunk of a row.
const LANES: usize = 16;

/// The keys or values of one head: rows of `width` elements, one per token, each padded with zeros to whole
/// chunks of 16.
#[derive(Clone, Debug)]
pub struct KvRows {
    width: usize,
    len: usize,
    chunks: KvStorage,
}

#[derive(Clone, Debug)]
enum KvStorage {
    F32(Vec<[f32; LANES]>),
    F16(Vec<[u8; 2 * LANES]>),
    /// Codes plus 128; the scale of each row.
    Q8(Vec<[u8; LANES]>, Vec<f32>),
}

impl KvRows {
    /// No rows yet, with memory for `capacity` rows.
    #[must_use]
    pub fn with_capacity(kind: KvKind, width: usize, capacity: usize) -> Self {
        let chunks = capacity * width.div_ceil(LANES);
        let chunks = match kind {
            KvKind::F32 => KvStorage::F32(Vec::with_capacity(chunks)),
            KvKind::F16 => KvStorage::F16(Vec::with_capacity(chunks)),
            KvKind::Q8 => KvStorage::Q8(Vec::with_capacity(chunks), Vec::with_capacity(capacity)),
        };
        Self { width, len: 0, chunks }
    }

    /// The number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The padded width of a row: the length of vectors for [`scores`] and [`mix`].
    #[must_use]
    pub fn padded_width(&self) -> usize {
        self.width.next_multiple_of(LANES)
    }

    /// Appends a row.
    ///
    /// # Panics
    /// If `row` has another width.
    pub fn push(&mut self, isa: Isa, row: &[f32]) {
        assert_eq!(row.len(), self.width, "a row of the width");
        isa.run(PushTask { chunks: &mut self.chunks, row });
        self.len += 1;
    }

    /// Removes all but the first `len` rows.
    pub fn truncate(&mut self, len: usize) {
        let chunks = len * self.padded_width() / LANES;
        self.len = self.len.min(len);
        match &mut self.chunks {
            KvStorage::F32(v) => v.truncate(chunks),
            KvStorage::F16(v) => v.truncate(chunks),
            KvStorage::Q8(v, scales) => {
                v.truncate(chunks);
                scales.truncate(len);
            }
        }
    }

    /// Decodes rows from `first` on to `to`, [rows, width].
    ///
    /// # Panics
    /// If there are fewer rows.
    pub fn read(&self, isa: Isa, first: usize, to: &mut [f32]) {
        isa.run(ReadTask { rows: self, first, to });
    }
}

struct PushTask<'a> {
    chunks: &'a mut KvStorage,
    row: &'a [f32],
}

impl Task for PushTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let scale = match self.chunks {
            KvStorage::Q8(_, scales) => {
                let max = self.row.iter().fold(0.0f32, |max, v| max.max(v.abs()));
                let poisoned = self.row.iter().any(|v| !v.is_finite());
                scales.push(if poisoned { f32::NAN } else { max / 127.0 });
                // A row so small that the inverse overflows counts as zero.
                if 127.0 / max < f32::MAX && !poisoned { 127.0 / max } else { 0.0 }
            }
            _ => 1.0,
        };
        for part in self.row.chunks(LANES) {
            let mut numbers = [0.0; LANES];
            numbers[..part.len()].copy_from_slice(part);
            match self.chunks {
                KvStorage::F32(v) => v.push(numbers),
                KvStorage::F16(v) => {
                    let mut half = [0; 2 * LANES];
                    s.store_low_u16(to_f16(s, s.load(&numbers)), &mut half);
                    v.push(half);
                }
                KvStorage::Q8(v, _) => {
                    let mut codes = [0; LANES];
                    for (code, number) in codes.iter_mut().zip(numbers) {
                        // Within ±127: the product is rounded at most once. Values that are not finite become
                        // 0, and the scale of the row is NaN.
                        *code = ((number * scale).round_ties_even() as i32 + 128) as u8;
                    }
                    v.push(codes);
                }
            }
        }
    }
}

/// The bits of binary16, to nearest even, saturating; NaN stays NaN.
#[inline(always)]
fn to_f16<S: Simd>(s: S, v: S::F) -> S::I {
    let bits = s.cast_i(v);
    let sign = s.and(s.shr(bits, 16), s.splat_i(0x8000));
    let magnitude = s.and(bits, s.splat_i(0x7fff_ffff));
    let nan = s.gt_i(magnitude, s.splat_i(0x7f80_0000));
    let value = s.min(s.cast_f(magnitude), s.splat(65504.0));
    let magnitude = s.cast_i(value);
    // Normal: rounds away 13 bits and moves the exponent's bias from 127 to 15.
    let odd = s.and(s.shr(magnitude, 13), s.splat_i(1));
    let rounding = s.splat_i(0xfff_u32.wrapping_sub(112 << 23));
    let normal = s.shr(s.add_i(s.add_i(magnitude, rounding), odd), 13);
    // Subnormal: the sum with 1/2 is rounded to steps of 2^-24.
    let sum = s.cast_i(s.add(value, s.splat(0.5)));
    let subnormal = s.add_i(sum, s.splat_i(0.5f32.to_bits().wrapping_neg()));
    let small = s.gt_i(s.splat_i(113 << 23), magnitude);
    let finite = s.xor(normal, s.and(s.xor(normal, subnormal), small));
    let kept = s.xor(finite, s.and(s.xor(finite, s.splat_i(0x7e00)), nan));
    s.or(sign, kept)
}

/// Rows of chunks that load as f32.
trait LoadRows<S: Simd> {
    fn load(&self, s: S, chunk: usize) -> S::F;
    /// The scale of a row: an element is (loaded − [`LoadRows::OFFSET`]) · scale.
    fn scale(&self, row: usize) -> f32;
    const OFFSET: f32;
}

impl<S: Simd> LoadRows<S> for &[[f32; LANES]] {
    const OFFSET: f32 = 0.0;

    #[inline(always)]
    fn load(&self, s: S, chunk: usize) -> S::F {
        s.load(&self[chunk])
    }

    #[inline(always)]
    fn scale(&self, _: usize) -> f32 {
        1.0
    }
}

impl<S: Simd> LoadRows<S> for &[[u8; 2 * LANES]] {
    const OFFSET: f32 = 0.0;

    #[inline(always)]
    fn load(&self, s: S, chunk: usize) -> S::F {
        s.f16_to_f32(&self[chunk])
    }

    #[inline(always)]
    fn scale(&self, _: usize) -> f32 {
        1.0
    }
}

impl<S: Simd> LoadRows<S> for (&[[u8; LANES]], &[f32]) {
    const OFFSET: f32 = 128.0;

    #[inline(always)]
    fn load(&self, s: S, chunk: usize) -> S::F {
        s.to_f32(s.widen_u8(&self.0[chunk]))
    }

    #[inline(always)]
    fn scale(&self, row: usize) -> f32 {
        self.1[row]
    }
}

struct ReadTask<'a> {
    rows: &'a KvRows,
    first: usize,
    to: &'a mut [f32],
}

impl Task for ReadTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let (width, first) = (self.rows.width, self.first);
        match &self.rows.chunks {
            KvStorage::F32(v) => read(s, &v[..], width, first, self.to),
            KvStorage::F16(v) => read(s, &v[..], width, first, self.to),
            KvStorage::Q8(v, scales) => read(s, (&v[..], &scales[..]), width, first, self.to),
        }
    }
}

#[inline(always)]
fn read<S: Simd, R: LoadRows<S>>(s: S, rows: R, width: usize, first: usize, to: &mut [f32]) {
    let chunks = width.div_ceil(LANES);
    for (t, to) in (first..).zip(to.chunks_exact_mut(width)) {
        let scale = s.splat(rows.scale(t));
        for (k, to) in to.chunks_mut(LANES).enumerate() {
            let v = s.sub(rows.load(s, t * chunks + k), s.splat(R::OFFSET));
            let mut numbers = [0.0; LANES];
            s.store(s.mul(v, scale), &mut numbers);
            to.copy_from_slice(&numbers[..to.len()]);
        }
    }
}

/// `to[t] = scale · Σ_i q[i]·keys[first + t][i]`; `q` is padded with zeros to
/// [`KvRows::padded_width`].
///
/// # Panics
/// If there are fewer keys or `q` has another length.
pub fn scores(isa: Isa, q: &[f32], keys: &KvRows, first: usize, scale: f32, to: &mut [f32]) {
    assert_eq!(q.len(), keys.padded_width(), "a padded query");
    isa.run(ScoresTask { q, keys, first, scale, to });
}

struct ScoresTask<'a> {
    q: &'a [f32],
    keys: &'a KvRows,
    first: usize,
    scale: f32,
    to: &'a mut [f32],
}

impl Task for ScoresTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        match &self.keys.chunks {
            KvStorage::F32(v) => self.with(s, &v[..]),
            KvStorage::F16(v) => self.with(s, &v[..]),
            KvStorage::Q8(v, scales) => self.with(s, (&v[..], &scales[..])),
        }
    }
}

impl ScoresTask<'_> {
    #[inline(always)]
    fn with<S: Simd, R: LoadRows<S>>(self, s: S, rows: R) {
        let (q, _) = self.q.as_chunks::<LANES>();
        let mut sum = s.splat(0.0);
        for q in q {
            sum = s.add(sum, s.load(q));
        }
        let offset = R::OFFSET * s.sum(sum);
        let score = |row: usize, sum: f32| (sum - offset) * (rows.scale(row) * self.scale);
        let mut row = self.first;
        let (vectors, tail) = self.to.as_chunks_mut::<LANES>();
        for to in vectors {
            let mut products = [s.splat(0.0); LANES];
            for (k, product) in products.iter_mut().enumerate() {
                *product = key_product(s, q, &rows, row + k);
            }
            for (to, sum) in to.iter_mut().zip(s.sums(products)) {
                *to = score(row, sum);
                row += 1;
            }
        }
        for to in tail {
            *to = score(row, s.sum(key_product(s, q, &rows, row)));
            row += 1;
        }
    }
}

/// The products of a query with a key, not summed yet.
#[inline(always)]
fn key_product<S: Simd, R: LoadRows<S>>(s: S, q: &[[f32; LANES]], rows: &R, row: usize) -> S::F {
    let mut at = row * q.len();
    let (mut a, mut b) = (s.splat(0.0), s.splat(0.0));
    let (pairs, single) = q.as_chunks::<2>();
    for [first, second] in pairs {
        a = s.mul_add(s.load(first), rows.load(s, at), a);
        b = s.mul_add(s.load(second), rows.load(s, at + 1), b);
        at += 2;
    }
    if let [last] = single {
        a = s.mul_add(s.load(last), rows.load(s, at), a);
    }
    s.add(a, b)
}

/// `out[i] += Σ_t weights[t]·values[first + t][i]`; `out` is padded to [`KvRows::padded_width`].
///
/// # Panics
/// If there are fewer values or `out` has another length.
pub fn mix(isa: Isa, weights: &[f32], values: &KvRows, first: usize, out: &mut [f32]) {
    assert_eq!(out.len(), values.padded_width(), "a padded result");
    isa.run(MixTask { weights, values, first, out });
}

struct MixTask<'a> {
    weights: &'a [f32],
    values: &'a KvRows,
    first: usize,
    out: &'a mut [f32],
}

impl Task for MixTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        match &self.values.chunks {
            KvStorage::F32(v) => self.with(s, &v[..]),
            KvStorage::F16(v) => self.with(s, &v[..]),
            KvStorage::Q8(v, scales) => self.with(s, (&v[..], &scales[..])),
        }
    }
}

/// Chunks of a row that are accumulated in registers at once: of wide heads, and of others.
const WIDE: usize = 8;
const NARROW: usize = 4;

impl MixTask<'_> {
    #[inline(always)]
    fn with<S: Simd, R: LoadRows<S>>(self, s: S, rows: R) {
        let Self { weights, first, out, .. } = self;
        let chunks = out.len() / LANES;
        let mut offset = 0.0;
        if R::OFFSET != 0.0 {
            for (t, w) in weights.iter().enumerate() {
                offset = (w * rows.scale(first + t)).mul_add(R::OFFSET, offset);
            }
        }
        let (out, _) = out.as_chunks_mut::<LANES>();
        for (part, out) in out.chunks_mut(WIDE).enumerate() {
            let at = first * chunks + part * WIDE;
            let mut columns = ValueColumns { rows: &rows, first, at, stride: chunks };
            if out.len() == WIDE {
                columns.add::<S, WIDE>(s, weights, offset, out);
                continue;
            }
            let (narrow, single) = out.as_chunks_mut::<NARROW>();
            for out in narrow {
                columns.add::<S, NARROW>(s, weights, offset, out);
                columns.at += NARROW;
            }
            for out in single.chunks_mut(1) {
                columns.add::<S, 1>(s, weights, offset, out);
                columns.at += 1;
            }
        }
    }
}

/// Chunks of the values: from chunk `at` of row `first`, rows `stride` chunks apart.
struct ValueColumns<'a, R> {
    rows: &'a R,
    first: usize,
    at: usize,
    stride: usize,
}

impl<R> ValueColumns<'_, R> {
    /// Adds `C` chunks of Σ_t weights`[t]` · (value t − offset) to `out`; `offset` is already summed.
    #[inline(always)]
    fn add<S: Simd, const C: usize>(
        &self,
        s: S,
        weights: &[f32],
        offset: f32,
        out: &mut [[f32; LANES]],
    ) where
        R: LoadRows<S>,
    {
        let mut acc = [s.splat(0.0); C];
        for (t, w) in weights.iter().enumerate() {
            let w = s.splat(w * self.rows.scale(self.first + t));
            for k in 0..C {
                let values = self.rows.load(s, self.at + t * self.stride + k);
                acc[k] = s.mul_add(w, values, acc[k]);
            }
        }
        for k in 0..C {
            let sum = s.sub(acc[k], s.splat(offset));
            s.store(s.add(s.load(&out[k]), sum), &mut out[k]);
        }
    }
}
