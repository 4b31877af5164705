//! Matrix-vector products of integer groups with q8 activations.
//!
//! In a plane of w bits (1, 2, 4 or 8), a *stride* of 512 columns takes w vectors of 64 bytes. Each of the 8/w
//! fields of a byte is moved to a fixed place and multiplied with the activations of its columns by
//! [`Bytes::dot4_small`]. Sums of neighbors are added until 16 sums of one group of columns each are left: of the
//! groups of a stride for one, two or four rows, depending on the size of groups. They take one conversion and one
//! product with their scales.
//!
//! Odd codes (1 to 3 bits) are 2q + low for the stored number q: fields are placed at bit 1, where they count
//! 2q, and low times the sum of activations is added to the sum of a group. Codes of 4 bits are q − 8, and −8
//! times that sum is added. The third bit of 3-bit codes is a plane of its own, whose sums count four times.
//! [`Bytes::dot4`] needs one factor that is unsigned and below 128; with 8 bits that is not the code but the
//! magnitude of the activation, so positive and negative activations have separate tables.
//!
//! No sum overflows. `dot4_small` allows fields that add up to 128: those of a byte add up to at most 8 · 2,
//! 4 · 6 or 2 · 15. In `dot4` a factor is at most 127, as required. A sum over a group is within
//! 128 · 128 · 127 < 2²⁴ and is converted to f32 exactly; only the products with scales and the sums of these are
//! rounded.
//!
//! The order of these sums is that of every product of this encoding, see [`sum_of_places`]: group g of each
//! stride is added to sum g, one stride after the other, and the sums are added at the end.

use stb_format::encoding::int_group::UNIT;
use stb_format::encoding::{IntGroup, IntGroupView};

use super::super::row_major::bytes;
use crate::cpu::arch::bytes::{Aligned, Bytes, Line, MAX_SMALL, Task};
use crate::cpu::ops::q8::{BLOCK, TokenQ8};

/// Columns whose codes are a whole number of vectors for every width, and whose units are as many as
/// a vector has lanes.
pub(super) const STRIDE: usize = 16 * UNIT;

/// How far ahead to prefetch codes, in bytes: rows follow each other in memory.
const AHEAD: usize = 4096;

/// Quantizes `values` and arranges them for codes.
pub(super) struct IntPrepareQ8<'a> {
    pub spec: IntGroup,
    pub values: &'a [f32],
    pub q8: &'a mut TokenQ8,
}

impl Task for IntPrepareQ8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { spec, values, q8 } = self;
        q8.quantize(s, values);
        arrange(s, spec, q8);
    }
}

/// Arranges quantized activations for the codes of `spec`. The tables are, for each stride, the activations of
/// each field of each vector; for 8 bits, the positive ones and the magnitudes of the negative ones. Offsets and
/// scales are those of the group of each of 16 sums.
#[inline(always)]
fn arrange<S: Bytes>(s: S, spec: IntGroup, x: &mut TokenQ8) {
    let TokenQ8 { codes, scales, tables, offsets, lane_scales } = x;
    tables.clear();
    offsets.clear();
    lane_scales.clear();
    // The tables of 8 bits are multiplied with the codes themselves.
    let low = if spec.bits() == 8 { 0 } else { spec.limits().0 };
    let groups = STRIDE / spec.group();
    for stride in codes.chunks(STRIDE) {
        let mut line = [0; STRIDE];
        line[..stride.len()].copy_from_slice(stride);
        match spec.bits() {
            1 => fields::<1>(&line, tables),
            2 => fields::<2>(&line, tables),
            3 => {
                fields::<2>(&line, tables);
                fields::<1>(&line, tables);
            }
            4 => fields::<4>(&line, tables),
            _ => halves(&line, tables),
        }
        let mut sums = joined(s, sums_of_four::<S, 8>(s, &line));
        let mut n = 16;
        while n > groups {
            sums = s.add_pairs(sums, sums);
            n /= 2;
        }
        let mut lanes = Aligned([0; 16]);
        store_times(s, low, sums, &mut lanes);
        offsets.push(lanes);
    }
    lane_scales.extend(scales.chunks(STRIDE / BLOCK).map(|part| {
        let block = |lane: usize| lane % groups * spec.group() / BLOCK;
        Aligned(std::array::from_fn(|lane| part.get(block(lane)).copied().unwrap_or(0.0)))
    }));
}

