//! Extracts look-up indices from the codes of the N:M encoding.

use stb_format::encoding::nm::CHUNK_QUADS;

use crate::cpu::arch::bytes::{Bytes, NONE};

/// Quads whose codes are extracted together: as many as a byte has 2-bit fields.
pub(super) const PART: usize = 4;

/// The look-up table of one quad, a lane for each of its groups: the activations of the group, then their
/// negatives; with M = 4 both are repeated to fill the lane.
#[inline(always)]
pub(super) fn signed_table<const M: usize>(quad: &[i8], table: &mut [u8; 64]) {
    for (lane, group) in table.as_chunks_mut::<16>().0.iter_mut().zip(quad.as_chunks::<M>().0) {
        let mut bytes = [0; 8];
        bytes[..M].copy_from_slice(&group.map(i8::cast_unsigned));
        let plus = u64::from_le_bytes(bytes);
        let halves =
            if M == 8 { [plus, negatives(plus)] } else { [plus | negatives(plus) << 32; 2] };
        let (low, high) = lane.split_at_mut(8);
        low.copy_from_slice(&halves[0].to_le_bytes());
        high.copy_from_slice(&halves[1].to_le_bytes());
    }
}

/// Negates each byte: its complement plus one, without a carry into the next byte.
#[inline(always)]
fn negatives(bytes: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let complement = !bytes;
    ((complement & LOW) + 0x0101_0101_0101_0101) ^ (complement & !LOW)
}

/// The complete chunks of a tile, and the last incomplete one, padded with zero codes.
#[inline(always)]
pub(super) fn chunks<const BITS: usize>(
    codes: &[[u8; 64]],
    quads: usize,
) -> (&[[[u8; 64]; BITS]], [[u8; 64]; BITS]) {
    let whole = codes.as_chunks().0;
    let whole = &whole[..whole.len().min(quads / CHUNK_QUADS)];
    let mut last = [[0; 64]; BITS];
    if !quads.is_multiple_of(CHUNK_QUADS) {
        copy_planes(&codes[whole.len() * BITS..], quads % CHUNK_QUADS, &mut last);
    }
    (whole, last)
}

/// Copies the planes of `count` quads, fewer than a chunk has, to their places in a complete chunk.
#[cold]
#[inline(never)]
fn copy_planes(from: &[[u8; 64]], count: usize, to: &mut [[u8; 64]]) {
    let bits = to.len();
    let (mut from, mut to) = (from, to);
    for width in [4, 2, 1] {
        if bits & width != 0 {
            let (plane, rest) = to.split_at_mut(width);
            let (stored, later) = from.split_at((count * width).div_ceil(8).min(from.len()));
            plane[..stored.len()].copy_from_slice(stored);
            (from, to) = (later, rest);
        }
    }
}

/// Half of a chunk: [`PART`] quads.
#[derive(Clone, Copy)]
pub(super) struct CodePlanes<'a, const BITS: usize> {
    pub chunk: &'a [[u8; 64]; BITS],
    /// Which half: 0 or 1.
    pub half: usize,
    /// Whether bytes are moved to the order of [`Bytes::arrange`], or stay as stored.
    pub arranged: bool,
}

impl<const BITS: usize> CodePlanes<'_, BITS> {
    /// First vector of the planes of width 2 and 1; the plane of width 4 comes first.
    const TWO: usize = BITS & 4;
    const ONE: usize = BITS & 6;

    #[inline(always)]
    fn load<S: Bytes>(&self, s: S, at: usize) -> S::B {
        let stored = s.load_b(&self.chunk[at]);
        if self.arranged { s.arrange(stored) } else { stored }
    }

    /// The 4-bit fields as indices: low nibbles hold quads 0 and 2 of the part, high nibbles 1 and 3.
    #[inline(always)]
    fn nibbles<S: Bytes>(&self, s: S) -> [S::B; PART] {
        let a = self.load(s, 2 * self.half);
        let b = self.load(s, 2 * self.half + 1);
        let mask = s.splat_b(15);
        [
            s.and_b(a, mask),
            s.and_b(s.shr_b::<4>(a), mask),
            s.and_b(b, mask),
            s.and_b(s.shr_b::<4>(b), mask),
        ]
    }

    /// Four fields of two bits each.
    #[inline(always)]
    fn twos<S: Bytes>(&self, s: S) -> S::B {
        self.load(s, Self::TWO + self.half)
    }

    /// The bits of quads 0 to 3 of the part at bits 0 to 3.
    #[inline(always)]
    fn ones<S: Bytes>(&self, s: S) -> S::B {
        let all = self.load(s, Self::ONE);
        if self.half == 0 { all } else { s.shr_b::<4>(all) }
    }
}

/// The codes of each quad of a part: the position and above it the sign; for 2:4 both positions and above
/// them the sign. Not for 2:8, see [`codes_of_8`].
#[inline(always)]
pub(super) fn indices<S: Bytes, const N: usize, const M: usize, const BITS: usize>(
    s: S,
    planes: CodePlanes<'_, BITS>,
) -> [S::B; PART] {
    let sixteen = s.splat_b(16);
    match (N, M) {
        (1, 4) => positions_of_4(s, planes),
        (2, 4) => {
            let (mut index, sign) = (planes.nibbles(s), planes.ones(s));
            let signs =
                [s.shl_b::<4>(sign), s.shl_b::<3>(sign), s.shl_b::<2>(sign), s.shl_b::<1>(sign)];
            for q in 0..PART {
                index[q] = s.or_b(index[q], s.and_b(signs[q], sixteen));
            }
            index
        }
        _ => planes.nibbles(s),
    }
}

