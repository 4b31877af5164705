//! Compares products and conversions of matrices with mixed rows, on a device whose launches the emulator runs, with
//! the exact decoder of the format and sums in f64.

mod common;

use common::exact::{ExactProduct, exact_product};
use common::machine::{device, device_in_orders};
use common::random::{encodings, payload};
use stb_format::Encoding;
use stb_format::encoding::{CoarseRows, IntGroup, MixedRows};
use stb_kernels::cuda::{
    ActivationInput, ActivationPrecision, Buffer, Device, Gemm, GemmPlan, Gemv, Matrix,
    PrefillPrecision, gemm_units,
};
use stb_random::Rng;

/// A matrix on the device, and its weights.
struct Uploaded {
    what: String,
    packed: Matrix,
    weights: Vec<f32>,
}

impl Uploaded {
    fn random(
        rng: &mut Rng,
        device: &Device,
        encoding: &Encoding,
        rows: usize,
        cols: usize,
    ) -> Self {
        let bytes = payload(rng, encoding, rows, cols);
        let weights = encoding.view(rows as u64, cols as u64, &bytes).unwrap().decode();
        let packed = Matrix::upload(device, encoding, rows, cols, &bytes).unwrap();
        Self { what: format!("{encoding} {rows}x{cols}"), packed, weights }
    }

    /// Checks that `y` is `before` + `x` · matrixᵀ within `relative` times the sum of magnitudes, and half a rounding
    /// step of activations where 32 of them are rounded to 8 bits together.
    fn check(&self, what: &str, x: &[f64], before: &[f32], y: &[f32], relative: f64, q8: bool) {
        let (rows, cols) = (self.packed.rows(), self.packed.cols());
        for (at, (y, before)) in y.iter().zip(before).enumerate() {
            let (t, r) = (at / rows, at % rows);
            let (w, x) = (&self.weights[r * cols..][..cols], &x[t * cols..][..cols]);
            let ExactProduct { sum, magnitude, rounding } = exact_product(f64::from(*before), w, x);
            let rounding = if q8 { 1.0001 * rounding } else { 0.0 };
            let error = (f64::from(*y) - sum).abs();
            assert!(
                error <= relative * magnitude + rounding + 1e-30,
                "{}, {what}: token {t}, row {r}: {y} instead of {sum}",
                self.what
            );
        }
    }
}

fn mixed() -> Vec<(Encoding, MixedRows)> {
    let mixed = |e| match e {
        Encoding::MixedRows(spec) => Some((e, spec)),
        _ => None,
    };
    let all: Vec<_> = encodings().into_iter().filter_map(mixed).collect();
    assert!(all.len() >= 3);
    all
}

fn read(buffer: &Buffer<f32>) -> Vec<f32> {
    let mut values = vec![0.0; buffer.len()];
    buffer.read(&mut values).unwrap();
    values
}

