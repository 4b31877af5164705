//! 4-bit integer groups with rounded activations: the 64 bytes of 128 columns are 4 lanes of 32
//! columns, in the low and in the high halves of the bytes.

use stb_format::encoding::IntGroupView;

use super::bytes::Bytes;
use super::int8::{BLOCK, Rounded};
use super::rows::bytes;

/// For each 128 columns two tables, what belongs to low and to high halves, and −8 times the sum of
/// activations of each lane at its first place: codes are stored with an offset of 8.
pub(super) fn arrange(x: &[i8], tables: &mut Vec<[u8; 64]>, sums: &mut Vec<[i32; 16]>) {
    tables.clear();
    for block in x.as_chunks::<BLOCK>().0 {
        let (mut low, mut high, mut sum) = ([0; 64], [0; 64], [0; 16]);
        for (lane, part) in block.as_chunks::<32>().0.iter().enumerate() {
            for k in 0..16 {
                low[lane * 16 + k] = part[k].cast_unsigned();
                high[lane * 16 + k] = part[k + 16].cast_unsigned();
            }
            sum[lane * 4] = -8 * part.iter().map(|v| i32::from(*v)).sum::<i32>();
        }
        tables.extend([low, high]);
        sums.push(sum);
    }
}

/// See [`super::matvec`]. One row at a time: several at once, each half a page long, share the loads
/// of activations but were 10 to 25 % slower from memory.
#[inline(always)]
pub(super) fn matvec<S: Bytes>(
    s: S,
    m: &IntGroupView<'_>,
    x: &Rounded,
    first: usize,
    y: &mut [f32],
) {
    for (r, y) in y.iter_mut().enumerate() {
        *y = match m.spec.group() {
            32 => row::<S, 32>(s, m, x, first + r),
            64 => row::<S, 64>(s, m, x, first + r),
            _ => row::<S, 128>(s, m, x, first + r),
        };
    }
}

#[inline(always)]
fn row<S: Bytes, const GROUP: usize>(s: S, m: &IntGroupView<'_>, x: &Rounded, row: usize) -> f32 {
    let (codes, rest) = m.row_codes(row).as_chunks::<64>();
    let scales = m.row_scales(row).as_flattened();
    let blocks = x.tables.as_chunks::<2>().0.iter().zip(&x.sums).zip(&x.scales);
    let mut blocks = blocks.map(
        #[inline(always)]
        |((tables, sums), scale)| Block { tables, sums, scale: *scale },
    );
    let mut acc = s.splat(0.0);
    // 16 scales at a time serve GROUP/8 blocks.
    for (part, codes) in codes.chunks(GROUP / 8).enumerate() {
        let sixteen = s.f16_to_f32(bytes(scales, part * 32, &mut [0; 32]));
        for ((codes, places), block) in codes.iter().zip(&PLACES[GROUP / 64]).zip(&mut blocks) {
            s.prefetch(codes.as_ptr().wrapping_add(AHEAD));
            acc = block.add(s, codes, s.lookup(sixteen, s.widen_u8(places)), acc);
        }
    }
    if let (false, Some(block)) = (rest.is_empty(), blocks.next()) {
        let mut last = [0; 64];
        last[..rest.len()].copy_from_slice(rest);
        let (part, k) = (codes.len() / (GROUP / 8), codes.len() % (GROUP / 8));
        let sixteen = s.f16_to_f32(bytes(scales, part * 32, &mut [0; 32]));
        let scales = s.lookup(sixteen, s.widen_u8(&PLACES[GROUP / 64][k]));
        acc = block.add(s, &last, scales, acc);
    }
    s.sum(acc)
}

/// Activations of 128 columns.
struct Block<'a> {
    tables: &'a [[u8; 64]; 2],
    sums: &'a [i32; 16],
    scale: f32,
}

impl Block<'_> {
    /// `acc` plus the products with the weights of 64 bytes of codes, four columns of a lane in each
    /// place.
    #[inline(always)]
    fn add<S: Bytes>(&self, s: S, codes: &[u8; 64], scales: S::F, acc: S::F) -> S::F {
        let codes = s.load_b(codes);
        let (low, high) = (s.and_b(codes, s.splat_b(15)), s.shr_b::<4>(codes));
        let sum = s.dot4(s.load_i(self.sums), low, s.load_b(&self.tables[0]));
        let sum = s.dot4(sum, s.and_b(high, s.splat_b(15)), s.load_b(&self.tables[1]));
        s.mul_add(s.mul(scales, s.splat(self.scale)), s.to_f32(sum), acc)
    }
}

/// How far ahead to fetch codes, in bytes: rows follow one another.
const AHEAD: usize = 4096;

/// For groups of 32, 64 and 128 columns: which of 16 scales belongs to the four numbers of each of
/// the four lanes of block k.
const PLACES: [[[u8; 16]; 16]; 3] = {
    let mut places = [[[0; 16]; 16]; 3];
    let mut kind = 0;
    while kind < 3 {
        let group = 32 << kind;
        let mut i = 0;
        while i < 256 {
            let (k, lane) = (i / 16, i % 16 / 4);
            places[kind][k][i % 16] = ((k * BLOCK + lane * 32) / group % 16) as u8;
            i += 1;
        }
        kind += 1;
    }
    places
};
