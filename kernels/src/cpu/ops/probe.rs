//! Upper bounds of this machine's memory and multiplication speed, to compare kernels with.

use std::hint::black_box;

use crate::cpu::arch::bytes::{Aligned, Bytes, TILE_COLS, Task, TileSums, TileTask, TileUnit};
use crate::isa::Isa;

/// Reads all of `data` as fast as kernels can; the result depends on every byte.
#[must_use]
pub fn read(isa: Isa, data: &[u8]) -> u64 {
    isa.run(ReadProbe(data))
}

struct ReadProbe<'a>(&'a [u8]);

impl Task for ReadProbe<'_> {
    type Output = u64;

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) -> u64 {
        const WIDE: usize = 4;
        let (lines, tail) = self.0.as_chunks::<64>();
        let mut acc = [s.splat_b(0); WIDE];
        for lines in lines.chunks_exact(WIDE) {
            for (acc, line) in acc.iter_mut().zip(lines) {
                s.prefetch(line.as_ptr().wrapping_add(4096));
                *acc = s.xor_b(*acc, s.load_b(line));
            }
        }
        let rest = lines.chunks_exact(WIDE).remainder();
        let mut all = rest.iter().fold(acc[0], |acc, line| s.xor_b(acc, s.load_b(line)));
        for acc in &acc[1..] {
            all = s.xor_b(all, *acc);
        }
        let mut bytes = [0; 64];
        s.store_b(all, &mut bytes);
        bytes.iter().chain(tail).fold(0, |sum, b| sum.rotate_left(8) ^ u64::from(*b))
    }
}

/// Multiplies 8-bit numbers from cache, as fast as the instruction set can, at least `count` times;
/// returns how many multiplications were done.
#[must_use]
pub fn multiply(isa: Isa, count: u64) -> u64 {
    isa.run(MultiplyProbe(count))
}

struct MultiplyProbe(u64);

impl Task for MultiplyProbe {
    type Output = u64;

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) -> u64 {
        if let Some(done) = s.with_tiles(TileProbe(self.0)) {
            return done;
        }
        let mut done = 0;
        // Enough independent sums to hide the latency of any instruction set here.
        const SUMS: usize = 8;
        const STEPS: usize = 64;
        let (u, mut v) = (s.splat_b(1), s.splat_b(2));
        let mut total = [s.splat_i(0); SUMS];
        while done < self.0 {
            let mut sums = [s.zero_small(); SUMS];
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = s.dot4_small(*sum, u, v);
                }
                // Makes each step depend on the one before, so that the compiler cannot merge them.
                v = s.sub_b(v, u);
            }
            for (total, sum) in total.iter_mut().zip(sums) {
                *total = s.add_i(*total, s.finish_small(sum));
            }
            done += (STEPS * SUMS * 64) as u64;
        }
        for total in total {
            let mut bytes = [0; 64];
            s.store_words(total, &mut bytes);
            black_box(bytes);
        }
        done
    }
}

#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "only AMX has tiles"))]
struct TileProbe(u64);

impl TileTask for TileProbe {
    type Output = u64;

    #[inline(always)]
    fn run<S: Bytes>(self, _: S, unit: &impl TileUnit) -> u64 {
        let w = Aligned([[1u8; 64]; TILE_COLS / 4]);
        let x = Aligned([[1i8; TILE_COLS]; 32]);
        let mut sums: Aligned<TileSums> = Aligned([[[[0; 16]; 16]; 2]; 2]);
        let mut done = 0;
        while done < self.0 {
            unit.products::<2>([&w.0, &w.0], black_box(&x.0), &mut sums.0);
            done += 2 * 16 * 2 * 16 * TILE_COLS as u64;
        }
        black_box(&sums.0);
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts() {
        let mut data: Vec<u8> = (0..1000).map(|i| (i * 7) as u8).collect();
        for isa in Isa::available() {
            let before = read(isa, &data);
            assert_eq!(before, read(Isa::scalar(), &data), "{}", isa.name());
            for at in [0, 63, 64, 511, 959, 960, 999] {
                data[at] ^= 1;
                assert_ne!(before, read(isa, &data), "{} byte {at}", isa.name());
                data[at] ^= 1;
            }
            assert!(multiply(isa, 1 << 20) >= 1 << 20);
        }
    }
}