#[inline(always)]
fn positions_of_4<S: Bytes, const BITS: usize>(s: S, planes: CodePlanes<'_, BITS>) -> [S::B; PART] {
    let position = planes.twos(s);
    let positions =
        [position, s.shr_b::<2>(position), s.shr_b::<4>(position), s.shr_b::<6>(position)];
    let signs = signs_at_2(s, planes);
    let three = s.splat_b(3);
    let mut index = [s.splat_b(0); PART];
    for q in 0..PART {
        index[q] = s.or_b(s.and_b(positions[q], three), signs[q]);
    }
    index
}

/// The sign of each quad's codes at bit 2.
#[inline(always)]
fn signs_at_2<S: Bytes, const BITS: usize>(s: S, planes: CodePlanes<'_, BITS>) -> [S::B; PART] {
    let (sign, four) = (planes.ones(s), s.splat_b(4));
    [
        s.and_b(s.shl_b::<2>(sign), four),
        s.and_b(s.shl_b::<1>(sign), four),
        s.and_b(sign, four),
        s.and_b(s.shr_b::<1>(sign), four),
    ]
}

/// 2:`M`: the indices of the first and of the second weight; the bits of [`NONE`] are set where a group
/// has no second weight.
#[inline(always)]
pub(super) fn pairs<S: Bytes, const M: usize, const BITS: usize>(
    s: S,
    planes: CodePlanes<'_, BITS>,
) -> [[S::B; PART]; 2] {
    if M == 8 { pairs_of_8(s, planes) } else { pairs_of_4(s, planes) }
}

#[inline(always)]
fn pairs_of_4<S: Bytes, const BITS: usize>(
    s: S,
    planes: CodePlanes<'_, BITS>,
) -> [[S::B; PART]; 2] {
    /// The second index for a positive sign, by i + 4j: j if i < j, negated if i > j, none if i = j.
    const SECOND: [u8; 16] = [NONE, 4, 4, 4, 1, NONE, 5, 5, 2, 2, NONE, 6, 3, 3, 3, NONE];
    let (both, signs) = (planes.nibbles(s), signs_at_2(s, planes));
    let three = s.splat_b(3);
    let mut lanes = [0; 64];
    for lane in lanes.as_chunks_mut().0 {
        *lane = SECOND;
    }
    let second = s.load_b(&lanes);
    let mut index = [[s.splat_b(0); PART]; 2];
    for q in 0..PART {
        index[0][q] = s.or_b(s.and_b(both[q], three), signs[q]);
        index[1][q] = s.xor_b(s.lookup_b(second, both[q]), signs[q]);
    }
    index
}

#[inline(always)]
fn pairs_of_8<S: Bytes, const BITS: usize>(
    s: S,
    planes: CodePlanes<'_, BITS>,
) -> [[S::B; PART]; 2] {
    let low = planes.nibbles(s); // i, and bit 0 of j
    let (high, sign) = (planes.twos(s), planes.ones(s)); // bits 1 and 2 of j; s
    let highs = [s.shl_b::<1>(high), s.shr_b::<1>(high), s.shr_b::<3>(high), s.shr_b::<5>(high)];
    let signs = [s.shl_b::<3>(sign), s.shl_b::<2>(sign), s.shl_b::<1>(sign), sign];
    let (one, six, seven, eight) = (s.splat_b(1), s.splat_b(6), s.splat_b(7), s.splat_b(8));
    // By i − j from 0 to 7: the bits of the second index to flip.
    let mut changes = [8; 64];
    for lane in changes.as_chunks_mut::<16>().0 {
        lane[0] = NONE;
    }
    let changes = s.load_b(&changes);
    let mut index = [[s.splat_b(0); PART]; 2];
    for q in 0..PART {
        let i = s.and_b(low[q], seven);
        let j = s.or_b(s.and_b(s.shr_b::<3>(low[q]), one), s.and_b(highs[q], six));
        let sign = s.and_b(signs[q], eight);
        index[0][q] = s.or_b(i, sign);
        // If i > j, j has the opposite sign; if i = j, there is no second weight. Negative differences have
        // their top bit set, so their look-up gives zero.
        let change = s.lookup_b(changes, s.sub_b(i, j));
        index[1][q] = s.xor_b(s.or_b(j, sign), change);
    }
    index
}

/// 2:8: the codes themselves, i + 8j + 64s.
#[inline(always)]
pub(super) fn codes_of_8<S: Bytes, const BITS: usize>(
    s: S,
    planes: CodePlanes<'_, BITS>,
) -> [S::B; PART] {
    let mut codes = planes.nibbles(s);
    let (high, sign) = (planes.twos(s), planes.ones(s));
    let highs = [s.shl_b::<4>(high), s.shl_b::<2>(high), high, s.shr_b::<2>(high)];
    let signs = [s.shl_b::<6>(sign), s.shl_b::<5>(sign), s.shl_b::<4>(sign), s.shl_b::<3>(sign)];
    let (bits_of_j, bit_of_sign) = (s.splat_b(0x30), s.splat_b(0x40));
    for q in 0..PART {
        let upper = s.or_b(s.and_b(highs[q], bits_of_j), s.and_b(signs[q], bit_of_sign));
        codes[q] = s.or_b(codes[q], upper);
    }
    codes
}
