//! Gradients against finite differences: of the bundled model, and of small random models with the features of all
//! families.

use std::io::Cursor;
use std::path::Path;

use stb_format::arch::{
    Biases, ExpertsSpec, LayerSet, MlpKind, NormKind, NormPlacement, QkNorm, RopeScaling,
    TensorSpec, Window,
};
use stb_format::encoding::Dense;
use stb_format::{Activation, Encoding, Meta, ModelSpec, RopePairing, Value, Writer};
use stb_runtime::{Checkpoint, Engine, LayerMatrix, LayerVector, OpenOptions, Weight};

use super::*;

/// Tokens of a sequence: more than the windows of the random models.
const LENGTH: usize = 11;
/// Sequences of an example.
const SEQUENCES: usize = 2;

/// A layer, its inputs [tokens, hidden] and the runtime's outputs.
struct Example<'a> {
    pass: Pass<'a>,
    weights: DenseLayer,
    x: Vec<f32>,
    expected: Vec<f32>,
}

impl<'a> Example<'a> {
    fn new(engine: &'a Engine, layer: usize) -> Self {
        let mut x = Vec::new();
        let vocabulary = engine.model.embeddings.rows();
        for sequence in 0..SEQUENCES {
            let token = |i: usize| ((sequence * LENGTH + i) * 37 % vocabulary) as u32;
            let mut states = Vec::new();
            engine.embed(&(0..LENGTH).map(token).collect::<Vec<_>>(), &mut states).unwrap();
            x.extend(states);
        }
        let layer = &engine.model.layers[layer];
        let mut expected = x.clone();
        for sequence in expected.chunks_exact_mut(LENGTH * engine.model.hidden_size()) {
            engine.run_layer(layer, sequence, &mut ());
        }
        let pass = Pass { engine, length: LENGTH };
        Self { pass, weights: decode_layer(layer), x, expected }
    }

    /// The recorded forward pass is that of the runtime.
    fn check_forward(&self, name: &str) {
        let energy: f64 = self.expected.iter().map(|v| f64::from(*v).powi(2)).sum();
        let error = self.pass.error(&self.weights, self.x.clone(), &self.expected);
        assert!(error < 1e-9 * energy, "{name}: {error} of {energy}");
    }

    /// The gradients of all weights that are trained, and of the input.
    fn check_gradients(&self, name: &str) {
        let Self { pass, weights, x, expected } = self;
        let target: Vec<f32> =
            expected.iter().enumerate().map(|(i, v)| v + (i as f32).sin()).collect();
        let zeros =
            || weights.map(|_, m| DenseMatrix::new(m.rows, m.cols), |_, v| vec![0.0; v.len()]);
        let mut gradient = zeros();
        let error = pass.gradient(weights, x.clone(), &target, &mut gradient);
        assert!((error - pass.error(weights, x.clone(), &target)).abs() < 1e-6 * error, "{name}");
        let at = |weights: &DenseLayer, x: &[f32]| pass.error(weights, x.to_vec(), &target) / 2.0;
        for (key, matrix) in weights.matrices() {
            let slope = &gradient.matrix(key).unwrap().values;
            // Routers are not trained, and experts without tokens have no gradient.
            if slope.iter().all(|v| *v == 0.0) {
                assert!(!matches!(key, LayerMatrix::Linear(_)), "{name}, {key:?}");
                continue;
            }
            check_slope(&format!("{name}, {key:?}"), &matrix.values, slope, |values| {
                let mut moved = weights.clone();
                moved.matrix_mut(key).unwrap().values = values;
                at(&moved, x)
            });
        }
        for (key, vector) in weights.vectors() {
            let LayerVector::Norm(site) = key else { continue };
            check_slope(&format!("{name}, {site:?}"), vector, gradient.norm(site), |values| {
                let mut moved = weights.clone();
                *moved.norm_mut(site) = values;
                at(&moved, x)
            });
        }
        let out = pass.output(weights, x.clone());
        let d_out = out.iter().zip(&target).map(|(out, target)| out - target).collect();
        let d_in = pass.input_gradient(weights, x.clone(), d_out, &mut zeros());
        check_slope(&format!("{name}, input"), x, &d_in, |x| at(weights, &x));
    }
}

/// Compares the slope of `loss` at `values` in one direction with `gradient`: the direction of the gradient, with
/// every third component reversed and halved.
fn check_slope(name: &str, values: &[f32], gradient: &[f32], loss: impl Fn(Vec<f32>) -> f64) {
    let largest = |x: &[f32]| x.iter().fold(0f32, |m, v| m.max(v.abs()));
    let size = largest(values) / largest(gradient);
    let turned = |i: usize| if i.is_multiple_of(3) { -0.5 } else { 1.0 };
    let direction: Vec<f32> =
        gradient.iter().enumerate().map(|(i, g)| turned(i) * g * size).collect();
    let at = |step: f32| loss(values.iter().zip(&direction).map(|(w, d)| w + step * d).collect());
    let step = 2e-3;
    let found = (at(step) - at(-step)) / (2.0 * f64::from(step));
    let terms = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d));
    let expected: f64 = terms.sum();
    assert!((found - expected).abs() < 0.02 * expected.abs(), "{name}: {found} {expected}");
}

