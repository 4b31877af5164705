//! A line after criterion's: the throughput of a kernel, and its share of the memory bandwidth and of the
//! multiplication rate of the same thread, measured in the same run.

use std::time::{Duration, Instant};

use criterion::BenchmarkGroup;
use criterion::measurement::WallTime;
use stb_kernels::{Isa, probe};

/// Upper bounds of one thread's throughput with an instruction set.
pub struct Limits {
    isa: Isa,
    /// Bytes per second from memory.
    read: f64,
    /// 8-bit products per second.
    multiply: f64,
}

/// The work of one call of a kernel.
pub struct Work {
    pub weights: u64,
    /// Bytes of the stored weights.
    pub bytes: u64,
    pub tokens: u64,
}

/// The shortest of five runs, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let started = Instant::now();
        run();
        started.elapsed().as_secs_f64()
    };
    (0..5).map(time).fold(f64::INFINITY, f64::min)
}

impl Limits {
    /// The limits of each instruction set of this machine, or of the one that `STB_ISA` names.
    pub fn all() -> Vec<Self> {
        let only = std::env::var("STB_ISA").unwrap_or_default();
        let sets = Isa::available().filter(|isa| only.is_empty() || isa.name() == only);
        sets.map(Self::measure).collect()
    }

    fn measure(isa: Isa) -> Self {
        const PRODUCTS: u64 = 1 << 28;
        // Larger than the caches. Not zeros, because the system may map these to a single page.
        let data = vec![1u8; 256 << 20];
        let read = best(|| {
            std::hint::black_box(probe::read(isa, &data));
        });
        let multiply = best(|| {
            std::hint::black_box(probe::multiply(isa, PRODUCTS));
        });
        Self { isa, read: data.len() as f64 / read, multiply: PRODUCTS as f64 / multiply }
    }

    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Runs a benchmark named after the instruction set, and prints the shares.
    #[expect(clippy::print_stdout, reason = "a benchmark reports there")]
    pub fn bench(
        &self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        work: &Work,
        mut run: impl FnMut(),
    ) {
        let mut shortest = f64::INFINITY;
        group.bench_function(self.isa.name(), |b| {
            b.iter_custom(|count| {
                let started = Instant::now();
                (0..count).for_each(|_| run());
                let elapsed: Duration = started.elapsed();
                shortest = shortest.min(elapsed.as_secs_f64() / count as f64);
                elapsed
            });
        });
        // Infinite if the filter skips this benchmark.
        if shortest.is_finite() {
            let weights = work.weights as f64 / shortest;
            let (products, bytes) = (weights * work.tokens as f64, work.bytes as f64 / shortest);
            println!(
                "    at best {:.1} G weights/s; {:.1} G products/s, {:.0} % of {:.0} (every weight multiplied); \
                 {:.1} GB/s, {:.0} % of {:.1} (memory)",
                weights / 1e9,
                products / 1e9,
                100.0 * products / self.multiply,
                self.multiply / 1e9,
                bytes / 1e9,
                100.0 * bytes / self.read,
                self.read / 1e9,
            );
        }
    }
}
