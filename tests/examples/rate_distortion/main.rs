//! Bits and error of each code, on normally distributed numbers and on the weights of a model.

mod extras;

use std::ops::ControlFlow;
use std::path::PathBuf;

use clap::Parser;
use stb_convert::calibration::CalibrationText;
use stb_convert::hessian::{Factor, Hessian};
use stb_convert::quantize::int_group::IntOptions;
use stb_convert::quantize::nm::NmOptions;
use stb_convert::quantize::trellis::TrellisOptions;
use stb_convert::quantize::{Input, LinearQuantizer, Packed, relative_error};
use stb_convert::recipe::Calibration;
use stb_format::arch::{InputMap, LinearInput};
use stb_format::encoding::{IntGroup, Nm, Trellis, TrellisRate};
use stb_kernels::Isa;
use stb_random::Rng;
use stb_runtime::{Checkpoint, Engine, Observer};
use stb_tests::paths::quill;
use stb_tests::programs::print;

/// Prints a Markdown table of squared errors relative to the squares of the weights.
///
/// The table also has N:M codes that are not in the format. *kept* keeps the N largest of M weights with one
/// scale per 128 columns (not rounded); *encoder* is our quantizer. The last column is the error of the outputs
/// of linear layers, by the Hessian of calibration inputs.
#[derive(Parser)]
struct Cli {
    /// A dense checkpoint; default: the bundled model
    model: Option<PathBuf>,
    /// Calibration tokens
    #[arg(long, default_value_t = 8192)]
    tokens: usize,
}

/// Columns per scale.
const BLOCK: usize = 128;
/// The N:M codes of the table.
const CODES: [(u8, u8); 9] =
    [(1, 8), (2, 16), (1, 4), (3, 16), (2, 8), (4, 16), (3, 8), (2, 4), (4, 8)];

/// Weights, [rows, cols], with the Hessians of their inputs.
struct Layer {
    weights: Vec<f32>,
    rows: usize,
    cols: usize,
    hessian: Hessian,
    factor: Factor,
}

impl Layer {
    fn new(
        weights: Vec<f32>,
        cols: usize,
        mut hessian: Hessian,
        damping: f64,
    ) -> anyhow::Result<Self> {
        hessian.damp(damping);
        let factor = Factor::new(&hessian)?;
        Ok(Self { rows: weights.len() / cols, weights, cols, hessian, factor })
    }

    /// A layer with the identity as Hessian.
    fn plain(weights: Vec<f32>, cols: usize) -> anyhow::Result<Self> {
        let one = |i: usize| if i.is_multiple_of(cols + 1) { 1.0 } else { 0.0 };
        let identity = Hessian::from_matrix((0..cols * cols).map(one).collect(), cols);
        Self::new(weights, cols, identity, 0.0)
    }

    /// The relative error of the outputs with our quantizer.
    fn error(&self, method: Method) -> anyhow::Result<f64> {
        let norms = vec![1.0; self.cols];
        let input = Input {
            compute: Isa::detect()?.into(),
            weights: &self.weights,
            rows: self.rows,
            cols: self.cols,
            hessian: &self.hessian,
            factor: &self.factor,
            norms: &norms,
            col_spreads: None,
        };
        let Packed { encoding, payload, .. } = match method {
            Method::Nm(spec) => NmOptions { spec, sweeps: 4, refit: true }.quantize(&input, None),
            Method::Int(spec) => IntOptions::full(spec, 4).quantize(&input, None),
            Method::Trellis(spec) => TrellisOptions { spec, sweeps: 2 }.quantize(&input, None),
        }?;
        let stored = encoding.view(self.rows as u64, self.cols as u64, &payload)?.decode();
        Ok(relative_error(&input, &stored)?)
    }

    /// The error of keeping the `n` largest of `m` weights, relative to Σ w².
    fn kept(&self, n: u8, m: u8) -> f64 {
        let (mut error, mut all) = (0.0, 0.0);
        for block in self.weights.chunks(self.cols).flat_map(|row| row.chunks(BLOCK)) {
            let (mut sum, mut count) = (0.0, 0.0);
            for group in block.chunks(usize::from(m)) {
                let mut sizes: Vec<f64> = group.iter().map(|w| f64::from(w.abs())).collect();
                sizes.sort_by(|a, b| b.total_cmp(a));
                sizes.truncate(usize::from(n));
                sum += sizes.iter().sum::<f64>();
                count += sizes.len() as f64;
            }
            let squares: f64 = block.iter().map(|w| f64::from(*w).powi(2)).sum();
            all += squares;
            error += squares - sum * sum / count;
        }
        error / all
    }
}

#[derive(Clone, Copy)]
enum Method {
    Nm(Nm),
    Int(IntGroup),
    Trellis(Trellis),
}

/// Bits per weight of an N:M code with signs, in whole bits per group, and a 4-bit scale per block.
fn nominal_bits(n: u8, m: u8) -> f64 {
    let choices: f64 =
        (0..n).map(|i| f64::from(m - i) / f64::from(i + 1)).product::<f64>() * 2f64.powi(n.into());
    // Rounding may put a product of quotients slightly above a whole number.
    (choices.log2() - 1e-9).ceil() / f64::from(m) + 4.0 / BLOCK as f64
}

