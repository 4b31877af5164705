//! The exact product of a row, and what rounding may change of it.

/// A sum of products in f64.
pub struct ExactProduct {
    pub sum: f64,
    /// The sum of the magnitudes of all terms.
    pub magnitude: f64,
    /// The change of the sum if each activation is wrong by half a step of 8 bits, of which 32 neighbors share the step.
    pub rounding: f64,
}

/// `start` + Σ w x.
pub fn exact_product(start: f64, w: &[f32], x: &[f64]) -> ExactProduct {
    let mut found = ExactProduct { sum: start, magnitude: start.abs(), rounding: 0.0 };
    for (w, x) in w.chunks(32).zip(x.chunks(32)) {
        let largest = x.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        for (w, x) in w.iter().zip(x) {
            found.sum += f64::from(*w) * x;
            found.magnitude += (f64::from(*w) * x).abs();
            found.rounding += largest / 254.0 * f64::from(w.abs());
        }
    }
    found
}
