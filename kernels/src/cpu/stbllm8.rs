//! The STBLLM structure with rounded activations. A weight is one of five magnitudes with a sign, so
//! a product is five sums of signed activations times magnitudes: over the columns of each region, and
//! two over salient ones, by sign and by the sign of the residual. Operations for 64 weights: a deposit of signs, a masked negation, and for each kind
//! some logic on words, a mask and one `dot4_small`; the two kinds of salient columns only where there are
//! such columns, which is the same for all rows.
//!
//! No sum overflows: a block of activations is two units, far fewer than `dot4_small` allows.

use stb_format::encoding::StbllmView;
use stb_format::encoding::stbllm::{SCALES, UNIT};

use super::bytes::Bytes;
use super::int8::{BLOCK, Rounded};
use super::rows::bytes;

/// Units of a block of activations.
const UNITS: usize = BLOCK / UNIT;

/// The codes of each unit.
pub(super) fn arrange(x: &[i8], tables: &mut Vec<[u8; UNIT]>) {
    tables.clear();
    tables.extend(x.as_chunks::<UNIT>().0.iter().map(|unit| unit.map(i8::cast_unsigned)));
}

/// See [`super::matvec`].
#[inline(always)]
pub(super) fn matvec<S: Bytes>(s: S, m: &StbllmView<'_>, x: &Rounded, first: usize, y: &mut [f32]) {
    for (r, y) in y.iter_mut().enumerate() {
        let row = first + r;
        let mut total = s.splat(0.0);
        for (block, activations) in x.tables.chunks(UNITS).enumerate() {
            let units = block * UNITS..m.units().min((block + 1) * UNITS);
            let mut sums = Sums::new(s);
            for (unit, x) in units.zip(activations) {
                sums.add_unit(s, m, row, unit, s.load_b(x));
            }
            let weight_block = block * BLOCK / m.spec.block();
            total = sums.times(s, m, row, weight_block, x.scales[block], total);
        }
        *y = s.sum(total);
    }
}

/// [`StbllmView::sign_word`] in one load where there are bytes behind it.
#[inline(always)]
fn signs(m: &StbllmView<'_>, row: usize, unit: usize) -> u64 {
    let n = m.spec.n();
    let mut spare = [0; 8];
    let word = *bytes(m.signs, (row * m.units() + unit) * n, &mut spare);
    u64::from_le_bytes(word) & u64::MAX >> (64 - 8 * n)
}

/// −x in the bytes of these bits.
#[inline(always)]
fn negate<S: Bytes>(s: S, x: S::B, bits: u64) -> S::B {
    let mask = s.select_bytes(bits, 255);
    s.sub_b(s.xor_b(x, mask), mask)
}

/// Sums of activations by the kind of their weights.
struct Sums<S: Bytes> {
    /// Dense, intermediate, sparse.
    regions: [S::Small; 3],
    /// Salient, by the sign of the weight and by that of its residual.
    salient: [S::Small; 2],
    any_salient: bool,
}

impl<S: Bytes> Sums<S> {
    #[inline(always)]
    fn new(s: S) -> Self {
        let zero = s.zero_small();
        Self { regions: [zero; 3], salient: [zero; 2], any_salient: false }
    }

    #[inline(always)]
    fn add_unit(&mut self, s: S, m: &StbllmView<'_>, row: usize, unit: usize, x: S::B) {
        let (low, high) = m.state_words(row, unit);
        let residual = x;
        let x = negate(s, x, s.deposit(signs(m, row, unit), low | high));
        let salient = m.salient_word(unit);
        let kinds = [low & !high & !salient, high & !low & !salient, low & high & !salient];
        for (sum, kind) in self.regions.iter_mut().zip(kinds) {
            *sum = s.dot4_small(*sum, s.select_bytes(kind, 1), x);
        }
        if salient != 0 {
            self.any_salient = true;
            // The states of salient columns, 1 and 2, are the signs of the residual.
            let kept = s.select_bytes((low ^ high) & salient, 1);
            let [main, second] = self.salient;
            let second = s.dot4_small(second, kept, negate(s, residual, high));
            self.salient = [s.dot4_small(main, kept, x), second];
        }
    }

    /// `total` plus the products with the scales of the row in a block.
    #[inline(always)]
    fn times(
        &self,
        s: S,
        m: &StbllmView<'_>,
        row: usize,
        block: usize,
        activation: f32,
        total: S::F,
    ) -> S::F {
        let at = (row * m.blocks() + block) * SCALES * 2;
        let mut scales = [0.0; 16];
        let mut spare = [0; 32];
        let stored = bytes(m.scales.as_flattened(), at, &mut spare);
        s.store(s.mul(s.f16_to_f32(stored), s.splat(activation)), &mut scales);
        let [dense, intermediate, sparse, salient, residual, ..] = scales;
        let mut total = total;
        for (sum, scale) in self.regions.iter().zip([dense, intermediate, sparse]) {
            total = s.mul_add(s.to_f32(s.finish_small(*sum)), s.splat(scale), total);
        }
        if self.any_salient {
            for (sum, scale) in self.salient.iter().zip([salient, residual]) {
                total = s.mul_add(s.to_f32(s.finish_small(*sum)), s.splat(scale), total);
            }
        }
        total
    }
}
