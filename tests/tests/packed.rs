//! An encoding that is defined only in this file, next to the shipped ones, through everything that computes
//! with packed matrices. A new encoding needs only the traits that it implements here.

use std::fmt;

use stb_format::encoding::{Dense, Encoding, IntGroup, Nm, Stbllm, WeightEncoding, WeightView};
use stb_format::{Error, Result, Rule};
use stb_kernels::{
    GemvInput, GemvScratch, Isa, PackedMatrix, Panels, Pool, UnpackBlock, gemm, gemv, gemv_batch,
    packed,
};
use stb_random::Rng;
use stb_runtime::{LinearScratch, LinearWeight, Rows, Threads, apply_packed};
use stb_tests::random_model::random;

/// Weights of −1, 0 or 1, five in a byte as digits of base 3, times one scale per row. A row is its scale as
/// binary32, then its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ternary;

const DIGITS: usize = 5;

#[derive(Clone, Copy, Debug)]
struct TernaryView<'a> {
    rows: usize,
    cols: usize,
    payload: &'a [u8],
}

impl fmt::Display for Ternary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ternary")
    }
}

impl WeightEncoding for Ternary {
    type View<'a> = TernaryView<'a>;
    const IDS: &'static [u32] = &[0x7fff_0000];

    fn parse(_: u32, params: [u8; 16]) -> Option<Self> {
        (params == [0; 16]).then_some(Self)
    }

    fn id(self) -> u32 {
        Self::IDS[0]
    }

    fn params(self) -> [u8; 16] {
        [0; 16]
    }

    fn payload_len(self, rows: u64, cols: u64) -> Option<u64> {
        rows.checked_mul(4 + cols.div_ceil(DIGITS as u64))
    }

    fn view(self, rows: u64, cols: u64, payload: &[u8]) -> Option<TernaryView<'_>> {
        let fits = self.payload_len(rows, cols) == Some(payload.len() as u64);
        fits.then_some(TernaryView { rows: rows as usize, cols: cols as usize, payload })
    }
}

impl TernaryView<'_> {
    fn row(&self, row: usize) -> (f32, &[u8]) {
        let width = 4 + self.cols.div_ceil(DIGITS);
        let (scale, digits) = self.payload[row * width..][..width].split_at(4);
        (f32::from_le_bytes(scale.try_into().expect("four bytes")), digits)
    }

    fn weight(&self, row: usize, col: usize) -> f32 {
        let (scale, digits) = self.row(row);
        let digit = digits[col / DIGITS] / 3u8.pow((col % DIGITS) as u32) % 3;
        scale * (f32::from(digit) - 1.0)
    }
}

impl WeightView for TernaryView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn decode_row(&self, row: usize, out: &mut [f32]) {
        for (col, out) in out.iter_mut().enumerate().take(self.cols) {
            *out = self.weight(row, col);
        }
    }

    fn check(&self, _: &[u8]) -> Result<()> {
        for row in 0..self.rows {
            let (scale, digits) = self.row(row);
            if !scale.is_finite() || digits.iter().any(|byte| *byte >= 243) {
                return Err(Error::new(Rule::PayloadFinite, format!("row {row}")));
            }
        }
        Ok(())
    }
}

impl PackedMatrix for TernaryView<'_> {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn gemv(&self, isa: Isa, x: GemvInput<'_>, first: usize, y: &mut [f32]) {
        isa.compiled(
            #[inline(always)]
            || {
                for (r, y) in y.iter_mut().enumerate() {
                    let terms = x.values()[..self.cols].iter().enumerate();
                    *y = terms.map(|(c, x)| self.weight(first + r, c) * x).sum();
                }
            },
        );
    }

    fn unpack(&self, _: Isa, block: UnpackBlock, to: &mut [f32]) {
        for (r, to) in to.chunks_mut(block.cols).enumerate().take(block.rows) {
            for (c, to) in to.iter_mut().enumerate().take(self.cols - block.first_col) {
                *to = self.weight(block.first_row + r, block.first_col + c);
            }
        }
    }
}

fn ternary(rng: &mut Rng, rows: usize, cols: usize) -> Vec<u8> {
    let mut payload = Vec::new();
    for _ in 0..rows {
        payload.extend(rng.float().to_le_bytes());
        payload.extend((0..cols.div_ceil(DIGITS)).map(|_| rng.below(243) as u8));
    }
    payload
}

/// A matrix and its exact weights.
struct Case<'a> {
    name: String,
    matrix: &'a dyn PackedMatrix,
    weights: Vec<f32>,
    bytes: usize,
}

