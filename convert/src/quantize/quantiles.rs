//! Quantiles of many magnitudes without sorting all of them.

use rayon::prelude::*;

/// Buckets of the histogram: magnitudes by exponent and 8 bits of the fraction.
const BUCKETS: usize = 1 << 16;

/// The bucket of a magnitude, given its bits: nonnegative floats have the order of their bits.
fn bucket(bits: u32) -> usize {
    (bits << 1 >> 16) as usize
}

/// The quantiles `at` (0 to 1, ascending) of the nonnegative values of all parts, interpolated linearly between order
/// statistics as NumPy does by default. `None` if there are no values.
#[must_use]
pub fn quantiles(parts: &[Vec<f32>], at: &[f64]) -> Option<Vec<f64>> {
    let last = parts.iter().map(Vec::len).sum::<usize>().checked_sub(1)?;
    let ranks = at.iter().map(|q| {
        let below = (q * last as f64) as usize;
        [below.min(last), last.min(below + 1)]
    });
    let ranks: Vec<[usize; 2]> = ranks.collect();
    let found = order_statistics(parts, ranks.as_flattened());
    let between = |(q, pair): (&f64, &[f32; 2])| {
        let [below, above] = pair.map(f64::from);
        below + (above - below) * (q * last as f64).fract()
    };
    Some(at.iter().zip(found.as_chunks().0).map(between).collect())
}

/// The values of the given ranks. Sorts only the buckets that contain them.
fn order_statistics(parts: &[Vec<f32>], ranks: &[usize]) -> Vec<f32> {
    let count = |mut counts: Vec<usize>, part: &Vec<f32>| {
        part.iter().for_each(|v| counts[bucket(v.to_bits())] += 1);
        counts
    };
    let zeros = || vec![0; BUCKETS];
    let add = |mut a: Vec<usize>, b: Vec<usize>| {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    };
    let mut below: Vec<usize> =
        parts.par_iter().with_min_len(16).fold(zeros, count).reduce(zeros, add);
    // From counts to running sums: the number of values in lower buckets.
    let mut sum = 0;
    for count in &mut below {
        (sum, *count) = (sum + *count, sum);
    }
    let bucket_of = |rank: usize| below.partition_point(|b| *b <= rank) - 1;
    let mut selected = vec![false; BUCKETS];
    ranks.iter().for_each(|rank| selected[bucket_of(*rank)] = true);
    let inside = |part: &Vec<f32>| -> Vec<u32> {
        part.iter().map(|v| v.to_bits()).filter(|bits| selected[bucket(*bits)]).collect()
    };
    let mut sorted = parts.par_iter().map(inside).collect::<Vec<_>>().concat();
    sorted.par_sort_unstable();
    let value = |rank: &usize| {
        let bucket_of_rank = bucket_of(*rank);
        let start = sorted.partition_point(|bits| bucket(*bits) < bucket_of_rank);
        f32::from_bits(sorted[start + rank - below[bucket_of_rank]])
    };
    ranks.iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_sorted_values() {
        let value = |i: usize| match i % 7 {
            0 => 0.0,
            k => ((i * 7919) % 10007) as f32 * [0.0, 1e-30, 1e-3, 1.0, 1.0, 1e-5, 1e20][k],
        };
        for count in [1, 2, 5, 1000, 20000] {
            let values: Vec<f32> = (0..count).map(value).collect();
            let parts: Vec<Vec<f32>> = values.chunks(333).map(<[f32]>::to_vec).collect();
            let mut sorted = values;
            sorted.sort_by(f32::total_cmp);
            let at: Vec<f64> = (0..=100).map(|i| f64::from(i) / 100.0).collect();
            let found = quantiles(&parts, &at).unwrap();
            for (q, found) in at.iter().zip(found) {
                let rank = q * (count - 1) as f64;
                let (below, above) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
                let (below, above) = (f64::from(below), f64::from(above));
                let expected = below + (above - below) * rank.fract();
                assert!((found - expected).abs() <= 1e-12 * expected, "{q}: {found} {expected}");
            }
        }
        assert_eq!(quantiles(&[Vec::new()], &[0.5]), None);
    }
}
