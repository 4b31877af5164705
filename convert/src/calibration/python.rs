//! Windows as published code draws them: with Python's `random`.

use stb_runtime::Result;

use super::too_short;

/// Window numbers `first..first + count` of `length` tokens: their starts are `random.randint(0, n - length - 1)` of Python
/// after `random.seed(seed)`, where `n` is the number of `tokens`.
///
/// # Errors
/// [`stb_runtime::Error::Usage`] if there are too few tokens.
pub(super) fn windows(
    tokens: &[u32],
    seed: u64,
    length: usize,
    first: usize,
    count: usize,
) -> Result<Vec<Vec<u32>>> {
    // The last start is never drawn.
    let starts = tokens.len().saturating_sub(length);
    let starts = u32::try_from(starts).ok().filter(|n| *n > 0);
    let starts = starts.ok_or_else(|| too_short(tokens.len(), length))?;
    let mut random = PythonRandom::new(seed);
    let mut draw = || {
        let start = random.below(starts) as usize;
        tokens[start..start + length].to_vec()
    };
    Ok((0..first + count).map(|_| draw()).skip(first).collect())
}

/// `random.seed(n)` and `random.randrange(n)` of Python 3.2 and newer.
struct PythonRandom(rand_mt::Mt);

impl PythonRandom {
    fn new(seed: u64) -> Self {
        // 32-bit words of the seed, least significant first; a zero high word is dropped.
        let words = [seed as u32, (seed >> 32) as u32];
        let used = if words[1] == 0 { 1 } else { 2 };
        Self(rand_mt::Mt::new_with_key(words.into_iter().take(used)))
    }

    /// A random integer below `n`, which is at least 1.
    fn below(&mut self, n: u32) -> u32 {
        let bits = u32::BITS - n.leading_zeros();
        loop {
            let value = self.0.next_u32() >> (u32::BITS - bits);
            if value < n {
                return value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `random.seed(0); [random.randint(0, 99999) for _ in range(5)]` and so on, from Python 3.
    #[test]
    fn python_draws() {
        let draw = |seed: u64, n: u32| {
            let mut random = PythonRandom::new(seed);
            [(); 5].map(|()| random.below(n))
        };
        assert_eq!(draw(0, 100_000), [50494, 99346, 55125, 5306, 33936]);
        assert_eq!(draw((1 << 40) + 7, 256), [243, 128, 64, 192, 185]);
    }

    #[test]
    fn windows_start_where_python_says() {
        let tokens: Vec<u32> = (0..100_002).collect();
        let starts = |first, count| -> Vec<u32> {
            let drawn = windows(&tokens, 0, 2, first, count).unwrap();
            drawn.iter().map(|w| w[0]).collect()
        };
        assert_eq!(starts(0, 5), [50494, 99346, 55125, 5306, 33936]);
        assert_eq!(starts(2, 3), [55125, 5306, 33936]);
        assert!(windows(&tokens[..2], 0, 2, 0, 1).is_err());
    }
}
