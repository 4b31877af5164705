//! Means with their standard errors.

/// A mean over independent samples with its standard error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Sample standard deviation over √n; NaN for a single sample.
    pub standard_error: f64,
}

impl Estimate {
    /// The mean of `samples`, NaN if there are none.
    #[must_use]
    pub fn of(samples: impl Iterator<Item = f64> + Clone) -> Self {
        let n = samples.clone().count() as f64;
        let value = samples.clone().sum::<f64>() / n;
        let variance = samples.map(|x| (x - value).powi(2)).sum::<f64>() / (n - 1.0);
        Self { value, standard_error: (variance / n).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_and_standard_error() {
        // Mean 2.5, sample variance 5/3.
        let e = Estimate::of([1.0, 2.0, 3.0, 4.0].into_iter());
        assert_eq!(e.value, 2.5);
        assert!((e.standard_error - (5.0f64 / 3.0 / 4.0).sqrt()).abs() < 1e-15);
        let one = Estimate::of([7.0].into_iter());
        assert!(one.value == 7.0 && one.standard_error.is_nan());
    }
}
