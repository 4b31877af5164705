//! The search for trellis codes: the stream of a unit, 16 rows × 4 or 8 columns, that is closest to a target.
//!
//! The error of a unit is a sum over rows and columns of D_j (e_j + Σ_{i<j} F_ji e_i)², where e is target minus weight, and
//! the columns before j in the same row are those that are searched earlier. So the target of a weight depends on the path
//! through the trellis, and the Viterbi algorithm keeps, for each state, the errors of the best path to it in the present
//! row. It is exact for a single column; for more it is an approximation (per-survivor processing), because the best path to
//! a state need not be the one with the best continuation.
//!
//! The stream is circular. A first search over the last and the first rows finds the state at the seam; the second
//! begins and ends there. Every instruction set finds the same stream.

use stb_format::encoding::trellis::{STEP_COLS, STEPS, ZERO, level};
use stb_format::encoding::{TILE, Trellis, TrellisTables};
use stb_format::trellis_rates;

use crate::cpu::arch::bytes::{Bytes, Task};
use crate::isa::Isa;

/// States: the values of a window.
const STATES: usize = 256;
/// Rows of a unit.
pub const ROWS: usize = TILE;
/// The most columns of a unit.
pub const COLS: usize = 2 * STEP_COLS;
/// Numbers of a vector.
const LANES: usize = 16;
/// Predecessors in the order of a step: with 32 low bits, groups of 8 are repeated to fill vectors.
const ORDERED: usize = 2 * STATES;

/// A number for each state.
type ByState = [f32; STATES];

/// The weights of all windows in units of the scale, for each weight of a step.
#[derive(Clone, Debug)]
pub struct TrellisValues {
    spec: Trellis,
    values: [ByState; 2],
}

impl TrellisValues {
    /// The weights that `tables` make, one pair for each weight of a step.
    #[must_use]
    pub fn new(spec: Trellis, tables: &[TrellisTables]) -> Self {
        let mut values = [[0.0; STATES]; 2];
        for (values, tables) in values.iter_mut().zip(tables) {
            for (window, value) in (0..=u8::MAX).zip(values) {
                *value = f32::from(level(tables, window)) - f32::from(ZERO);
            }
        }
        Self { spec, values }
    }

    /// Weight `which` of the step with this window.
    #[must_use]
    pub fn of(&self, which: usize, window: u8) -> f32 {
        self.values[which][usize::from(window)]
    }
}

/// The error of a unit as a function of the errors of its weights; the same for all rows. The columns of a row are in the
/// order of the search: the weights of a step are neighbors.
#[derive(Clone, Copy, Default, Debug)]
pub struct TrellisMetric {
    /// D_j.
    pub weights: [f32; COLS],
    /// F_ji for i < j: row j, column i.
    pub feedback: [[f32; COLS]; COLS],
}

/// The target of a unit.
#[derive(Clone, Copy, Default, Debug)]
pub struct TrellisTarget {
    /// Weights in units of the scale of the row, [row][column in the order of the search].
    pub weights: [[f32; COLS]; ROWS],
    /// The square of the scale of each row; 0 for rows that do not count.
    pub importance: [f32; ROWS],
}

/// Scratch of searches.
#[derive(Debug)]
pub struct TrellisSearch {
    /// The error of the best path to each state.
    cost: ByState,
    /// Errors of the present row on that path, by column.
    errors: [ByState; COLS],
    /// For each step, the low bits of the state before, by state.
    before: Vec<[i8; STATES]>,
    from: Box<Predecessors>,
}

/// The states before a step, in the order in which the step reads them: states that differ in their low bits, which the
/// window drops, have the same successors. [low bits][high bits].
#[derive(Debug)]
struct Predecessors {
    cost: [f32; ORDERED],
    /// The factor of each weight of the step in the change of the cost.
    slope: [[f32; ORDERED]; 2],
    /// Errors of earlier columns of the row.
    errors: [[f32; ORDERED]; COLS],
}

impl Default for TrellisSearch {
    fn default() -> Self {
        let (zero, ordered) = ([0.0; STATES], [0.0; ORDERED]);
        Self {
            cost: zero,
            errors: [zero; COLS],
            before: vec![[0; STATES]; STEPS],
            from: Box::new(Predecessors {
                cost: ordered,
                slope: [ordered; 2],
                errors: [ordered; COLS],
            }),
        }
    }
}