/// Between two other matrices, with plain and normed input, written and added.
#[test]
fn products_with_few_tokens() {
    let Some(device) = device_in_orders(&[0, 1]) else { return };
    let mut rng = Rng(21);
    let mut gemv = Gemv::new(&device).unwrap();
    let plain = Encoding::IntGroup(IntGroup::new(4, 32).unwrap());
    for (i, (encoding, spec)) in mixed().iter().enumerate() {
        for tokens in 1..=5 {
            // The last is the fewest rows: each is listed.
            let shapes = [(33, 172), (70, 700), (300, 64), (17, 31), (spec.count() as usize, 40)];
            let (rows, cols) = shapes[(i + tokens) % shapes.len()];
            let matrices = [&plain, encoding, &plain]
                .map(|encoding| Uploaded::random(&mut rng, &device, encoding, rows, cols));
            let (x, weight) = (rng.floats(tokens * cols), rng.floats(cols));
            let add = tokens % 2 == i % 2;
            let eps = 1e-5;
            let input = device.upload("activations", &x).unwrap();
            let norm = device.upload("a norm", &weight).unwrap();
            let mut exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let mut source = ActivationInput::Plain(&input);
            if tokens > 2 {
                source = ActivationInput::RmsNorm { x: &input, weight: &norm, eps };
                for x in exact.chunks_mut(cols) {
                    let squares: f64 = x.iter().map(|x| x * x).sum();
                    let scale = 1.0 / (squares / cols as f64 + f64::from(eps)).sqrt();
                    x.iter_mut().zip(&weight).for_each(|(x, w)| *x *= scale * f64::from(*w));
                }
            }
            for precision in [ActivationPrecision::F32, ActivationPrecision::Q8] {
                let before = [(); 3].map(|()| rng.floats(tokens * rows));
                let mut out = before.each_ref().map(|b| device.upload("results", b).unwrap());
                let packed = matrices.each_ref().map(|m| &m.packed);
                let mut to: Vec<_> = out.iter_mut().collect();
                gemv.queue(&packed, source, precision, &mut to, add, tokens).unwrap();
                let what = format!("{tokens} tokens, {precision:?}, add {add}");
                for ((matrix, out), before) in matrices.iter().zip(&out).zip(before) {
                    let before = if add { before } else { vec![0.0; tokens * rows] };
                    let q8 = precision == ActivationPrecision::Q8;
                    matrix.check(&what, &exact, &before, &read(out), 1e-5, q8);
                }
            }
        }
    }
}

#[test]
fn products_with_many_tokens() {
    let Some(device) = device_in_orders(&[0, 1]) else { return };
    let mut rng = Rng(22);
    let mut gemm = Gemm::new(&device).unwrap();
    for (i, (encoding, spec)) in mixed().iter().enumerate() {
        assert!(GemmPlan::supports(encoding));
        assert_eq!(gemm_units(encoding), gemm_units(&spec.coarse().encoding()));
        let places = if matches!(spec.coarse(), CoarseRows::Nm(_)) { 11 } else { 14 };
        for (rows, cols, tokens) in [(33, 172, 40), (300, 96, 17), (spec.count() as usize, 40, 7)] {
            let matrices = [&spec.coarse().encoding(), encoding]
                .map(|encoding| Uploaded::random(&mut rng, &device, encoding, rows, cols));
            let x = rng.floats(tokens * cols);
            let input = device.upload("activations", &x).unwrap();
            let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let add = (tokens + i) % 2 == 0;
            let before = [(); 2].map(|()| rng.floats(tokens * rows));
            let mut out = before.each_ref().map(|b| device.upload("results", b).unwrap());
            let packed = matrices.each_ref().map(|m| &m.packed);
            let mut to: Vec<_> = out.iter_mut().collect();
            gemm.queue(&packed, ActivationInput::Plain(&input), &mut to, add, tokens).unwrap();
            let what = format!("{tokens} tokens, add {add}");
            for ((matrix, out), before) in matrices.iter().zip(&out).zip(before) {
                let before = if add { before } else { vec![0.0; tokens * rows] };
                let relative = 0.5f64.powi(places) + 1e-5;
                matrix.check(&what, &exact, &before, &read(out), relative, false);
            }
        }
    }
    // Listed rows have bf16 activations also where those of all rows are in 8 bits.
    let mut gemm = Gemm::new(&device).unwrap().with_precision(PrefillPrecision::Int8);
    let (encoding, _) = &mixed()[1];
    let (rows, cols, tokens) = (40, 64, 20);
    let matrix = Uploaded::random(&mut rng, &device, encoding, rows, cols);
    let x = rng.floats(tokens * cols);
    let input = device.upload("activations", &x).unwrap();
    let mut out = device.zeros("results", tokens * rows).unwrap();
    let to = &mut [&mut out];
    gemm.queue(&[&matrix.packed], ActivationInput::Plain(&input), to, false, tokens).unwrap();
    let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    // Rounding to 8 bits costs some 1 % of the sum of magnitudes.
    let zeros = vec![0.0; tokens * rows];
    matrix.check("8 bits", &exact, &zeros, &read(&out), 0.05, false);
}