struct InputHessians<'a>(&'a mut InputMap<Hessian>);

impl Observer for InputHessians<'_> {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        let hessian = &mut self.0[input];
        hessian.add(Isa::detect().expect("checked at start"), x);
        hessian.count_sequence();
        ControlFlow::Continue(())
    }
}

/// All linear layers of the decoder with the Hessians of their inputs.
fn layers(cli: &Cli) -> anyhow::Result<Vec<Layer>> {
    let checkpoint = Checkpoint::open(&cli.model.clone().unwrap_or_else(quill), true)?;
    let engine = Engine::from_checkpoint(&checkpoint)?;
    let length = 256.min(checkpoint.spec.context_length as usize);
    let options = Calibration { samples: cli.tokens.div_ceil(length), ..Calibration::default() };
    let mut hidden = Vec::new();
    for window in CalibrationText::built_in().windows(&engine.model, &options, length)? {
        let mut states = Vec::new();
        engine.embed(&window, &mut states)?;
        hidden.push(states);
    }
    let mut all = Vec::new();
    for layer in &engine.model.layers {
        let mut hessians = InputMap::from_fn(|input| Hessian::new(layer.input_width(input)));
        for states in &mut hidden {
            engine.run_layer(layer, states, &mut InputHessians(&mut hessians));
        }
        hessians.iter_mut().for_each(|(_, hessian)| hessian.finish());
        for (linear, weight) in layer.linears().iter() {
            let hessian = hessians[linear.input()].clone();
            all.push(Layer::new(weight.decode(), weight.cols(), hessian, 0.1)?);
        }
    }
    Ok(all)
}