impl TrellisSearch {
    /// Writes the stream with (nearly) the least error to `stream`, of [`Trellis::unit_bytes`] bytes.
    ///
    /// # Panics
    /// If `stream` is shorter.
    pub fn run(
        &mut self,
        isa: Isa,
        values: &TrellisValues,
        metric: &TrellisMetric,
        target: &TrellisTarget,
        stream: &mut [u8],
    ) {
        let unit = Unit { values: &values.values, metric, target };
        isa.run(SearchTask { search: self, spec: values.spec, unit, stream });
    }
}

#[derive(Clone, Copy)]
struct Unit<'a> {
    values: &'a [ByState; 2],
    metric: &'a TrellisMetric,
    target: &'a TrellisTarget,
}

struct SearchTask<'a> {
    search: &'a mut TrellisSearch,
    spec: Trellis,
    unit: Unit<'a>,
    stream: &'a mut [u8],
}

impl Task for SearchTask<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Bytes>(self, s: S) {
        let Self { search, spec, unit, stream } = self;
        trellis_rates!(spec, |BITS, WEIGHTS| search.find::<S, BITS, WEIGHTS>(s, unit, stream));
    }
}

impl TrellisSearch {
    #[inline(always)]
    fn find<S: Bytes, const BITS: usize, const WEIGHTS: usize>(
        &mut self,
        s: S,
        unit: Unit<'_>,
        stream: &mut [u8],
    ) {
        let (mut seam, around) = (None, seam_rows(BITS));
        // Around the seam, from the last rows over to the first; then the whole unit.
        for (first, count) in [(ROWS - around, 2 * around), (0, ROWS)] {
            for step in 0..count * STEP_COLS {
                let (row, column) = ((first + step / STEP_COLS) % ROWS, step % STEP_COLS * WEIGHTS);
                if step == 0 {
                    self.begin::<WEIGHTS>(unit, row, seam);
                } else {
                    self.advance::<S, BITS, WEIGHTS>(s, unit, row, column, step);
                }
            }
            if seam.is_none() {
                let mut state = self.best_of(0..STATES);
                for step in (around * STEP_COLS + 1..count * STEP_COLS).rev() {
                    state = self.state_before::<BITS>(step, state);
                }
                seam = Some(state);
            }
        }
        // The last state is one that the first follows.
        let shared = (seam.unwrap_or(0) & ((STATES >> BITS) - 1)) << BITS;
        let mut state = self.best_of(shared..shared + (1 << BITS));
        stream[..8 * BITS].fill(0);
        for step in (0..STEPS).rev() {
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
        ((state << BITS) % STATES) | usize::from(self.before[step][state].cast_unsigned())
    }

    /// The first step: each state has its own error only. With `start`, the others are impossible.
    #[inline(always)]
    fn begin<const WEIGHTS: usize>(&mut self, unit: Unit<'_>, row: usize, start: Option<usize>) {
        let Unit { values, metric, target } = unit;
        for state in 0..STATES {
            let mut errors = [0.0; 2];
            let mut cost = 0.0;
            for v in 0..WEIGHTS {
                errors[v] = target.weights[row][v] - values[v][state];
                let mut e = errors[v];
                if v == 1 {
                    e += metric.feedback[1][0] * errors[0];
                }
                self.errors[v][state] = errors[v];
                cost += metric.weights[v] * target.importance[row] * e * e;
            }
            let possible = start.is_none_or(|start| start == state);
            self.cost[state] = if possible { cost } else { f32::INFINITY };
        }
    }

    /// One step: the best state before each state. With the error e = τ − v of a weight, where τ depends on the path and v
    /// on the new state, D·e² = D·τ² − 2·D·τ·v + D·v²: a product and an addition per branch.
    #[inline(always)]
    fn advance<S: Bytes, const BITS: usize, const WEIGHTS: usize>(
        &mut self,
        s: S,
        unit: Unit<'_>,
        row: usize,
        column: usize,
        step: usize,
    ) {
        let Unit { values, metric, target } = unit;
        let weight = |v: usize| metric.weights[column + v] * target.importance[row];
        // The second weight of a step is measured against a target that depends on the first: on its goal in `leave`, on
        // its value here.
        let link = if WEIGHTS == 2 { metric.feedback[column + 1][column] } else { 0.0 };
        self.leave::<BITS, WEIGHTS>(unit, row, column, link);
        let (groups, lows, stride) = (STATES >> BITS, 1usize << BITS, stride(BITS));
        let from = &*self.from;
        // The errors are not needed after the last column of a row.
        let kept = if column + WEIGHTS < STEP_COLS * WEIGHTS { column } else { 0 };
        for at in (0..STATES).step_by(LANES) {
            // The states before those from `at` on, for the first value of the dropped bits.
            let first = at % groups / LANES * LANES;
            let plain = [s.load(lanes(&values[0], at)), s.load(lanes(&values[1], at))];
            let value = [plain[0], s.mul_add(s.splat(link), plain[0], plain[1])];
            let mut best = s.splat(f32::INFINITY);
            let mut chosen = s.splat(0.0);
            for low in 0..lows {
                let before = low * stride + first;
                let mut cost = s.load(lanes(&from.cost, before));
                for v in 0..WEIGHTS {
                    cost = s.mul_add(s.load(lanes(&from.slope[v], before)), value[v], cost);
                }
                chosen = s.select_less(cost, best, s.splat(low as f32), chosen);
                best = s.min(cost, best);
            }
            for v in 0..WEIGHTS {
                best = s.mul_add(s.mul(s.splat(weight(v)), value[v]), value[v], best);
            }
            s.store(best, lanes_mut(&mut self.cost, at));
            let before: &mut [i8; LANES] =
                self.before[step][at..].first_chunk_mut().expect("lanes");
            s.store_low_bytes(s.to_i32(chosen), before);
            for c in 0..kept {
                let mut error = s.load(lanes(&from.errors[c], first));
                for low in 1..lows {
                    // The last of those that are at most the chosen one stays.
                    let limit = s.splat(low as f32 - 0.5);
                    let other = s.load(lanes(&from.errors[c], low * stride + first));
                    error = s.select_less(limit, chosen, other, error);
                }
                s.store(error, lanes_mut(&mut self.errors[c], at));
            }
            for v in 0..WEIGHTS {
                let goal = s.splat(target.weights[row][column + v]);
                s.store(s.sub(goal, plain[v]), lanes_mut(&mut self.errors[column + v], at));
            }
        }
    }

    /// Prepares the states before a step.
    #[inline(always)]
    fn leave<const BITS: usize, const WEIGHTS: usize>(
        &mut self,
        unit: Unit<'_>,
        row: usize,
        column: usize,
        link: f32,
    ) {
        let Unit { metric, target, .. } = unit;
        for v in 0..WEIGHTS {
            let goal = target.weights[row][column + v];
            let link = if v == 1 { link * target.weights[row][column] } else { 0.0 };
            let weight = metric.weights[column + v] * target.importance[row];
            let mut slope = [goal + link; STATES];
            for c in 0..column {
                let factor = metric.feedback[column + v][c];
                for state in 0..STATES {
                    slope[state] = factor.mul_add(self.errors[c][state], slope[state]);
                }
            }
            for state in 0..STATES {
                let scaled = weight * slope[state];
                self.cost[state] = scaled.mul_add(slope[state], self.cost[state]);
                slope[state] = -2.0 * scaled;
            }
            by_low_bits::<BITS>(&slope, &mut self.from.slope[v]);
        }
        by_low_bits::<BITS>(&self.cost, &mut self.from.cost);
        for c in 0..column {
            by_low_bits::<BITS>(&self.errors[c], &mut self.from.errors[c]);
        }
    }
}

/// Rows on each side of the seam that the first search looks at: the fewer bits a step has, the longer the paths of
/// different states stay apart.
const fn seam_rows(bits: usize) -> usize {
    match bits {
        1 => 6,
        2 => 4,
        _ => 3,
    }
}

/// Ordered predecessors with the same low bits.
const fn stride(bits: usize) -> usize {
    if STATES >> bits < LANES { LANES } else { STATES >> bits }
}

/// Writes `values` to `to` in the order of [`Predecessors`].
#[inline(always)]
fn by_low_bits<const BITS: usize>(values: &ByState, to: &mut [f32; ORDERED]) {
    let (groups, lows) = (STATES >> BITS, 1usize << BITS);
    for (low, to) in to.chunks_exact_mut(stride(BITS)).enumerate().take(lows) {
        for (group, to) in to.iter_mut().enumerate() {
            *to = values[(group % groups * lows + low) % STATES];
        }
    }
}

/// The numbers from `at` on.
#[inline(always)]
fn lanes(values: &[f32], at: usize) -> &[f32; LANES] {
    values[at..].first_chunk().expect("a whole vector")
}

/// The same, to change them.
#[inline(always)]
fn lanes_mut(values: &mut [f32], at: usize) -> &mut [f32; LANES] {
    values[at..].first_chunk_mut().expect("a whole vector")
}
