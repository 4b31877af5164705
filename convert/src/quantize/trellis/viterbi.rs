//! The search for the stream of a unit: 16 rows × 4 or 8 columns, 64 steps of a trellis with 256 states.
//!
//! The output error of a unit is Σ_rows eᵀ S e with e = target − weights and a matrix S that all rows share. With S = M Mᵀ
//! and M upper triangular it is a sum over columns of M_jj² (e_j + Σ_{i<j} e_i M_ij / M_jj)²: the error of a column is
//! measured against a target that depends on the errors of the columns before it in the same row. So the Viterbi algorithm
//! keeps, for each state, the errors of the best path to it in the present row. It is exact for a single column; for more
//! it is the best known approximation (per-survivor processing), because the best path to a state need not be the one with
//! the best continuation.
//!
//! The stream is circular. A first search over the last and the first rows finds the state at the seam; the second
//! begins and ends there.

use stb_format::encoding::TrellisTables;
use stb_format::encoding::trellis::{STEP_COLS, STEPS, ZERO, level};

/// States: the values of a window.
pub(super) const STATES: usize = 256;
/// Rows of a unit.
pub(super) const ROWS: usize = 16;
/// The most columns of a unit.
pub(super) const COLS: usize = 2 * STEP_COLS;
/// Rows on each side of the seam that the first search looks at.
const SEAM_ROWS: usize = 4;

/// A number for each state.
type ByState = [f32; STATES];

/// Weights of each window in units of the scale, for each weight of a step.
#[derive(Clone, Debug)]
pub(super) struct Values<const WEIGHTS: usize>(pub [ByState; WEIGHTS]);

impl<const WEIGHTS: usize> Values<WEIGHTS> {
    pub(super) fn new(tables: &[TrellisTables]) -> Self {
        let mut values = [[0.0; STATES]; WEIGHTS];
        for (values, tables) in values.iter_mut().zip(tables) {
            for (window, value) in (0..=u8::MAX).zip(values) {
                *value = f32::from(level(tables, window)) - f32::from(ZERO);
            }
        }
        Self(values)
    }
}

/// The error of a unit as a function of its weights; shared by all rows.
#[derive(Clone, Debug)]
pub(super) struct UnitMetric {
    /// M_jj² of column j, in the order of the search.
    weights: [f32; COLS],
    /// M_ij / M_jj for i < j: row j, column i.
    feedback: [[f32; COLS]; COLS],
    /// The inverse of S, in the order of columns.
    inverse: [[f32; COLS]; COLS],
}

/// The column of a unit that is searched at place `at` of a row: the weights of a step are 4 columns apart.
pub(super) fn column_at(at: usize, step_weights: usize) -> usize {
    at / step_weights + at % step_weights * STEP_COLS
}

impl UnitMetric {
    /// The metric of S, `width` × `width` and positive definite; columns from `width` to the `cols` of a unit do not count.
    pub(super) fn new(
        s: impl Fn(usize, usize) -> f64,
        width: usize,
        cols: usize,
        step_weights: usize,
    ) -> Self {
        let mut metric = Self {
            weights: [0.0; COLS],
            feedback: [[0.0; COLS]; COLS],
            inverse: [[0.0; COLS]; COLS],
        };
        let places: Vec<usize> =
            (0..cols).filter(|at| column_at(*at, step_weights) < width).collect();
        let column = |k: usize| column_at(places[k], step_weights);
        // S = M Mᵀ, from the last column to the first.
        let n = width;
        let mut m = vec![0.0f64; n * n];
        for j in (0..n).rev() {
            for i in (0..=j).rev() {
                let known: f64 = (j + 1..n).map(|k| m[i * n + k] * m[j * n + k]).sum();
                let rest = s(column(i), column(j)) - known;
                m[i * n + j] =
                    if i == j { rest.max(f64::MIN_POSITIVE).sqrt() } else { rest / m[j * n + j] };
            }
        }
        for j in 0..n {
            metric.weights[places[j]] = (m[j * n + j] * m[j * n + j]) as f32;
            for i in 0..j {
                metric.feedback[places[j]][places[i]] = (m[i * n + j] / m[j * n + j]) as f32;
            }
        }
        // S⁻¹ = M⁻ᵀ M⁻¹: solves M y = e_k, then Mᵀ x = y.
        for k in 0..n {
            let mut x = vec![0.0f64; n];
            x[k] = 1.0;
            for i in (0..n).rev() {
                let sum: f64 = (i + 1..n).map(|j| m[i * n + j] * x[j]).sum();
                x[i] = (x[i] - sum) / m[i * n + i];
            }
            for i in 0..n {
                let sum: f64 = (0..i).map(|j| m[j * n + i] * x[j]).sum();
                x[i] = (x[i] - sum) / m[i * n + i];
            }
            for (i, x) in x.into_iter().enumerate() {
                metric.inverse[column(i)][column(k)] = x as f32;
            }
        }
        metric
    }