/// The sums of each four of 64·`N` codes.
#[inline(always)]
pub(super) fn sums_of_four<S: Bytes, const N: usize>(s: S, codes: &[i8]) -> [S::I; N] {
    let mut sums = [s.splat_i(0); N];
    for (sum, codes) in sums.iter_mut().zip(codes.as_chunks::<64>().0) {
        let codes = s.load_b(&codes.map(i8::cast_unsigned));
        *sum = s.dot4(*sum, s.splat_b(1), codes);
    }
    sums
}

/// Stores `low` times sums, which f32 holds exactly.
#[inline(always)]
pub(super) fn store_times<S: Bytes>(s: S, low: i8, sums: S::I, to: &mut [i32; 16]) {
    let products = s.to_i32(s.mul(s.to_f32(sums), s.splat(f32::from(low))));
    let mut words = [0; 64];
    s.store_words(products, &mut words);
    for (to, word) in to.iter_mut().zip(words.as_chunks().0) {
        *to = i32::from_le_bytes(*word);
    }
}

/// Byte k of a unit holds the fields of columns k, k + n, k + 2n, …, n being the bytes of a unit.
#[inline(always)]
fn fields<const WIDTH: usize>(line: &[i8; STRIDE], tables: &mut Vec<Line>) {
    let bytes = 4 * WIDTH;
    for vector in line.chunks_exact(STRIDE / WIDTH) {
        for field in 0..8 / WIDTH {
            let mut table = [0; 64];
            for (to, unit) in table.chunks_exact_mut(bytes).zip(vector.as_chunks::<UNIT>().0) {
                for (to, x) in to.iter_mut().zip(&unit[field * bytes..]) {
                    *to = x.cast_unsigned();
                }
            }
            tables.push(Aligned(table));
        }
    }
}

fn halves(line: &[i8; STRIDE], tables: &mut Vec<Line>) {
    for vector in line.as_chunks::<64>().0 {
        // Activations are at least −127, so their magnitudes are below 128.
        tables.push(Aligned(vector.map(|x| x.max(0).unsigned_abs())));
        tables.push(Aligned(vector.map(|x| x.min(0).unsigned_abs())));
    }
}

/// See [`PackedMatrix::gemv_batch`](crate::PackedMatrix::gemv_batch): `rows` results for each token; `y` may
/// have room for fewer than `T` tokens.
pub(super) struct IntGemvQ8<'a, const T: usize> {
    pub matrix: &'a IntGroupView<'a>,
    pub x: [&'a TokenQ8; T],
    pub rows: usize,
    pub first: usize,
    pub y: &'a mut [f32],
}

impl<const T: usize> Task for IntGemvQ8<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        match self.matrix.spec.bits() {
            1 => by_group::<S, T, 1, 1, 8>(s, self),
            2 => by_group::<S, T, 2, 2, 4>(s, self),
            3 => by_group::<S, T, 3, 2, 4>(s, self),
            4 => by_group::<S, T, 4, 4, 2>(s, self),
            _ => by_group::<S, T, 8, 8, 2>(s, self),
        }
    }
}

/// For codes of `BITS` bits: the first plane has `WIDTH` bits, and `TABLES` tables for each vector.
#[inline(always)]
fn by_group<
    S: Bytes,
    const T: usize,
    const BITS: usize,
    const WIDTH: usize,
    const TABLES: usize,
>(
    s: S,
    task: IntGemvQ8<'_, T>,
) {
    match task.matrix.spec.group() {
        32 => all_rows::<S, T, BITS, WIDTH, TABLES, 1>(s, task),
        64 => all_rows::<S, T, BITS, WIDTH, TABLES, 2>(s, task),
        _ => all_rows::<S, T, BITS, WIDTH, TABLES, 4>(s, task),
    }
}

/// `R` rows together, as many as a group has units.
#[inline(always)]
fn all_rows<
    S: Bytes,
    const T: usize,
    const BITS: usize,
    const WIDTH: usize,
    const TABLES: usize,
    const R: usize,
