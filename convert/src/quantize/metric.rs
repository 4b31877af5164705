//! Importance scores, which decide the weights that an N:M mask keeps.

/// An importance metric. Scores are compared within a group of M weights of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// "Standardized Importance" as in the paper's published code: relative importance
    /// (|w|/Σ column + |w|/Σ row) · ‖x‖^½.
    Si,
    /// Equation 3 of the paper: the relative importance standardized over the matrix, times ‖x‖.
    SiEq3,
    /// |w|.
    Magnitude,
    /// |w| · ‖x‖.
    Wanda,
    /// w² / (U_jj)²: what removing a weight costs after compensation (optimal brain surgeon).
    Sparsegpt,
}

/// A metric with its sums over the whole matrix.
#[derive(Clone, Debug)]
pub struct Scorer {
    metric: Metric,
    /// One factor per column.
    columns: Vec<f32>,
    /// 1 / Σ_j |w_ij| per row.
    rows: Vec<f32>,
    /// ‖x_j‖ per column, or its root, by the metric.
    norms: Vec<f32>,
    /// Mean and standard deviation of the relative importance.
    mean: f32,
    deviation: f32,
}

impl Scorer {
    /// Prepares `metric` for a layer with `weights`, [rows, cols]. `norms` are the norms of the inputs; `importance` is
    /// [`Factor::importance`], which only [`Metric::Sparsegpt`] uses.
    ///
    /// [`Factor::importance`]: crate::hessian::Factor::importance
    #[must_use]
    pub fn new(metric: Metric, weights: &[f32], norms: &[f32], importance: &[f32]) -> Self {
        let cols = norms.len();
        let mut scorer = Self {
            metric,
            columns: Vec::new(),
            rows: Vec::new(),
            norms: Vec::new(),
            mean: 0.0,
            deviation: 1.0,
        };
        match metric {
            Metric::Magnitude => {}
            Metric::Wanda => scorer.norms = norms.to_vec(),
            Metric::Sparsegpt => scorer.columns = importance.to_vec(),
            Metric::Si | Metric::SiEq3 => {
                let mut columns = vec![0f64; cols];
                for row in weights.chunks_exact(cols) {
                    let mut sum = 0.0;
                    for (c, w) in columns.iter_mut().zip(row) {
                        *c += f64::from(w.abs());
                        sum += f64::from(w.abs());
                    }
                    scorer.rows.push(inverse(sum));
                }
                scorer.columns = columns.into_iter().map(inverse).collect();
                let power = |n: &f32| if metric == Metric::Si { n.sqrt() } else { *n };
                scorer.norms = norms.iter().map(power).collect();
                if metric == Metric::SiEq3 {
                    scorer.standardize(weights);
                }
            }
        }
        scorer
    }

    /// Computes mean and standard deviation of the relative importance.
    fn standardize(&mut self, weights: &[f32]) {
        let (mut sum, mut squares) = (0f64, 0f64);
        for (r, row) in weights.chunks_exact(self.norms.len()).enumerate() {
            for (c, w) in row.iter().enumerate() {
                let v = f64::from(self.relative(r, c, *w));
                sum += v;
                squares += v * v;
            }
        }
        let n = weights.len() as f64;
        self.mean = (sum / n) as f32;
        self.deviation = ((squares / n - (sum / n).powi(2)).max(0.0).sqrt() as f32).max(1e-30);
    }

    /// |w|/Σ column + |w|/Σ row.
    fn relative(&self, row: usize, col: usize, w: f32) -> f32 {
        w.abs() * self.columns[col] + w.abs() * self.rows[row]
    }

    /// The score of the weight `w` at row and column; higher scores are kept.
    #[must_use]
    pub fn score(&self, row: usize, col: usize, w: f32) -> f32 {
        match self.metric {
            Metric::Magnitude => w.abs(),
            Metric::Wanda => w.abs() * self.norms[col],
            Metric::Sparsegpt => w * w * self.columns[col],
            Metric::Si => self.relative(row, col, w) * self.norms[col],
            Metric::SiEq3 => {
                (self.relative(row, col, w) - self.mean) / self.deviation * self.norms[col]
            }
        }
    }

    /// Sets `mask` to the `keep` best of a group of at most 8 values that starts at `col`; ties go to the lower
    /// column.
    pub fn select(&self, row: usize, col: usize, values: &[f32], keep: usize, mask: &mut [bool]) {
        let mut scores = [0.0f32; 8];
        for (k, w) in values.iter().enumerate() {
            scores[k] = self.score(row, col + k, *w);
        }
        mask.fill(false);
        for _ in 0..keep {
            let mut best = None;
            for k in 0..values.len() {
                if !mask[k] && best.is_none_or(|b: usize| scores[k] > scores[b]) {
                    best = Some(k);
                }
            }
            if let Some(best) = best {
                mask[best] = true;
            }
        }
    }
}

/// 1/x; zero for x = 0, the sum of a row or column of zeros.
fn inverse(x: f64) -> f32 {
    if x > 0.0 { (1.0 / x) as f32 } else { 0.0 }
}