    /// S⁻¹ `residual`: the change of the weights of a row that removes the residual.
    pub(super) fn step(&self, residual: &[f32]) -> [f32; COLS] {
        let mut step = [0.0; COLS];
        for (step, line) in step.iter_mut().zip(&self.inverse) {
            *step = line.iter().zip(residual).map(|(a, b)| a * b).sum();
        }
        step
    }
}

/// The target of a unit.
#[derive(Clone, Debug)]
pub(super) struct UnitTarget {
    /// Target weights divided by the scale of the row, [row][column].
    pub weights: [[f32; COLS]; ROWS],
    /// The square of the scale of each row; 0 for rows that do not count.
    pub importance: [f32; ROWS],
}

impl UnitTarget {
    /// The error of row `r` if it has the weights `found`, in units of the scale and in the order of columns.
    pub(super) fn error(
        &self,
        metric: &UnitMetric,
        r: usize,
        found: &[f32; COLS],
        step_weights: usize,
    ) -> f32 {
        let places = STEP_COLS * step_weights;
        let error = |at: usize| {
            let column = column_at(at, step_weights);
            self.weights[r][column] - found[column]
        };
        let squares = (0..places).map(|j| {
            let feedback = (0..j).map(|i| metric.feedback[j][i] * error(i)).sum::<f32>();
            let e = error(j) + feedback;
            metric.weights[j] * e * e
        });
        squares.sum::<f32>() * self.importance[r]
    }
}

/// Scratch of a search.
pub(super) struct Search {
    /// The error of the best path to each state.
    cost: ByState,
    /// Errors of the present row on that path, by place.
    errors: [ByState; COLS],
    /// For each step, the low bits of the state before, by state.
    before: Vec<[u8; STATES]>,
    from: Predecessors,
}

/// The states before a step, in the order in which the step reads them: those that differ in their low bits, which the
/// window drops, have the same successors. [low bits][high bits].
struct Predecessors {
    cost: ByState,
    /// The factor of each weight of the step in the change of the cost.
    slope: [ByState; 2],
    /// Errors of earlier columns of the row, by place.
    errors: [ByState; COLS],
}

impl Default for Search {
    fn default() -> Self {
        let zero = [0.0; STATES];
        Self {
            cost: zero,
            errors: [zero; COLS],
            before: vec![[0; STATES]; STEPS],
            from: Predecessors { cost: zero, slope: [zero; 2], errors: [zero; COLS] },
        }
    }
}

/// What all searches of a matrix share.
#[derive(Clone, Copy)]
pub(super) struct Unit<'a, const WEIGHTS: usize> {
    pub values: &'a Values<WEIGHTS>,
    pub metric: &'a UnitMetric,
    pub target: &'a UnitTarget,
}

