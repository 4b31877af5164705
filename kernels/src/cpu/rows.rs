//! Encodings that store rows one after another (dense, integer groups, STBLLM): each yields the
//! exact weights of a row in vectors; products and unpacking share that.

use std::ops::Range;

use stb_format::encoding::int_group::UNIT;
use stb_format::encoding::{Dense, DenseView, IntGroupView, StbllmView};
use stb_format::half::f16;

use super::{Simd, lanes};

/// Columns handed over at once: four vectors, which also hides the latency of additions.
pub(crate) const STEP: usize = 64;

/// A matrix that can produce the weights of a row.
pub(crate) trait Rows {
    fn cols(&self) -> usize;

    /// Calls `sink` with the first column and the weights of each [`STEP`] columns of `cols`
    /// (which starts at a multiple) in row `row`. Weights past the last column are unspecified.
    fn each<S: Simd>(
        &self,
        s: S,
        row: usize,
        cols: Range<usize>,
        sink: impl FnMut(usize, [S::F; 4]),
    );
}

/// See [`super::gemv`]. `x` is padded with zeros to a multiple of [`super::PAD`].
#[inline(always)]
pub(crate) fn gemv<S: Simd>(s: S, m: &impl Rows, x: &[f32], first: usize, y: &mut [f32]) {
    for (r, y) in y.iter_mut().enumerate() {
        let mut acc = [s.splat(0.0); 4];
        m.each(
            s,
            first + r,
            0..m.cols(),
            #[inline(always)]
            |col, w| {
                for k in 0..4 {
                    acc[k] = s.mul_add(w[k], s.load(lanes(x, col + 16 * k)), acc[k]);
                }
            },
        );
        *y = s.sum(s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3])));
    }
}

/// Writes columns `from..from + to.len()` of row `row` to `to`. `from` is a multiple of [`STEP`].
#[inline(always)]
pub(crate) fn unpack<S: Simd>(s: S, m: &impl Rows, row: usize, from: usize, to: &mut [f32]) {
    m.each(
        s,
        row,
        from..from + to.len(),
        #[inline(always)]
        |col, w| {
            let mut line = [0.0; STEP];
            let (parts, _) = line.as_chunks_mut::<16>();
            for (part, w) in parts.iter_mut().zip(w) {
                s.store(w, part);
            }
            let to = &mut to[col - from..];
            let n = to.len().min(STEP);
            to[..n].copy_from_slice(&line[..n]);
        },
    );
}

/// `N` bytes from `at`, in place; at the end of `v` copied to `spare` and padded with zeros.
#[inline(always)]
pub(super) fn bytes<'a, const N: usize>(
    v: &'a [u8],
    at: usize,
    spare: &'a mut [u8; N],
) -> &'a [u8; N] {
    let rest = v.get(at..).unwrap_or_default();
    if let Some(chunk) = rest.first_chunk() {
        return chunk;
    }
    spare[..rest.len()].copy_from_slice(rest);
    spare
}

impl Rows for DenseView<'_> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn each<S: Simd>(
        &self,
        s: S,
        row: usize,
        cols: Range<usize>,
        mut sink: impl FnMut(usize, [S::F; 4]),
    ) {
        let data = self.row_bytes(row);
        for col in cols.step_by(STEP) {
            let mut w = [s.splat(0.0); 4];
            for (k, w) in w.iter_mut().enumerate() {
                let at = col + 16 * k;
                *w = match self.kind {
                    Dense::F32 => s.load_bytes(bytes(data, at * 4, &mut [0; 64])),
                    Dense::F16 => s.f16_to_f32(bytes(data, at * 2, &mut [0; 32])),
                    Dense::Bf16 => {
                        s.cast_f(s.shl(s.widen_u16(bytes(data, at * 2, &mut [0; 32])), 16))
                    }
                };
            }
            sink(col, w);
        }
    }
}

impl Rows for IntGroupView<'_> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn each<S: Simd>(
        &self,
        s: S,
        row: usize,
        cols: Range<usize>,
        mut sink: impl FnMut(usize, [S::F; 4]),
    ) {
        let (planes, scales) = (self.row_planes(row), self.row_scales(row));
        let group = self.spec.group();
        // Odd codes of few bits are twice the stored number, plus the lowest code.
        let step = s.splat(if self.spec.is_odd() { 2.0 } else { 1.0 });
        let lowest = s.splat(f32::from(self.spec.limits().0));
        for col in cols.step_by(STEP) {
            let mut w = [s.splat(0.0); 4];
            for half in 0..2 {
                let at = col + UNIT * half;
                let scale = scales.get(at / group).map_or(0.0, |b| f16::from_le_bytes(*b).to_f32());
                let scale = s.splat(scale);
                let numbers = numbers(s, self.spec.bits(), planes, at);
                for (k, number) in numbers.into_iter().enumerate() {
                    let code = s.mul_add(s.to_f32(number), step, lowest);
                    w[2 * half + k] = s.mul(code, scale);
                }
            }
            sink(col, w);
        }
    }
}

