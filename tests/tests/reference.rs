//! Compares our quantizer with an independent implementation on one linear layer of a small model and its
//! inputs: the published code, its strict form, the paper's algorithm 1, BiLLM and a better variant. The
//! material is next to the repository; see `stb_tests::paths::shared`.

use std::collections::HashMap;

use stb_convert::hessian::{Factor, Hessian};
use stb_convert::quantize::stbllm::{self, StbllmOptions};
use stb_convert::quantize::{Input, LinearQuantizer, Method, Pruned};
use stb_format::encoding::Stbllm;
use stb_kernels::Isa;
use stb_tests::paths::shared;
use stb_tests::programs::{note, skip};

/// The tensors of one file.
struct Dump {
    floats: HashMap<String, Vec<f32>>,
    bytes: HashMap<String, Vec<u8>>,
}

const ROWS: usize = 128;
const COLS: usize = 352;

impl Dump {
    fn open(name: &str) -> Option<Self> {
        let bytes = std::fs::read(shared(&format!("reference/{name}.safetensors"))?).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut dump = Self { floats: HashMap::new(), bytes: HashMap::new() };
        for (name, tensor) in file.tensors() {
            if tensor.dtype() == safetensors::Dtype::F32 {
                let values = tensor.data().as_chunks::<4>().0.iter();
                dump.floats.insert(name, values.map(|b| f32::from_le_bytes(*b)).collect());
            } else {
                dump.bytes.insert(name, tensor.data().to_vec());
            }
        }
        Some(dump)
    }

    fn mask(&self) -> Vec<bool> {
        self.bytes["keep"].iter().map(|k| *k != 0).collect()
    }
}

/// A Hessian, damped and factored, and the norms of the inputs.
struct LayerInputs {
    hessian: Hessian,
    factor: Factor,
    norms: Vec<f32>,
}

impl LayerInputs {
    fn new(matrix: &[f32], squares: &[f32]) -> Self {
        let mut hessian = Hessian::from_matrix(matrix.to_vec(), COLS);
        hessian.damp(0.01);
        let factor = Factor::new(&hessian).unwrap();
        Self { hessian, factor, norms: squares.iter().map(|s| s.sqrt()).collect() }
    }

    fn input<'a>(&'a self, weights: &'a [f32]) -> Input<'a> {
        let Self { hessian, factor, norms } = self;
        let compute = Isa::detect().unwrap().into();
        let col_spreads = None;
        Input { compute, weights, rows: ROWS, cols: COLS, hessian, factor, norms, col_spreads }
    }
}

fn options(body: &str) -> StbllmOptions {
    let recipe =
        stb_convert::Recipe::parse(&format!("name = 'x'\n[body]\nmethod = 'stbllm'\n{body}"))
            .unwrap();
    match recipe.linear.method() {
        Some(Method::Stbllm(options)) => options,
        other => panic!("{other:?}"),
    }
}

fn share_of_equal<T: PartialEq>(a: &[T], b: &[T]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64
}

/// ‖a − b‖ / ‖b‖.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: f32| f64::from(v).powi(2);
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
    (difference / b.iter().map(|b| square(*b)).sum::<f64>()).sqrt()
}

/// Options of the published code, without its mask.
const PUBLISHED: &str = "search = 'saliency'\nmeans = true\npropagation = 'diagonal'\n";