/// Numbers from −1 to 1.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A random model of this architecture.
fn random_model(spec: &ModelSpec) -> Engine {
    let mut numbers = Numbers(7);
    let mut writer = Writer::new(Cursor::new(Vec::new())).unwrap();
    let mut parameters = 0;
    for TensorSpec { name, shape, .. } in spec.tensors() {
        let count = shape.iter().product::<u64>();
        parameters += count;
        let (center, spread) = match shape[..] {
            // Weights of norms, and biases.
            [_] if name.ends_with("norm.weight") && spec.norm_kind != NormKind::RmsPlusOne => {
                (1.0, 0.4)
            }
            [_] => (0.0, 0.4),
            _ => (0.0, 1.7 / (shape[1] as f32).sqrt()),
        };
        let values: Vec<f32> = (0..count).map(|_| center + spread * numbers.next()).collect();
        let payload = Dense::F32.encode(&values);
        writer.tensor(&name, &shape, &Encoding::Dense(Dense::F32), &payload).unwrap();
    }
    let mut meta = Meta::new();
    spec.write_meta(&mut meta).unwrap();
    for (key, value) in [
        ("model.parameters", Value::U64(parameters)),
        ("tokenizer.json", Value::Text("{}".into())),
        ("tokenizer.add_bos", Value::Bool(false)),
        ("tokenizer.eos_ids", Value::U64List(Vec::new())),
    ] {
        meta.set(key, value).unwrap();
    }
    let bytes = writer.finish(&meta).unwrap().into_inner();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stb");
    std::fs::write(&path, bytes).unwrap();
    // Read, not mapped: the folder is removed.
    let options = OpenOptions { map: false, threads: Some(1), ..OpenOptions::exact() };
    Engine::open_stb(&path, &options).unwrap()
}

/// A small model that computes as LLaMA does.
fn llama() -> ModelSpec {
    ModelSpec {
        vocab_size: 30,
        hidden_size: 24,
        intermediate_size: 36,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        context_length: 32,
        norm_eps: 1e-5,
        rope_theta: 100.0,
        ..ModelSpec::default()
    }
}

fn windowed(size: u64, layers: LayerSet) -> Option<Window> {
    Some(Window { size, layers })
}

fn gemma2() -> ModelSpec {
    ModelSpec {
        norm_kind: NormKind::RmsPlusOne,
        norm_placement: NormPlacement::Sandwich,
        activation: Activation::GeluTanh,
        attention_scale: Some(0.6),
        attention_soft_cap: Some(0.7),
        window: windowed(4, LayerSet::Only(vec![0])),
        embedding_scale: Some(3.0),
        logit_soft_cap: Some(1.5),
        tied_embeddings: true,
        ..llama()
    }
}

fn opt() -> ModelSpec {
    ModelSpec {
        kv_heads: 4,
        norm_kind: NormKind::Layer,
        learned_positions: true,
        biases: Biases { qkv: true, attention_output: true, mlp: true },
        mlp: MlpKind::Plain,
        activation: Activation::Relu,
        tied_embeddings: true,
        ..llama()
    }
}

/// Models that together have all features.
fn models() -> Vec<(&'static str, ModelSpec)> {
    let biases = Biases { qkv: true, attention_output: false, mlp: true };
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        beta_fast: 2.0,
        beta_slow: 0.5,
        truncate: false,
        attention_factor: 1.2,
        original_context: 8,
    };
    let long = RopeScaling::LongRope {
        short_factors: vec![1.0, 1.5],
        long_factors: vec![1.2, 3.0],
        attention_factor: 1.3,
        original_context: 16,
    };
    let dynamic = RopeScaling::Dynamic { factor: 2.0, original_context: 6 };
    vec![
        ("llama", ModelSpec { rope_pairing: RopePairing::Interleaved, ..llama() }),
        ("qwen2, yarn", ModelSpec { biases, rope_scaling: yarn, ..llama() }),
        ("gemma2", gemma2()),
        (
            "gemma3",
            ModelSpec {
                qk_norm: QkNorm::Head,
                local_rope_theta: Some(10.0),
                attention_soft_cap: None,
                ..gemma2()
            },
        ),
        ("mixtral", experts(true, LayerSet::All)),
        ("olmoe", experts(false, LayerSet::Only(vec![1]))),
        ("opt", opt()),
        (
            "opt with norms after the sublayers",
            ModelSpec {
                norm_placement: NormPlacement::Post,
                no_final_norm: true,
                embedding_size: Some(10),
                ..opt()
            },
        ),
        ("gpt2", ModelSpec { activation: Activation::Gelu, ..opt() }),
        (
            "phi, norm over all heads",
            ModelSpec {
                rope_dim: Some(4),
                rope_scaling: long,
                qk_norm: QkNorm::Full,
                activation: Activation::Gelu,
                window: windowed(5, LayerSet::All),
                ..llama()
            },
        ),
        (
            "smollm3, dynamic, LayerNorm of heads",
            ModelSpec {
                rope_layers: LayerSet::Only(vec![1]),
                rope_scaling: dynamic,
                norm_kind: NormKind::Layer,
                qk_norm: QkNorm::Head,
                ..llama()
            },
        ),
    ]
}