impl Search {
    /// Writes the stream with (nearly) the least error to `stream`. `LANES` divides the number of states with different
    /// successors, 256 / 2^`BITS`.
    #[inline(always)]
    pub(super) fn run<const BITS: usize, const WEIGHTS: usize, const LANES: usize>(
        &mut self,
        unit: Unit<'_, WEIGHTS>,
        stream: &mut [u8],
    ) {
        // Around the seam: from the last rows over to the first.
        let rows = (ROWS - SEAM_ROWS..ROWS).chain(0..SEAM_ROWS);
        let steps = self.rows::<BITS, WEIGHTS, LANES>(unit, rows, None);
        let mut state = self.best_of(0..STATES);
        for step in (steps / 2 + 1..steps).rev() {
            state = self.state_before::<BITS>(step, state);
        }
        // The whole unit, from the state at the seam to one that it follows.
        let steps = self.rows::<BITS, WEIGHTS, LANES>(unit, 0..ROWS, Some(state));
        let shared = (state & ((STATES >> BITS) - 1)) << BITS;
        state = self.best_of(shared..shared + (1 << BITS));
        stream.fill(0);
        for step in (0..steps).rev() {
            // The low bits of a window are those that the next step drops.
            for bit in 0..BITS {
                let at = step * BITS + bit;
                stream[at / 8] |= ((state >> bit & 1) as u8) << (at % 8);
            }
            if step > 0 {
                state = self.state_before::<BITS>(step, state);
            }
        }
    }

    fn best_of(&self, states: std::ops::Range<usize>) -> usize {
        states.min_by(|a, b| self.cost[*a].total_cmp(&self.cost[*b])).unwrap_or(0)
    }

    /// The state before the one at `step`.
    fn state_before<const BITS: usize>(&self, step: usize, state: usize) -> usize {
        (state << BITS) % STATES | usize::from(self.before[step][state])
    }

    /// Searches the steps of `rows` from the state `start`, or from any. Returns the number of steps.
    #[inline(always)]
    fn rows<const BITS: usize, const WEIGHTS: usize, const LANES: usize>(
        &mut self,
        unit: Unit<'_, WEIGHTS>,
        rows: impl Iterator<Item = usize>,
        start: Option<usize>,
    ) -> usize {
        let mut step = 0;
        for row in rows {
            for place in (0..STEP_COLS * WEIGHTS).step_by(WEIGHTS) {
                if step == 0 {
                    self.cost = [0.0; STATES];
                    if let Some(start) = start {
                        self.cost = [f32::INFINITY; STATES];
                        self.cost[start] = 0.0;
                    }
                    self.begin(unit, row);
                } else {
                    self.advance::<BITS, WEIGHTS, LANES>(unit, row, place, step);
                }
                step += 1;
            }
        }
        step
    }

    /// The first step: each state has its own error only.
    #[inline(always)]
    fn begin<const WEIGHTS: usize>(&mut self, unit: Unit<'_, WEIGHTS>, row: usize) {
        let Unit { values, metric, target } = unit;
        for state in 0..STATES {
            let mut errors = [0.0; COLS];
            for v in 0..WEIGHTS {
                errors[v] = target.weights[row][column_at(v, WEIGHTS)] - values.0[v][state];
                let mut e = errors[v];
                for i in 0..v {
                    e += metric.feedback[v][i] * errors[i];
                }
                self.errors[v][state] = errors[v];
                self.cost[state] += metric.weights[v] * target.importance[row] * e * e;
            }
        }
    }