/// Compares mask, regions, salient columns and values with scales in f32. The scales of a file are rounded to
/// 16 bits, which alone causes errors of up to 5e-4.
fn agree(name: &str, body: &str, in_loop: bool) {
    let Some(dump) = Dump::open(name) else {
        return skip("the reference's tensors are not here");
    };
    let inputs = LayerInputs::new(&dump.floats["H"], &dump.floats["scaler_row"]);
    let factor = relative(&inputs.factor.u, &dump.floats["Hinv_chol_upper"]);
    assert!(factor < 1e-3, "{name}: factor {factor}");
    let weights = &dump.floats["W_in"];
    let pruned = (!in_loop).then(|| Pruned { weights: weights.clone(), mask: dump.mask() });
    let options = options(body);
    let input = inputs.input(weights);
    let layer = stbllm::binarize(&input, &options, pruned.as_ref(), false).unwrap();
    let zero = |regions: &[u8]| -> Vec<bool> { regions.iter().map(|r| *r == 0).collect() };
    // BiLLM has two regions: the reference numbers the salient set after them.
    let regions: Vec<u8> = dump.bytes["regions"]
        .iter()
        .map(|r| if body.contains("bell") && *r == 3 { 4 } else { *r })
        .collect();
    let salient: Vec<bool> = dump.bytes["salient_cols"].iter().map(|s| *s != 0).collect();
    let equal = [
        share_of_equal(&zero(&layer.regions), &zero(&regions)),
        share_of_equal(&layer.regions, &regions),
        share_of_equal(&layer.salient, &salient),
    ];
    let error = relative(&layer.values, &dump.floats["W_q"]);
    note(&format!(
        "{name}: equal masks {}, regions {}, salient columns {}; relative error {error:.1e}",
        equal[0], equal[1], equal[2]
    ));
    assert!(equal.iter().all(|e| *e >= 0.999), "{name}: {equal:?}");
    assert!(error <= 1e-4, "{name}: {error}");
    // As written.
    let packed = options.quantize(&input, pruned.as_ref()).unwrap();
    let view = packed.encoding.view(ROWS as u64, COLS as u64, &packed.payload).unwrap();
    let error = relative(&view.decode(), &dump.floats["W_q"]);
    note(&format!("{name}: as {}, relative error {error:.1e}", packed.encoding));
    // The rounding of scales to 16 bits is part of the propagated error, so weights near thresholds may change
    // regions.
    let limit = if options.storable() { 0.02 } else { 1e-3 };
    assert!(error <= limit, "{name} as written: {error}");
}

#[test]
fn published_code() {
    let body =
        format!("{PUBLISHED}n = 3\nmask = 'before'\npruned = 'forgotten'\nquantiles = 'block'");
    agree("L2down-4of8-owl-ascoded", &body, false);
}

#[test]
fn strict_form_of_the_published_code() {
    agree("L2down-4of8-owl-strict", &format!("{PUBLISHED}n = 3\nmask = 'before'"), false);
}

#[test]
fn algorithm_1() {
    let body = format!("{PUBLISHED}n = 4\nmask = 'in-loop'\nscope = 'block'");
    agree("L2down-4of8-uni-alg1", &body, true);
}

#[test]
fn billm() {
    let body =
        format!("{PUBLISHED}n = 8\nmask = 'before'\npartition = 'bell'\nquantiles = 'block'");
    agree("L2down-billm-dense", &body, false);
}

#[test]
fn better_variant() {
    // Its searches subtract means, its result does not.
    let body = "n = 4\nmetric = 'sparsegpt'\nsearch = 'weights'\nsalient = 'magnitude'\nsearch-means = true";
    agree("L2down-4of8-uni-sparsegpt-domW-exact-nomean", body, false);
}

/// The pruning pass of the published code.
#[test]
fn masks_of_the_pruning_pass() {
    for name in ["L2down-4of8-owl-ascoded", "L2down-4of8-owl-strict"] {
        let Some(dump) = Dump::open(name) else {
            return skip("the reference's tensors are not here");
        };
        let inputs = LayerInputs::new(&dump.floats["P1_H"], &dump.floats["P1_scaler_row"]);
        let mut options = options("mask = 'before'");
        options.spec = Stbllm::new(3, 128).unwrap();
        let pruned = stbllm::prune(&inputs.input(&dump.floats["P1_W"]), &options).unwrap();
        let expected: Vec<bool> = dump.bytes["P1_pruned"].iter().map(|p| *p == 0).collect();
        let equal = share_of_equal(&pruned.mask, &expected);
        assert!(equal >= 0.999, "{name}: {equal}");
        let error = relative(&pruned.weights, &dump.floats["W_in"]);
        assert!(error <= 1e-4 || equal < 1.0, "{name}: {error}");
    }
}
