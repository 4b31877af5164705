//! Constants for the windows of a circular bit stream, see [`Bytes::windows`](super::bytes::Bytes::windows).

/// The windows of a stream of 64 steps of `BITS` bits.
pub(super) struct Windows<const BITS: usize>;

/// The steps of a lane of 16 windows take two bytes for each bit of a step.
const LANE_STEPS: usize = 16;

impl<const BITS: usize> Windows<BITS> {
    /// Bytes of the stream.
    pub(super) const BYTES: usize = 8 * BITS;

    /// Where the 16 bytes of each lane begin that [`Bytes::load_stream`](super::bytes::Bytes::load_stream) loads. A short
    /// stream is repeated. The last lane of a longer one begins a byte later, and its last byte is the first of the stream.
    pub(super) const STARTS: [usize; 4] = {
        let mut starts = [0; 4];
        let mut lane = 1;
        while lane < 4 && Self::BYTES > 16 {
            let last = Self::BYTES - 16;
            starts[lane] = if 2 * BITS * lane < last { 2 * BITS * lane } else { last };
            lane += 1;
        }
        starts
    };

    /// Whether the two windows of a pair lie in the same two bytes.
    pub(super) const TOGETHER: bool = BITS != 3 && BITS != 5;

    /// Within each lane, the two bytes of the stream in which the first windows of pairs lie.
    pub(super) const FIRST_BYTES: [u8; 64] = Self::bytes(0);
    /// The same for the second windows.
    pub(super) const SECOND_BYTES: [u8; 64] = Self::bytes(if Self::TOGETHER { 0 } else { 1 });
    /// Factors of these two bytes, as 16-bit numbers: they move the first windows of pairs to the high byte.
    pub(super) const FIRST_FACTORS: [u8; 64] = Self::factors(0);
    /// The same for the second windows.
    pub(super) const SECOND_FACTORS: [u8; 64] = Self::factors(1);

    /// For sets that shift whole words: the bytes of the stream that each word of 8 windows needs first.
    pub(super) const WORD_BYTES: [u8; 64] = {
        let mut bytes = [0; 64];
        let mut i = 0;
        while i < 64 {
            bytes[i] = ((i / 8 * BITS + i % 8) % Self::BYTES) as u8;
            i += 1;
        }
        bytes
    };
    /// The first bits of the windows in these words. A stream of one word is in all of them.
    pub(super) const WORD_BITS: [u8; 64] = {
        let mut bits = [0; 64];
        let mut i = 0;
        while i < 64 {
            bits[i] = (if BITS == 1 { i } else { i % 8 * BITS }) as u8;
            i += 1;
        }
        bits
    };

    /// The step of window `which` of pair `pair` in the lane.
    const fn bit(pair: usize, which: usize) -> usize {
        (2 * pair + which) * BITS
    }

    const fn bytes(which: usize) -> [u8; 64] {
        let mut bytes = [0; 64];
        let mut i = 0;
        while i < 64 {
            let (lane, pair) = (i / 16, i % 16 / 2);
            let at = LANE_STEPS * BITS / 8 * lane + Self::bit(pair, which) / 8 + i % 2;
            bytes[i] = if Self::BYTES <= 16 {
                (at % Self::BYTES) as u8
            } else if lane == 3 {
                (at - Self::STARTS[3] - 1) as u8
            } else {
                (at - Self::STARTS[lane]) as u8
            };
            i += 1;
        }
        bytes
    }

    const fn factors(which: usize) -> [u8; 64] {
        let mut factors = [0; 64];
        let mut i = 0;
        while i < 32 {
            let pair = i % 8;
            let from = if Self::TOGETHER { Self::bit(pair, 0) } else { Self::bit(pair, which) };
            let shift = Self::bit(pair, which) - from / 8 * 8;
            let factor = (1u16 << (8 - shift)).to_le_bytes();
            factors[2 * i] = factor[0];
            factors[2 * i + 1] = factor[1];
            i += 1;
        }
        factors
    }
}
