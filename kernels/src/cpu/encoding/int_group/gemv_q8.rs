//! Matrix-vector products of integer groups with q8 activations.
//!
//! In a plane of w bits (1, 2, 4 or 8), a *stride* of 512 columns takes w vectors of 64 bytes. Every 4 bytes
//! belong to one unit of 32 columns, so each of the 16 sums of a vector has one scale. Each of the 8/w fields
//! of a byte is moved to a fixed place and multiplied with the activations of its columns by
//! [`Bytes::dot4_small`]. With 4 bits, the four words of each unit are first moved to the same place of four
//! vectors, so that the 16 units of a stride have 16 sums, which need only one conversion and one product.
//!
//! Odd codes (1 to 3 bits) are 2q + low for the stored number q: fields are placed at bit 1, where they count
//! 2q, and sums start from low times the sum of activations. Codes of 4 bits are q − 8 and sums start from −8
//! times that sum. The third bit of 3-bit codes is a plane of its own, whose sums count four times.
//! [`Bytes::dot4`] needs one factor that is unsigned and below 128; with 8 bits that is not the code but the
//! magnitude of the activation, so positive and negative activations have separate tables.
//!
//! No sum overflows. `dot4_small` allows fields that add up to 128: those of a byte add up to at most 8 · 2
//! or 4 · 6, those of a stride of 4 bits to 8 · 15. In `dot4` a factor is at most 127, as required. A sum
//! over 4 bytes and all fields is within 32 · 2 · 127 for 1 bit and 16 · 6 · 127 for 2 bits; a sum over a unit
//! of 4 bits is within 32 · 15 · 127, and over 4 bytes of 8 bits within 4 · 128 · 127. With the value that
//! sums start from, up to 32 · 8 · 127, all are below 2¹⁷. They are converted to f32 exactly; only the
//! products with scales and the sums of these are rounded.

use stb_format::encoding::int_group::UNIT;
use stb_format::encoding::{IntGroup, IntGroupView};

use crate::cpu::arch::bytes::{Aligned, Bytes, Line, MAX_SMALL, Task};
use crate::cpu::ops::q8::{BLOCK, TokenQ8};

/// Columns whose codes are a whole number of vectors for every width, and whose units are as many as
/// a vector has lanes.
const STRIDE: usize = 16 * UNIT;

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
        arrange(spec, q8);
    }
}

/// Arranges quantized activations for the codes of `spec`. The tables are, for each stride, the activations of
/// each field of each vector; for 8 bits, the positive ones and the magnitudes of the negative ones. Offsets
/// are the start values of the sums of each vector of the first plane; for 4 bits, of each stride. Scales of
/// units are in the order of [`UNITS_BY_PLACE`].
fn arrange(spec: IntGroup, x: &mut TokenQ8) {
    let TokenQ8 { codes, scales, tables, offsets, unit_scales } = x;
    tables.clear();
    offsets.clear();
    unit_scales.clear();
    for stride in codes.chunks(STRIDE) {
        let mut line = [0; STRIDE];
        line[..stride.len()].copy_from_slice(stride);
        match spec.bits() {
            1 => fields(&line, 1, tables),
            2 => fields(&line, 2, tables),
            3 => {
                fields(&line, 2, tables);
                fields(&line, 1, tables);
            }
            4 => fields_of_4_bits(&line, tables),
            _ => halves(&line, tables),
        }
        if spec.bits() != 8 {
            stride_offsets(&line, spec, offsets);
        }
    }
    let blocks = STRIDE / BLOCK;
    unit_scales.extend(scales.chunks(blocks).map(|part| {
        let order = &UNITS_BY_PLACE[usize::from(spec.bits() == 4)];
        Aligned(order.map(|unit| part.get(usize::from(unit) * blocks / 16).copied().unwrap_or(0.0)))
    }));
}

