//! 4-bit integer groups with rounded activations: the 64 bytes of 128 columns are 4 lanes of 32
//! columns, in the low and in the high halves of the bytes.

use stb_format::encoding::IntGroupView;

use super::bytes::Bytes;
use super::int8::{BLOCK, Rounded};

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

/// See [`super::matvec`].
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
    let (codes, scales) = (m.row_codes(row), m.row_scales(row).as_flattened());
    let (whole, rest) = codes.as_chunks::<64>();
    let mut acc = s.splat(0.0);
    // 16 scales at a time serve GROUP/8 blocks.
    for (part, from) in (0..x.scales.len()).step_by(GROUP / 8).enumerate() {
        let mut spare = [0; 32];
        let stored = scales.get(part * 32..).unwrap_or_default();
        let sixteen = stored.first_chunk().unwrap_or_else(|| {
            spare[..stored.len()].copy_from_slice(stored);
            &spare
        });
        let scales = s.f16_to_f32(sixteen);
        for k in 0..(GROUP / 8).min(x.scales.len() - from) {
            let block = from + k;
            let mut spare = [0; 64];
            let codes = whole.get(block).unwrap_or_else(|| {
                spare[..rest.len()].copy_from_slice(rest);
                &spare
            });
            let codes = s.load_b(codes);
            let low = s.and_b(codes, s.splat_b(15));
            let high = s.and_b(s.shr_b::<4>(codes), s.splat_b(15));
            let sum = s.load_i(&x.sums[block]);
            let sum = s.dot4(sum, low, s.load_b(&x.tables[2 * block]));
            let sum = s.dot4(sum, high, s.load_b(&x.tables[2 * block + 1]));
            let scale = s.lookup(scales, s.widen_u8(&PLACES[GROUP / 64][k]));
            let scale = s.mul(scale, s.splat(x.scales[block]));
            acc = s.mul_add(scale, s.to_f32(sum), acc);
        }
    }
    s.sum(acc)
}

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