impl Case<'_> {
    /// Σ w·x and Σ |w·x| of a row.
    fn exact(&self, row: usize, x: &[f32]) -> (f64, f64) {
        let cols = self.matrix.cols();
        let terms = self.weights[row * cols..][..cols].iter().zip(x);
        terms
            .map(|(w, x)| f64::from(*w) * f64::from(*x))
            .fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()))
    }

    /// Compares the results for all tokens, `at(row, token)`, with the exact ones. Activations in 8 bits are
    /// off by up to 1/254 of the largest.
    fn check(&self, x: &[f32], q8: bool, at: impl Fn(usize, usize) -> f32, what: &str) {
        let cols = self.matrix.cols();
        for (t, x) in x.chunks(cols).enumerate() {
            let largest = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            for row in 0..self.matrix.rows() {
                let (sum, size) = self.exact(row, x);
                let weights = &self.weights[row * cols..][..cols];
                let total: f64 = weights.iter().map(|w| f64::from(w.abs())).sum();
                let step = if q8 { 1.001 * f64::from(largest) / 254.0 } else { 0.0 };
                let error = (f64::from(at(row, t)) - sum).abs();
                let allowed = total * step + 1e-5 * size + 1e-30;
                let name = &self.name;
                assert!(error <= allowed, "{name} {what} [{row}, {t}]: off by {error} of {sum}");
            }
        }
    }

    /// Checks GEMV, GEMV of a batch, and GEMM.
    fn kernels(&self, isa: Isa, x: &[f32]) {
        let (matrix, rows, cols) = (self.matrix, self.matrix.rows(), self.matrix.cols());
        let tokens = x.len() / cols;
        let mut scratch: Vec<GemvScratch> = Vec::new();
        scratch.resize_with(tokens, GemvScratch::default);
        for q8 in [false, true] {
            let mut single = vec![f32::NAN; rows * tokens];
            for ((scratch, x), y) in
                scratch.iter_mut().zip(x.chunks(cols)).zip(single.chunks_mut(rows))
            {
                let input = match q8 {
                    true => matrix.prepare_q8(isa, x, scratch),
                    false => matrix.prepare(isa, x, scratch),
                };
                gemv(isa, matrix, input, 0, y);
            }
            self.check(x, q8, |row, t| single[t * rows + row], isa.name());
            let inputs: Vec<_> = scratch.iter().map(GemvScratch::input).collect();
            let mut batch = vec![f32::NAN; rows * tokens];
            gemv_batch(isa, matrix, &inputs, 0, &mut batch);
            assert!(batch == single, "{}: a batch is what its tokens are", self.name);
        }
        let mut panels = Panels::default();
        panels.pack(x, cols);
        let stride = panels.all().row_stride();
        let mut y = vec![f32::NAN; rows * stride];
        gemm(isa, matrix, panels.all(), 0, &mut y);
        self.check(x, false, |row, t| y[row * stride + t], "gemm");
    }
}

/// Checks the linear layers of the runtime, with two matrices that share an input.
fn linear(threads: Threads<'_>, cases: [&Case<'_>; 2], x: &[f32]) {
    for q8 in [false, true] {
        let weights = cases.map(|case| LinearWeight { matrix: case.matrix, bytes: case.bytes });
        let cols = cases[0].matrix.cols();
        let mut scratch = LinearScratch::new(q8);
        let mut apply = |x: &[f32], prefill: usize| {
            let mut outputs = [Vec::new(), Vec::new()];
            let rows = Rows { x, prefill };
            apply_packed(threads, &mut scratch, weights, rows, outputs.each_mut());
            outputs
        };
        let tokens = x.len() / cols;
        for prefill in [0, tokens / 2, tokens] {
            let outputs = apply(x, prefill);
            for (case, out) in cases.iter().zip(&outputs) {
                let rows = case.matrix.rows();
                case.check(x, q8, |row, t| out[t * rows + row], "linear");
            }
            // A row has the same bits alone.
            for (t, x) in x.chunks(cols).enumerate().step_by(7) {
                for (out, alone) in outputs.iter().zip(apply(x, usize::from(t < prefill))) {
                    let rows = alone.len();
                    assert!(
                        out[t * rows..][..rows] == alone,
                        "row {t} with {prefill} prefill rows"
                    );
                }
            }
        }
    }
}

#[test]
fn a_new_encoding_computes_like_the_shipped_ones() {
    let mut rng = Rng(1);
    let pool = Pool::new(2).unwrap();
    let shipped = [
        Encoding::Dense(Dense::F16),
        Encoding::IntGroup(IntGroup::new(3, 64).unwrap()),
        Encoding::IntGroup(IntGroup::new(8, 32).unwrap()),
        Encoding::Stbllm(Stbllm::new(4, 128).unwrap()),
        Encoding::Nm(Nm::new(1, 8, 4, 128, false).unwrap()),
        Encoding::Nm(Nm::new(2, 4, 0, 0, false).unwrap()),
    ];
    for (rows, cols) in [(1, 1), (33, 172), (70, 700)] {
        let shape = [rows as u64, cols as u64];
        let payload = ternary(&mut rng, rows, cols);
        assert_eq!(Ternary.payload_len(shape[0], shape[1]), Some(payload.len() as u64));
        let view = Ternary.view(shape[0], shape[1], &payload).unwrap();
        view.check(&payload).unwrap();
        let mut weights = vec![0.0; rows * cols];
        for (row, out) in weights.chunks_mut(cols).enumerate() {
            view.decode_row(row, out);
        }
        let name = Ternary.to_string();
        let own = Case { name, matrix: &view, weights, bytes: payload.len() };
        let payloads = shipped.clone().map(|encoding| (random(&shape, &encoding), encoding));
        let views = payloads
            .each_ref()
            .map(|(payload, encoding)| encoding.view(shape[0], shape[1], payload).unwrap());
        let mut cases = vec![own];
        for ((payload, encoding), view) in payloads.iter().zip(&views) {
            cases.push(Case {
                name: encoding.to_string(),
                matrix: packed(view),
                weights: view.decode(),
                bytes: payload.len(),
            });
        }
        for tokens in [1, 3, 20, 50] {
            let x: Vec<f32> = (0..tokens * cols).map(|_| rng.float()).collect();
            for isa in Isa::available() {
                let threads = Threads { isa, pool: &pool };
                for case in &cases {
                    case.kernels(isa, &x);
                    linear(threads, [case, &cases[0]], &x);
                }
            }
        }
    }
}