/// Byte k of a unit holds the fields of columns k, k + n, k + 2n, …, n being the bytes of a unit.
fn fields(line: &[i8; STRIDE], width: usize, tables: &mut Vec<Line>) {
    let bytes = 4 * width;
    for vector in line.chunks_exact(STRIDE / width) {
        for field in 0..8 / width {
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

/// [`fields`] for 4 bits, where word w of every unit is in vector w, at the unit's place.
fn fields_of_4_bits(line: &[i8; STRIDE], tables: &mut Vec<Line>) {
    let units = line.as_chunks::<UNIT>().0;
    for (word, field) in (0..4).flat_map(|word| [(word, 0), (word, 1)]) {
        let mut table = [0; 64];
        for (to, unit) in table.as_chunks_mut::<4>().0.iter_mut().zip(&UNITS_BY_PLACE[1]) {
            let from = field * 16 + word * 4;
            let x = &units[usize::from(*unit)][from..from + 4];
            to.iter_mut().zip(x).for_each(|(to, x)| *to = x.cast_unsigned());
        }
        tables.push(Aligned(table));
    }
}

fn halves(line: &[i8; STRIDE], tables: &mut Vec<Line>) {
    for vector in line.as_chunks::<64>().0 {
        // Activations are at least −127, so their magnitudes are below 128.
        tables.push(Aligned(vector.map(|x| x.max(0).unsigned_abs())));
        tables.push(Aligned(vector.map(|x| x.min(0).unsigned_abs())));
    }
}

/// The lowest code times the sum of activations of each unit, at the first sum of the unit.
fn stride_offsets(line: &[i8; STRIDE], spec: IntGroup, offsets: &mut Vec<Aligned<[i32; 16]>>) {
    let width = if spec.bits() == 3 { 2 } else { usize::from(spec.bits()) };
    let low = i32::from(spec.limits().0);
    if width == 4 {
        let units = line.as_chunks::<UNIT>().0;
        let sum = |unit: &u8| units[usize::from(*unit)].iter().map(|x| i32::from(*x)).sum::<i32>();
        offsets.push(Aligned(UNITS_BY_PLACE[1].map(|unit| low * sum(&unit))));
        return;
    }
    for vector in line.chunks_exact(STRIDE / width) {
        let mut sum = [0; 16];
        for (places, unit) in sum.chunks_exact_mut(width).zip(vector.as_chunks::<UNIT>().0) {
            places[0] = low * unit.iter().map(|x| i32::from(*x)).sum::<i32>();
        }
        offsets.push(Aligned(sum));
    }
}

/// See [`PackedMatrix::gemv_batch`](crate::PackedMatrix::gemv_batch): `rows` results for each token; `y` may
/// have room for fewer than `T` tokens. One row at a time: several rows at once share the loads of
/// activations, but were 10 to 25 % slower from memory.
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
        let Self { matrix: m, x, rows: count, first, y } = self;
        match m.spec.bits() {
            1 => rows::<S, T, 1, 1, 8>(s, m, x, count, first, y),
            2 => rows::<S, T, 2, 2, 4>(s, m, x, count, first, y),
            3 => rows::<S, T, 3, 2, 4>(s, m, x, count, first, y),
            4 => rows_of_4_bits(s, m, x, count, first, y),
            _ => rows::<S, T, 8, 8, 2>(s, m, x, count, first, y),
        }
    }
}

/// For codes of `BITS` bits: the first plane has `WIDTH` bits, and `TABLES` tables for each vector.
#[inline(always)]
fn rows<S: Bytes, const T: usize, const BITS: usize, const WIDTH: usize, const TABLES: usize>(
    s: S,
    m: &IntGroupView<'_>,
    x: [&TokenQ8; T],
    count: usize,
    first: usize,
    y: &mut [f32],
) {
    for r in 0..count {
        let sums = row::<S, T, BITS, WIDTH, TABLES>(s, m, x, first + r);
        for (y, sum) in y.chunks_exact_mut(count).zip(sums) {
            y[r] = sum;
        }
    }
}

#[inline(always)]
fn row<S: Bytes, const T: usize, const BITS: usize, const WIDTH: usize, const TABLES: usize>(
    s: S,
    m: &IntGroupView<'_>,
    x: [&TokenQ8; T],
    row: usize,
) -> [f32; T] {
    let [low, high] = m.row_planes(row);
    let stored = m.row_scales(row).as_flattened();
    // In place, except for the end of a row, which is padded with zeros.
    let (strides, last_stride) = padded(low.as_chunks::<64>().0.as_chunks::<WIDTH>().0, low);
    let (seconds, last_second) = padded(high.as_chunks::<64>().0, high);
    let (sixteens, last_sixteen) = padded(stored.as_chunks::<32>().0, stored);
    let (places, part) = places::<0>(m);
    let tables_of_stride = WIDTH * TABLES + if BITS == 3 { 8 } else { 0 };
    let mut sixteen = s.splat(0.0);
    let mut acc = [s.splat(0.0); T];
    for stride in 0..x[0].unit_scales.len() {
        if stride % part == 0 {
            sixteen = s.f16_to_f32(sixteens.get(stride / part).unwrap_or(&last_sixteen));
        }
        let units = s.lookup(sixteen, s.widen_u8(&places[stride % part]));
        let mut scales = [units; T];
        let mut first: [&[[Line; TABLES]]; T] = [&[]; T];
        let mut second: [&[Line]; T] = [&[]; T];
        for t in 0..T {
            scales[t] = s.mul(units, s.load(&x[t].unit_scales[stride]));
            let tables = &x[t].tables[stride * tables_of_stride..][..tables_of_stride];
            let (of_first, of_second) = tables.split_at(WIDTH * TABLES);
            (first[t], second[t]) = (of_first.as_chunks::<TABLES>().0, of_second);
        }
        let vectors = strides.get(stride).unwrap_or(&last_stride);
        for v in 0..WIDTH {
            s.prefetch(vectors[v].as_ptr().wrapping_add(AHEAD));
            for t in 0..T {
                let start = match BITS {
                    8 => s.splat_i(0),
                    _ => s.load_i(&x[t].offsets[stride * WIDTH + v]),
                };
                let sum = dots::<S, WIDTH, TABLES>(s, start, &vectors[v], &first[t][v]);
                acc[t] = s.mul_add(spread::<S, WIDTH>(s, scales[t], v), s.to_f32(sum), acc[t]);
            }
        }
        if BITS == 3 {
            let codes = seconds.get(stride).unwrap_or(&last_second);
            s.prefetch(codes.as_ptr().wrapping_add(AHEAD));
            for t in 0..T {
                let Some(tables) = second[t].first_chunk::<8>() else { continue };
                let sum = dots::<S, 1, 8>(s, s.splat_i(0), codes, tables);
                acc[t] = s.mul_add(s.mul(scales[t], s.splat(4.0)), s.to_f32(sum), acc[t]);
            }
        }
    }
    let mut sums = [0.0; T];
    for t in 0..T {
        sums[t] = s.sum(acc[t]);
    }
    sums
}

/// 16 scales serve as many strides as a group has units. Returns, for each of these strides, which of the
/// scales each sum has, with units in the order `ORDER` of [`UNITS_BY_PLACE`]; and the number of strides.
#[inline(always)]
fn places<const ORDER: usize>(m: &IntGroupView<'_>) -> (&'static [[u8; 16]; 4], usize) {
    match m.spec.group() {
        32 => (&PLACES[ORDER][0], 1),
        64 => (&PLACES[ORDER][1], 2),
        _ => (&PLACES[ORDER][2], 4),
    }
}

#[inline(always)]
fn rows_of_4_bits<S: Bytes, const T: usize>(
    s: S,
    m: &IntGroupView<'_>,
    x: [&TokenQ8; T],
    count: usize,
    first: usize,
    y: &mut [f32],
) {
    for r in 0..count {
        let sums = row_of_4_bits(s, m, x, first + r);
        for (y, sum) in y.chunks_exact_mut(count).zip(sums) {
            y[r] = sum;
        }
    }
}

#[inline(always)]
fn row_of_4_bits<S: Bytes, const T: usize>(
    s: S,
    m: &IntGroupView<'_>,
    x: [&TokenQ8; T],
    row: usize,
) -> [f32; T] {
    let codes = m.row_codes(row);
    let stored = m.row_scales(row).as_flattened();
    let (strides, last_stride) = padded(codes.as_chunks::<64>().0.as_chunks::<4>().0, codes);
    let (sixteens, last_sixteen) = padded(stored.as_chunks::<32>().0, stored);
    let (places, part) = places::<1>(m);
    let (low, mut sixteen) = (s.splat_b(15), s.splat(0.0));
    let mut acc = [s.splat(0.0); T];
    for stride in 0..x[0].unit_scales.len() {
        if stride % part == 0 {
            sixteen = s.f16_to_f32(sixteens.get(stride / part).unwrap_or(&last_sixteen));
        }
        let units = s.lookup(sixteen, s.widen_u8(&places[stride % part]));
        let stored = strides.get(stride).unwrap_or(&last_stride);
        let mut vectors = [low; 4];
        for v in 0..4 {
            s.prefetch(stored[v].as_ptr().wrapping_add(AHEAD));
            vectors[v] = s.load_b(&stored[v]);
        }
        let words = s.transpose_words(vectors);
        let mut fields = [low; 8];
        for w in 0..4 {
            fields[2 * w] = s.and_b(words[w], low);
            fields[2 * w + 1] = s.and_b(s.shr_b::<4>(words[w]), low);
        }
        for t in 0..T {
            let tables: &[Line; 8] = &x[t].tables.as_chunks().0[stride];
            let mut sum = s.zero_small();
            for f in 0..8 {
                sum = s.dot4_small(sum, fields[f], s.load_b(&tables[f]));
            }
            let sum = s.add_i(s.load_i(&x[t].offsets[stride]), s.finish_small(sum));
            let scale = s.mul(units, s.load(&x[t].unit_scales[stride]));
            acc[t] = s.mul_add(scale, s.to_f32(sum), acc[t]);
        }
    }
    let mut sums = [0.0; T];
    for t in 0..T {
        sums[t] = s.sum(acc[t]);
    }
    sums
}

/// Returns `whole`, the complete pieces of `bytes`, and the rest of `bytes` as a piece padded with zeros.
#[inline(always)]
fn padded<'a, P: ZeroPadded>(whole: &'a [P], bytes: &[u8]) -> (&'a [P], P) {
    let mut last = P::ZERO;
    let rest = &bytes[size_of_val(whole)..];
    if !rest.is_empty() {
        last.bytes()[..rest.len()].copy_from_slice(rest);
    }
    (whole, last)
}