/// Codes less the lowest one of the unit of 32 columns from `at`; for odd codes, half of that.
#[inline(always)]
fn numbers<S: Simd>(s: S, bits: u8, planes: [&[u8]; 2], at: usize) -> [S::I; 2] {
    let unit = at / UNIT;
    let line = match bits {
        1 => single_bits(planes[0], unit),
        2 => pairs_of_bits(planes[0], unit),
        3 => {
            let mut line = pairs_of_bits(planes[0], unit);
            let upper = single_bits(planes[1], unit);
            for k in 0..UNIT {
                line[k] |= upper[k] << 2;
            }
            line
        }
        4 => {
            let packed = s.widen_u8(bytes(planes[0], unit * 16, &mut [0; 16]));
            return [s.and(packed, s.splat_i(15)), s.shr(packed, 4)];
        }
        _ => {
            // Signed bytes with the top bit flipped are unsigned, less −128.
            let flip = s.splat_i(128);
            return [0, 16].map(
                #[inline(always)]
                |k| s.xor(s.widen_u8(bytes(planes[0], at + k, &mut [0; 16])), flip),
            );
        }
    };
    let (halves, _) = line.as_chunks::<16>();
    [s.widen_u8(&halves[0]), s.widen_u8(&halves[1])]
}

/// The numbers of a unit in a plane of 1 bit, in the order of columns.
#[inline(always)]
fn single_bits(plane: &[u8], unit: usize) -> [u8; UNIT] {
    let word = u32::from_le_bytes(*bytes(plane, unit * 4, &mut [0; 4]));
    let mut line = [0; UNIT];
    for (field, to) in line.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *to = (word >> field & 0x0101_0101).to_le_bytes();
    }
    line
}

/// The same for 2 bits.
#[inline(always)]
fn pairs_of_bits(plane: &[u8], unit: usize) -> [u8; UNIT] {
    let word = u64::from_le_bytes(*bytes(plane, unit * 8, &mut [0; 8]));
    let mut line = [0; UNIT];
    for (field, to) in line.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *to = (word >> (2 * field) & 0x0303_0303_0303_0303).to_le_bytes();
    }
    line
}

impl Rows for StbllmView<'_> {
    #[inline(always)]
    fn cols(&self) -> usize {
        self.cols
    }

    #[inline(always)]
    fn each<S: Simd>(
        &self,
        s: S,
        row: usize,
        cols: Range<usize>,
        mut sink: impl FnMut(usize, [S::F; 4]),
    ) {
        let mut table = s.splat(0.0);
        let mut block = usize::MAX;
        for unit in cols.start / STEP..cols.end.div_ceil(STEP) {
            let (low, high) = self.state_words(row, unit);
            let negative = s.deposit(self.sign_word(row, unit), low | high);
            let salient = self.salient_word(unit);
            let mut w = [s.splat(0.0); 4];
            for (k, w) in w.iter_mut().enumerate() {
                let col = unit * STEP + 16 * k;
                // Blocks are multiples of 32 columns, so a vector never straddles two.
                if col / self.spec.block() != block {
                    block = col / self.spec.block();
                    table = weight_table(s, self.block_scales(row, block));
                }
                let at = 16 * k;
                let low = s.select_bits((low >> at) as u16, 1);
                let high = s.select_bits((high >> at) as u16, 2);
                let salient = s.select_bits((salient >> at) as u16, 4);
                let negative = s.select_bits((negative >> at) as u16, 8);
                let index = s.or(s.or(low, high), s.or(salient, negative));
                *w = s.lookup(table, index);
            }
            sink(unit * STEP, w);
        }
    }
}

/// The weight for each state (bits 0 and 1), salient flag (bit 2) and sign (bit 3).
#[inline(always)]
fn weight_table<S: Simd>(s: S, scales: [f32; 5]) -> S::F {
    let [d, i, p, a, b] = scales;
    #[rustfmt::skip]
    let table = [
        0.0,  d,  i,  p, 0.0,  a + b,  a - b, 0.0,
        0.0, -d, -i, -p, 0.0, -a + b, -a - b, 0.0,
    ];
    s.load(&table)
}