/// A layer with normally distributed weights, [256, 1024].
fn normal() -> anyhow::Result<Layer> {
    let mut rng = Rng(1);
    let mut uniform = || (rng.bits() >> 11) as f64 / (1u64 << 53) as f64;
    // The Box–Muller transform.
    let mut draw =
        || (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    Layer::plain((0..256 * 1024).map(|_| draw() as f32).collect(), 1024)
}

/// The mean of a measure over layers.
fn mean(layers: &[Layer], of: impl Fn(&Layer) -> anyhow::Result<f64>) -> anyhow::Result<f64> {
    let errors: Vec<f64> = layers.iter().map(of).collect::<anyhow::Result<_>>()?;
    Ok(errors.iter().sum::<f64>() / layers.len() as f64)
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let normal = normal()?;
    let calibrated = layers(&cli)?;
    let plain: Vec<Layer> = calibrated
        .iter()
        .map(|l| Layer::plain(l.weights.clone(), l.cols))
        .collect::<anyhow::Result<_>>()?;
    print(
        "| code | bits | bound 2^(−2·bits) | normal, kept | normal, encoder | weights, kept | weights, encoder \
         | outputs, encoder |\n|---|---|---|---|---|---|---|---|\n",
    );
    for (n, m) in CODES {
        let bits = nominal_bits(n, m);
        let (by_size, of_weights) = (normal.kept(n, m), mean(&plain, |l| Ok(l.kept(n, m)))?);
        let line = match Nm::new(n, m, 4, BLOCK as u16, false) {
            Some(spec) => encoder(Method::Nm(spec), &normal, &plain, &calibrated)?,
            None => ["not in the format".to_owned(), String::new(), String::new()],
        };
        let [first, second, third] = line;
        print(&format!(
            "| {n}:{m} | {bits:.3} | {:.3} | {by_size:.3} | {first} | {of_weights:.3} | {second} | {third} |\n",
            2f64.powf(-2.0 * bits)
        ));
    }
    for (bits, group) in [(1, 128), (2, 64), (2, 128), (3, 128), (4, 128)] {
        let Some(spec) = IntGroup::new(bits, group) else { continue };
        let [first, second, third] = encoder(Method::Int(spec), &normal, &plain, &calibrated)?;
        let rate = f64::from(bits) + 16.0 / f64::from(group);
        print(&format!(
            "| int{bits}, group {group} | {rate:.3} | {:.3} | | {first} | | {second} | {third} |\n",
            2f64.powf(-2.0 * rate)
        ));
    }
    for rate in TrellisRate::ALL {
        let (step_bits, step_weights) = (rate.step_bits() as u8, rate.step_weights() as u8);
        let Some(spec) = Trellis::new(step_bits, step_weights, 4, BLOCK as u16) else { continue };
        let [first, second, third] = encoder(Method::Trellis(spec), &normal, &plain, &calibrated)?;
        let bits = f64::from(step_bits) / f64::from(step_weights) + 4.0 / BLOCK as f64;
        print(&format!(
            "| trellis {step_bits}/{step_weights} | {bits:.3} | {:.3} | | {first} | | {second} | {third} |\n",
            2f64.powf(-2.0 * bits)
        ));
    }
    two_levels(&normal, &plain)?;
    salient(&calibrated)?;
    scales(&plain, &calibrated)?;
    column_factors(&calibrated)
}

/// Prints the errors of codes with two magnitudes.
fn two_levels(normal: &Layer, plain: &[Layer]) -> anyhow::Result<()> {
    print(
        "\n| code with two magnitudes | bits | normal, kept | weights, kept |\n|---|---|---|---|\n",
    );
    for (n, m) in [(1, 8), (1, 4), (2, 8), (2, 4), (3, 8), (4, 8)] {
        let (kept, of) = (usize::from(n), usize::from(m));
        let bits = nominal_bits(n, m) + f64::from(n) / f64::from(m);
        let by_size = extras::two_levels(normal, kept, of);
        let of_weights = mean(plain, |l| Ok(extras::two_levels(l, kept, of)))?;
        print(&format!("| {n}:{m} | {bits:.3} | {by_size:.3} | {of_weights:.3} |\n"));
    }
    Ok(())
}

/// Prints the errors with salient columns in integers.
fn salient(calibrated: &[Layer]) -> anyhow::Result<()> {
    print("\n| code | salient columns in 4 bits | bits | outputs, encoder |\n|---|---|---|---|\n");
    for (n, m) in CODES {
        let Some(spec) = Nm::new(n, m, 4, BLOCK as u16, false) else { continue };
        for share in [0.0, 0.01, 0.03, 0.1] {
            let of = |l: &Layer| extras::salient(l, spec, share, nominal_bits(n, m));
            let found: Vec<(f64, f64)> =
                calibrated.iter().map(of).collect::<anyhow::Result<_>>()?;
            let mean =
                |f: fn(&(f64, f64)) -> f64| found.iter().map(f).sum::<f64>() / found.len() as f64;
            let (error, bits) = (mean(|f| f.0), mean(|f| f.1));
            let percent = share * 100.0;
            print(&format!("| {n}:{m} | {percent:.0} % | {bits:.3} | {error:.4} |\n"));
        }
    }
    Ok(())
}

/// Prints the errors of 2:8 with other scales: columns per scale (0: one per row), bits of a scale.
fn scales(plain: &[Layer], calibrated: &[Layer]) -> anyhow::Result<()> {
    print(
        "\n| 2:8, columns per scale, bits | bits | weights, encoder | outputs, encoder |\n|---|---|---|---|\n",
    );
    for (block, scale_bits) in [(0, 0), (256, 4), (128, 4), (128, 8), (64, 4), (64, 8)] {
        let Some(spec) = Nm::new(2, 8, scale_bits, block, false) else { continue };
        let [plain, outputs] = [plain, calibrated]
            .map(|layers| mean(layers, |l| l.error(Method::Nm(spec))))
            .map(|e| e.map(|e| format!("{e:.4}")));
        let per_block = f64::from(scale_bits) / f64::from(block.max(1));
        let bits = 0.875 + per_block;
        print(&format!("| {block}, {scale_bits} | {bits:.3} | {} | {} |\n", plain?, outputs?));
    }
    Ok(())
}

/// Prints the errors with column factors, which cost 16 bits per column.
fn column_factors(calibrated: &[Layer]) -> anyhow::Result<()> {
    type Powers = (f32, f32);
    let kinds: [(&str, Powers); 6] = [
        ("none", (0.0, 0.0)),
        ("weights^0.5", (0.5, 0.0)),
        ("weights", (1.0, 0.0)),
        ("inputs^-0.25", (0.0, -0.25)),
        ("inputs^-0.5", (0.0, -0.5)),
        ("weights^0.5 inputs^-0.25", (0.5, -0.25)),
    ];
    print("\n| factors by sizes of | 1:8 | 1:4 | 2:8 | 2:4 |\n|---|---|---|---|---|\n");
    for (name, (of_weights, of_inputs)) in kinds {
        let layers: Vec<Layer> = calibrated
            .iter()
            .map(|l| {
                let [weights, inputs] = extras::column_sizes(l);
                let sizes = weights.iter().zip(&inputs);
                let factor = |(w, x): (&f32, &f32)| w.powf(of_weights) * x.powf(of_inputs);
                extras::scaled(l, &sizes.map(factor).collect::<Vec<_>>())
            })
            .collect::<anyhow::Result<_>>()?;
        let mut line = format!("| {name} |");
        for (n, m) in [(1, 8), (1, 4), (2, 8), (2, 4)] {
            let Some(spec) = Nm::new(n, m, 4, BLOCK as u16, false) else { continue };
            line += &format!(" {:.4} |", mean(&layers, |l| l.error(Method::Nm(spec)))?);
        }
        print(&(line + "\n"));
    }
    Ok(())
}

/// The errors of our quantizer on normally distributed weights, model weights and outputs.
fn encoder(
    method: Method,
    normal: &Layer,
    plain: &[Layer],
    calibrated: &[Layer],
) -> anyhow::Result<[String; 3]> {
    let of = |l: &Layer| l.error(method);
    let errors = [of(normal)?, mean(plain, of)?, mean(calibrated, of)?];
    Ok(errors.map(|e| format!("{e:.3}")))
}