>(
    s: S,
    task: IntGemvQ8<'_, T>,
) {
    let IntGemvQ8 { matrix: m, x, rows: count, first, y } = task;
    for from in (0..count).step_by(R) {
        let rows = StoredRows::<R>::new(m, first + from);
        let sums = rows.product::<S, T, BITS, WIDTH, TABLES>(s, x);
        for (y, sums) in y.chunks_exact_mut(count).zip(sums) {
            let y = &mut y[from..];
            match y.first_chunk_mut() {
                Some(y) => *y = sums,
                None => y.copy_from_slice(&sums[..y.len()]),
            }
        }
    }
}

/// Rows of a matrix. Planes reach to the end of the matrix: what is read past the end of a row is multiplied by
/// zero.
struct StoredRows<'a, const R: usize> {
    low: [&'a [u8]; R],
    /// The plane of the third bits of 3-bit codes.
    high: [&'a [u8]; R],
    /// Bytes of a row in the low plane.
    low_bytes: usize,
    scales: [&'a [[u8; 2]]; R],
}

impl<'a, const R: usize> StoredRows<'a, R> {
    /// The rows from `first`. The last row of the matrix stands in for rows past it.
    #[inline(always)]
    fn new(m: &IntGroupView<'a>, first: usize) -> Self {
        let low_bytes = m.row_planes(0)[0].len();
        let mut rows = Self { low: [&[]; R], high: [&[]; R], low_bytes, scales: [&[]; R] };
        for r in 0..R {
            let row = (first + r).min(m.rows - 1);
            [rows.low[r], rows.high[r]] = planes_to_end(m, row);
            rows.scales[r] = m.row_scales(row);
        }
        rows
    }

    /// The products with each token.
    #[inline(always)]
    fn product<
        S: Bytes,
        const T: usize,
        const BITS: usize,
        const WIDTH: usize,
        const TABLES: usize,
    >(
        &self,
        s: S,
        x: [&TokenQ8; T],
    ) -> [[f32; R]; T] {
        let tables_of_stride = WIDTH * TABLES + if BITS == 3 { 8 } else { 0 };
        let mut acc = [s.splat(0.0); T];
        for stride in 0..x[0].lane_scales.len() {
            let mut tables: [&[Line]; T] = [&[]; T];
            for t in 0..T {
                tables[t] = &x[t].tables[stride * tables_of_stride..][..tables_of_stride];
            }
            let mut sums = [[s.splat_i(0); R]; T];
            for r in 0..R {
                let units = self.unit_sums::<S, T, BITS, WIDTH, TABLES>(s, r, stride, tables);
                for t in 0..T {
                    sums[t][r] = units[t];
                }
            }
            let scales = self.scales(s, stride);
            for t in 0..T {
                let sum = s.add_i(joined(s, sums[t]), s.load_i(&x[t].offsets[stride]));
                let scale = s.mul(scales, s.load(&x[t].lane_scales[stride]));
                acc[t] = s.mul_add(scale, s.to_f32(sum), acc[t]);
            }
        }
        let mut all = [[0.0; R]; T];
        for t in 0..T {
            let mut lanes = [0.0; 16];
            s.store(acc[t], &mut lanes);
            for (sum, lanes) in all[t].iter_mut().zip(lanes.chunks_exact_mut(16 / R)) {
                *sum = sum_of_places(lanes);
            }
        }
        all
    }

    /// The products of row `r` with the 16 units of a stride of each token.
    #[inline(always)]
    fn unit_sums<
        S: Bytes,
        const T: usize,
        const BITS: usize,
        const WIDTH: usize,
        const TABLES: usize,
    >(
        &self,
        s: S,
        r: usize,
        stride: usize,
        tables: [&[Line]; T],
    ) -> [S::I; T] {
        let mut parts = [[s.splat_i(0); WIDTH]; T];
        for v in 0..WIDTH {
            let at = 64 * (stride * WIDTH + v);
            if at >= self.low_bytes {
                break;
            }
            let mut spare = [0; 64];
            let codes = bytes(self.low[r], at, &mut spare);
            s.prefetch(codes.as_ptr().wrapping_add(AHEAD));
            for t in 0..T {
                let tables = &tables[t].as_chunks::<TABLES>().0[v];
                parts[t][v] = dots::<S, WIDTH, TABLES>(s, codes, tables);
            }
        }
        let mut units = [s.splat_i(0); T];
        for t in 0..T {
            units[t] = joined(s, parts[t]);
        }
        if BITS == 3 {
            let mut spare = [0; 64];
            let codes = bytes(self.high[r], 64 * stride, &mut spare);
            s.prefetch(codes.as_ptr().wrapping_add(AHEAD));
            for t in 0..T {
                let Some(tables) = tables[t].last_chunk::<8>() else { continue };
                let sum = dots::<S, 1, 8>(s, codes, tables);
                units[t] = s.add_i(units[t], s.shl(sum, 2));
            }
        }
        units
    }

    /// The scales of the groups of a stride, of one row after the other; zero past the last group.
    #[inline(always)]
    fn scales<S: Bytes>(&self, s: S, stride: usize) -> S::F {
        let mut halves = [0; 32];
        for (i, four) in halves.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let (row, part) = (i * R / 4, i % (4 / R));
            let at = 4 * (stride * (4 / R) + part);
            let rest = self.scales[row].get(at..).unwrap_or_default();
            if let Some(scales) = rest.first_chunk::<4>() {
                *four = *scales.as_flattened().first_chunk().expect("four scales");
                continue;
            }
            for (to, scale) in four.as_chunks_mut().0.iter_mut().zip(rest) {
                *to = *scale;
            }
        }
        s.f16_to_f32(&halves)
    }
}

/// The planes of a row and of the rows after it.
#[inline(always)]
pub(super) fn planes_to_end<'a>(m: &IntGroupView<'a>, row: usize) -> [&'a [u8]; 2] {
    let [low, high] = m.row_planes(row);
    let start = row * (low.len() + high.len());
    let from = |start: usize| m.codes.get(start..).unwrap_or_default();
    [from(start), if high.is_empty() { &[] } else { from(start + low.len()) }]
}