trait ZeroPadded {
    const ZERO: Self;
    fn bytes(&mut self) -> &mut [u8];
}

impl<const N: usize> ZeroPadded for [u8; N] {
    const ZERO: Self = [0; N];

    #[inline(always)]
    fn bytes(&mut self) -> &mut [u8] {
        self
    }
}

impl<const N: usize> ZeroPadded for [[u8; 64]; N] {
    const ZERO: Self = [[0; 64]; N];

    #[inline(always)]
    fn bytes(&mut self) -> &mut [u8] {
        self.as_flattened_mut()
    }
}

/// `start` plus the products of the fields of a vector with their activations.
#[inline(always)]
fn dots<S: Bytes, const WIDTH: usize, const TABLES: usize>(
    s: S,
    start: S::I,
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
        _ => {
            // Negates the products with magnitudes of negative activations: −n = !(n − 1).
            let ones = s.splat_i(u32::MAX);
            let negative = s.dot4(ones, s.load_b(&tables[1]), codes);
            let start = s.add_i(start, s.xor(negative, ones));
            return s.dot4(start, s.load_b(&tables[0]), codes);
        }
    }
    s.add_i(start, s.finish_small(sum))
}

// The sum of the largest fields, by width.
const _: () = assert!(8 * 2 <= MAX_SMALL && 4 * 6 <= MAX_SMALL && 8 * 15 <= MAX_SMALL);