    /// One step: the best state before each state. With the error e = τ − v of a weight, where τ depends on the path and v
    /// on the new state, D·e² = D·τ² − 2·D·τ·v + D·v²: a product and an addition per branch.
    #[inline(always)]
    fn advance<const BITS: usize, const WEIGHTS: usize, const LANES: usize>(
        &mut self,
        unit: Unit<'_, WEIGHTS>,
        row: usize,
        place: usize,
        step: usize,
    ) {
        let Unit { values, metric, target } = unit;
        let goal: [f32; WEIGHTS] =
            std::array::from_fn(|v| target.weights[row][column_at(place + v, WEIGHTS)]);
        let weight: [f32; WEIGHTS] =
            std::array::from_fn(|v| metric.weights[place + v] * target.importance[row]);
        // The second weight of a step is measured against a target that depends on the first: on its goal here, on its
        // value below.
        let link = if WEIGHTS == 2 { metric.feedback[place + 1][place] } else { 0.0 };
        self.leave::<BITS, WEIGHTS>(metric, goal, weight, link, place);
        let (groups, lows) = (STATES >> BITS, 1usize << BITS);
        let from = &self.from;
        for high in 0..lows {
            for first in (0..groups).step_by(LANES) {
                let at = high * groups + first;
                let value: [[f32; LANES]; WEIGHTS] = std::array::from_fn(
                    #[inline(always)]
                    |v| {
                        let mut value = [0.0; LANES];
                        value.copy_from_slice(&values.0[v][at..at + LANES]);
                        if v == 1 {
                            for i in 0..LANES {
                                value[i] += link * values.0[0][at + i];
                            }
                        }
                        value
                    },
                );
                let mut best = [f32::INFINITY; LANES];
                let mut chosen = [0u32; LANES];
                for low in 0..lows {
                    let before = low * groups + first;
                    for i in 0..LANES {
                        let mut cost = from.cost[before + i];
                        for v in 0..WEIGHTS {
                            cost += from.slope[v][before + i] * value[v][i];
                        }
                        let better = cost < best[i];
                        best[i] = if better { cost } else { best[i] };
                        chosen[i] = if better { low as u32 } else { chosen[i] };
                    }
                }
                for i in 0..LANES {
                    let mut cost = best[i];
                    for v in 0..WEIGHTS {
                        cost += weight[v] * value[v][i] * value[v][i];
                    }
                    self.cost[at + i] = cost;
                    self.before[step][at + i] = chosen[i] as u8;
                }
                if place + WEIGHTS < STEP_COLS * WEIGHTS {
                    for p in 0..place {
                        for i in 0..LANES {
                            let before = chosen[i] as usize * groups + first + i;
                            self.errors[p][at + i] = from.errors[p][before % STATES];
                        }
                    }
                    for v in 0..WEIGHTS {
                        for i in 0..LANES {
                            self.errors[place + v][at + i] = goal[v] - values.0[v][at + i];
                        }
                    }
                }
            }
        }
    }

    /// Prepares the states before a step.
    #[inline(always)]
    fn leave<const BITS: usize, const WEIGHTS: usize>(
        &mut self,
        metric: &UnitMetric,
        goal: [f32; WEIGHTS],
        weight: [f32; WEIGHTS],
        link: f32,
        place: usize,
    ) {
        let mut targets = [[0.0; STATES]; WEIGHTS];
        for v in 0..WEIGHTS {
            targets[v] = [goal[v] + if v == 1 { link * goal[0] } else { 0.0 }; STATES];
            for p in 0..place {
                let factor = metric.feedback[place + v][p];
                for state in 0..STATES {
                    targets[v][state] += factor * self.errors[p][state];
                }
            }
            for state in 0..STATES {
                self.cost[state] += weight[v] * targets[v][state] * targets[v][state];
            }
        }
        let groups = STATES >> BITS;
        for group in 0..groups {
            for low in 0..1 << BITS {
                let (to, state) = (low * groups + group, (group << BITS) + low);
                self.from.cost[to] = self.cost[state];
                for v in 0..WEIGHTS {
                    self.from.slope[v][to] = -2.0 * weight[v] * targets[v][state];
                }
            }
        }
        for p in 0..place {
            for group in 0..groups {
                for low in 0..1 << BITS {
                    self.from.errors[p][low * groups + group] =
                        self.errors[p][(group << BITS) + low];
                }
            }
        }
    }
}