/// Adds neighbors until the sums of all vectors fit one.
#[inline(always)]
pub(super) fn joined<S: Bytes, const N: usize>(s: S, mut sums: [S::I; N]) -> S::I {
    let mut n = N;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            sums[i] = s.add_pairs(sums[2 * i], sums[2 * i + 1]);
        }
    }
    sums[0]
}

/// The sum of the sums of each place of a group in a stride: the second half is added to the first, and so on. Sums
/// of zeros are positive, whichever of them have been left out.
#[inline(always)]
fn sum_of_places(sums: &mut [f32]) -> f32 {
    let mut half = sums.len() / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0] + 0.0
}

/// The products of the fields of a vector with their activations.
#[inline(always)]
fn dots<S: Bytes, const WIDTH: usize, const TABLES: usize>(
    s: S,
    codes: &[u8; 64],
    tables: &[Line; TABLES],
) -> S::I {
    let codes = s.load_b(codes);
    let mut sum = s.zero_small();
    macro_rules! add {
        ($mask:literal: $($table:literal $shifted:expr),+) => {$(
            let field = s.and_b($shifted, s.splat_b($mask));
            sum = s.dot4_small(sum, field, s.load_b(&tables[$table]));
        )+};
    }
    match WIDTH {
        1 => {
            add!(2: 0 s.shl_b::<1>(codes), 1 codes, 2 s.shr_b::<1>(codes), 3 s.shr_b::<2>(codes));
            add!(2: 4 s.shr_b::<3>(codes), 5 s.shr_b::<4>(codes));
            add!(2: 6 s.shr_b::<5>(codes), 7 s.shr_b::<6>(codes));
        }
        2 => {
            add!(6: 0 s.shl_b::<1>(codes), 1 s.shr_b::<1>(codes));
            add!(6: 2 s.shr_b::<3>(codes), 3 s.shr_b::<5>(codes));
        }
        4 => {
            add!(15: 0 codes, 1 s.shr_b::<4>(codes));
        }
        _ => {
            // Negates the products with magnitudes of negative activations: −n = !(n − 1).
            let ones = s.splat_i(u32::MAX);
            let negative = s.xor(s.dot4(ones, s.load_b(&tables[1]), codes), ones);
            return s.dot4(negative, s.load_b(&tables[0]), codes);
        }
    }
    s.finish_small(sum)
}

// The sum of the largest fields, by width.
const _: () = assert!(8 * 2 <= MAX_SMALL && 4 * 6 <= MAX_SMALL && 2 * 15 <= MAX_SMALL);
