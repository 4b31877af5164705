//! Runs planned launches in the emulator: addresses in plans stand for its buffers.

use stb_kernels::cuda;

use super::emulator::{Launch, Piece};

/// The first bits of an address in a plan, which no other field of a parameter has. The number of the
/// buffer and the offset follow.
const TAG: u64 = 0x7a5a << 48;

/// The address of the start of a buffer.
pub const fn address(buffer: usize) -> u64 {
    TAG | (buffer as u64) << 40
}

/// Converts a plan to a launch whose addresses are pointers into buffers.
pub fn launch(plan: &cuda::Launch) -> Launch {
    launch_at(plan, |word| {
        let is_address = word & 0xffff << 48 == TAG;
        is_address.then_some(((word >> 40 & 255) as usize, (word & ((1 << 40) - 1)) as usize))
    })
}

/// The same for other addresses: `pointer` returns the buffer and the offset of a word that is an address.
pub fn launch_at(plan: &cuda::Launch, pointer: impl Fn(u64) -> Option<(usize, usize)>) -> Launch {
    let piece = |word: &u64| match pointer(*word) {
        Some((buffer, offset)) => Piece::Pointer { buffer, offset },
        None => Piece::Bytes(word.to_le_bytes().to_vec()),
    };
    let [x, y, z] = plan.blocks.map(|n| n as usize);
    Launch::new(plan.kernel)
        .grid(x, y, z)
        .block(plan.threads as usize, 1, 1)
        .shared(plan.shared as usize)
        .pieces(plan.params.iter().map(piece).collect())
}