/// The scales of the sums of vector `v` of a stride: every `WIDTH` of them belong to one unit.
#[inline(always)]
fn spread<S: Bytes, const WIDTH: usize>(s: S, units: S::F, v: usize) -> S::F {
    if WIDTH == 1 {
        return units;
    }
    s.lookup(units, s.widen_u8(&SPREAD[WIDTH.ilog2() as usize][v]))
}

/// By the logarithm of the width, by vector: the unit of each sum.
const SPREAD: [[[u8; 16]; 8]; 4] = {
    let mut spread = [[[0; 16]; 8]; 4];
    let mut i = 0;
    while i < 512 {
        let (log, v, place) = (i / 128, i / 16 % 8, i % 16);
        spread[log][v][place] = (((v * 16 + place) >> log) % 16) as u8;
        i += 1;
    }
    spread
};

/// Which unit of a stride each of the 16 sums belongs to, in order and after
/// [`Bytes::transpose_words`].
const UNITS_BY_PLACE: [[u8; 16]; 2] = {
    let mut units = [[0; 16]; 2];
    let mut place = 0;
    while place < 16 {
        units[0][place] = place as u8;
        units[1][place] = (place % 4 * 4 + place / 4) as u8;
        place += 1;
    }
    units
};

/// For both orders of units, for groups of 1, 2 and 4 units, for as many strides: which of 16 scales
/// each place has.
const PLACES: [[[[u8; 16]; 4]; 3]; 2] = {
    let mut places = [[[[0; 16]; 4]; 3]; 2];
    let mut i = 0;
    while i < 384 {
        let (order, log, stride, place) = (i / 192, i / 64 % 3, i / 16 % 4, i % 16);
        let unit = stride * 16 + UNITS_BY_PLACE[order][place] as usize;
        places[order][log][stride][place] = ((unit >> log) % 16) as u8;
        i += 1;
    }
    places
};