/// A mixture of experts in the second layer, or in all.
fn experts(normalize: bool, layers: LayerSet) -> ModelSpec {
    let experts = ExpertsSpec { count: 4, active: 2, intermediate_size: 20, normalize, layers };
    ModelSpec { experts: Some(experts), ..llama() }
}

fn quill() -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/models/quill-4m");
    Engine::from_checkpoint(&Checkpoint::open(&folder, true).unwrap()).unwrap()
}

#[test]
fn forward_is_the_forward_pass_of_the_runtime() {
    Example::new(&quill(), 1).check_forward("quill");
    for (name, spec) in models() {
        let engine = random_model(&spec);
        (0..2).for_each(|layer| Example::new(&engine, layer).check_forward(name));
    }
}

#[test]
fn gradients_match_finite_differences() {
    Example::new(&quill(), 1).check_gradients("quill");
    for (name, spec) in models() {
        let engine = random_model(&spec);
        (0..2).for_each(|layer| {
            Example::new(&engine, layer).check_gradients(&format!("{name}, layer {layer}"));
        });
    }
}

/// The loss is a weighted sum of the logits.
#[test]
fn gradients_of_heads_match_finite_differences() {
    for (name, spec) in models() {
        let engine = random_model(&spec);
        let stream = Example::new(&engine, 0).x;
        let norm = engine.model.norm.clone();
        let lm_head = engine.model.lm_head();
        let weight = |i: usize| (i as f32 * 0.7).sin();
        let loss = |norm: &[f32], lm_head: &Weight, stream: &[f32]| {
            let head = ModelHead { engine: &engine, norm, lm_head };
            let logits = head.logits(&head.inputs(stream));
            let terms =
                logits.iter().enumerate().map(|(i, z)| f64::from(*z) * f64::from(weight(i)));
            terms.sum::<f64>()
        };
        let head = ModelHead::of(&engine);
        let inputs = head.inputs(&stream);
        let logits = head.logits(&inputs);
        let mut d_logits: Vec<f32> = (0..logits.len()).map(weight).collect();
        uncap(&mut d_logits, head.cap_slopes(&logits));
        let (d_stream, d_norm) = head.inputs_backward(&stream, head.logits_backward(&d_logits));
        check_slope(&format!("{name}, stream"), &stream, &d_stream, |stream| {
            loss(&norm, lm_head, &stream)
        });
        assert_eq!(norm.is_empty(), spec.no_final_norm, "{name}");
        if !norm.is_empty() {
            check_slope(&format!("{name}, last norm"), &norm, &d_norm, |norm| {
                loss(&norm, lm_head, &stream)
            });
        }
        // The gradient of the lm_head is the product of those of its outputs and its inputs.
        let (rows, cols) = (lm_head.rows(), lm_head.cols());
        let mut d_head = vec![0.0; rows * cols];
        for (d, x) in d_logits.chunks_exact(rows).zip(inputs.chunks_exact(cols)) {
            for (row, d) in d_head.chunks_exact_mut(cols).zip(d) {
                row.iter_mut().zip(x).for_each(|(sum, x)| *sum += d * x);
            }
        }
        check_slope(&format!("{name}, lm_head"), &lm_head.decode(), &d_head, |values| {
            let moved = Weight::from_floats(values, rows as u64, cols as u64).unwrap();
            loss(&norm, &moved, &stream)
        });
    }
}

/// The loss is a weighted sum of the embedded tokens.
#[test]
fn gradients_of_embeddings_match_finite_differences() {
    for (name, spec) in models() {
        let engine = random_model(&spec);
        let table = &engine.model.embeddings;
        let (rows, cols) = (table.rows(), table.cols());
        let tokens: Vec<u32> = (0..LENGTH).map(|i| (i * i % rows) as u32).collect();
        let weight = |i: usize| (i as f32 * 0.7).sin();
        let d_stream = (0..LENGTH * engine.model.hidden_size()).map(weight).collect();
        let d_rows = embedded_gradient(&engine, d_stream);
        let mut d_table = vec![0.0; rows * cols];
        for (token, d) in tokens.iter().zip(d_rows.chunks_exact(cols)) {
            let row = &mut d_table[*token as usize * cols..][..cols];
            row.iter_mut().zip(d).for_each(|(sum, d)| *sum += d);
        }
        check_slope(name, &table.decode(), &d_table, |values| {
            let moved = Weight::from_floats(values, rows as u64, cols as u64).unwrap();
            let mut states = Vec::new();
            engine.embed_with(&moved, &tokens, 0..LENGTH, &mut states).unwrap();
            let terms =
                states.iter().enumerate().map(|(i, x)| f64::from(*x) * f64::from(weight(i)));
            terms.sum::<f64>()
        });
    }
}