/// Exactly the weights that the format defines, for chosen rows and for all.
#[test]
fn conversions() {
    let Some(device) = device_in_orders(&[0, 1]) else { return };
    let mut rng = Rng(23);
    let mut gemv = Gemv::new(&device).unwrap();
    for (encoding, spec) in &mixed() {
        for (rows, cols) in [(33, 172), (600, 33), (spec.count() as usize, 64)] {
            let Uploaded { what, packed, weights } =
                Uploaded::random(&mut rng, &device, encoding, rows, cols);
            // Every row in another order, some twice. An id outside the matrix leaves its row unchanged.
            let mut ids: Vec<u32> = (0..rows as u32).map(|r| (r * 7 + 3) % rows as u32).collect();
            ids.extend([rows as u32, u32::MAX, 0, rows as u32 - 1]);
            let on = device.upload("tokens", &ids).unwrap();
            let mut out = device.upload("rows", &vec![9.0; ids.len() * cols]).unwrap();
            gemv.queue_rows(&packed, &on, ids.len(), &mut out).unwrap();
            let row = |id: &u32| weights.chunks(cols).nth(*id as usize);
            let expected: Vec<f32> = ids
                .iter()
                .flat_map(|id| row(id).map_or(vec![9.0; cols], <[f32]>::to_vec))
                .collect();
            assert_eq!(read(&out), expected, "{what}");

            let mut all = device.zeros("a weight matrix", rows * cols).unwrap();
            packed.queue_dequantize(&mut all).unwrap();
            assert_eq!(read(&all), weights, "{what}");
        }
    }
}

/// A step is recorded with the scratch memory of its first run, and gives the same when that has grown since.
#[test]
fn recorded_products() {
    let Some(device) = device() else { return };
    let mut rng = Rng(24);
    let mut gemv = Gemv::new(&device).unwrap();
    let (encoding, _) = &mixed()[1];
    let (rows, cols) = (33, 64);
    let matrix = Uploaded::random(&mut rng, &device, encoding, rows, cols);
    let x = rng.floats(4 * cols);
    let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    let input = device.upload("activations", &x).unwrap();
    let input = ActivationInput::Plain(&input);
    let mut out = device.zeros("results", 4 * rows).unwrap();
    let mut queue = |out: &mut Buffer<f32>, tokens| {
        gemv.queue(&[&matrix.packed], input, ActivationPrecision::F32, &mut [out], false, tokens)
    };
    queue(&mut out, 1).unwrap();
    let mut graph = device.record(|| queue(&mut out, 1)).unwrap();
    out.write(&vec![0.0; 4 * rows]).unwrap();
    graph.run().unwrap();
    let zeros = vec![0.0; 4 * rows];
    matrix.check("recorded", &exact, &zeros[..rows], &read(&out)[..rows], 1e-5, false);
    queue(&mut out, 4).unwrap();
    matrix.check("more tokens", &exact, &zeros, &read(&out), 1e-5, false);
}

/// A list of random numbers must not cause accesses out of bounds.
#[test]
fn hostile_lists_stay_inside_their_buffers() {
    let Some(device) = device() else { return };
    let mut rng = Rng(25);
    let mut gemv = Gemv::new(&device).unwrap();
    let (rows, cols) = (33, 64);
    for (encoding, spec) in &mixed() {
        let mut bytes = payload(&mut rng, encoding, rows, cols);
        for number in bytes[..4 * spec.count() as usize].chunks_mut(4) {
            number.copy_from_slice(&(rng.bits() as u32).to_le_bytes());
        }
        let matrix = Matrix::upload(&device, encoding, rows, cols, &bytes).unwrap();
        let input = device.upload("activations", &rng.floats(cols)).unwrap();
        let mut out = device.zeros("results", rows).unwrap();
        for add in [false, true] {
            let (input, to) = (ActivationInput::Plain(&input), &mut [&mut out]);
            gemv.queue(&[&matrix], input, ActivationPrecision::F32, to, add, 1).unwrap();
        }
        let _ = read(&out);
        let mut all = device.zeros("a weight matrix", rows * cols).unwrap();
        matrix.queue_dequantize(&mut all).unwrap();
        let _ = read(&all);
    }
}
