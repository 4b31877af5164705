//! A whole model on an emulated CUDA device gives the same results as on the CPU, from the model's file down to
//! the kernels and their order.

#[path = "../../kernels/tests/common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::Path;

use common::machine::device;
use stb_convert::Recipe;
use stb_format::arch::{LinearInput, Role};
use stb_format::encoding::{CoarseRows, IntGroup, MixedRows, Nm};
use stb_format::{Encoding, Meta, ModelSpec, Writer};
use stb_kernels::cuda::{self, ActivationInput, Gemm, Matrix, PrefillPrecision};
use stb_random::Rng;
use stb_runtime::{
    DeviceLayers, Engine, KvKind, Observer, OpenOptions, SamplerOptions, State, Sublayer,
};
use stb_tests::choices::compared;
use stb_tests::random_model::{random, shape, write};

fn close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let squares = |v: &mut dyn Iterator<Item = f32>| v.map(|v| v * v).sum::<f32>();
    let errors = squares(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    let error = (errors / squares(&mut expected.iter().copied())).sqrt();
    assert!(error <= tolerance, "{what}: relative error {error}");
}

/// Writes a model of two layers with random weights, and runs `same_results` on it.
fn same_as_on_the_cpu(recipe: &str, options: OpenOptions, layers: Option<usize>, tolerance: f32) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stb");
    let spec = shape("tiny", None).unwrap();
    write(&spec, &Recipe::load(recipe).unwrap(), File::create(&path).unwrap()).unwrap();
    same_results(&path, options, layers, tolerance);
}

/// Compares prompts of several steps, single tokens (the first, the recorded and replayed ones), several
/// sequences in a batch, logits of all tokens, and truncation.
fn same_results(path: &Path, options: OpenOptions, layers: Option<usize>, tolerance: f32) {
    let Some(device) = device() else { return };
    let host = Engine::open(path, &options).unwrap();
    let engine = Engine::open(path, &options).unwrap().use_device(&device, layers).unwrap();
    let (mut a, mut b) = (State::new(&host, 100), State::new(&engine, 100));
    let prompt: Vec<u32> = (0..19).map(|i| i * 7 % 64).collect();
    let check = |tokens: &[u32], a: &mut State, b: &mut State, what: &str| {
        let expected = host.forward(a, tokens).unwrap().to_vec();
        let found = engine.forward(b, tokens).unwrap();
        close(found, &expected, tolerance, what);
        assert_eq!(a.len(), b.len(), "{what}");
    };
    check(&prompt, &mut a, &mut b, "prompt");
    for token in 0..3 {
        check(&[token], &mut a, &mut b, "one token");
    }
    a.truncate(5);
    b.truncate(5);
    check(&[9, 8], &mut a, &mut b, "after going back");

    let mut expected = Vec::new();
    let mut found = Vec::new();
    host.forward_all(&mut a, &prompt, |_, logits| expected.extend_from_slice(logits)).unwrap();
    engine
        .forward_all(&mut b, &prompt, |first, logits| {
            assert_eq!(first * 64, found.len());
            found.extend_from_slice(logits);
        })
        .unwrap();
    close(&found, &expected, tolerance, "all logits");

    let (mut many_a, mut many_b) = ([a, State::new(&host, 9)], [b, State::new(&engine, 9)]);
    for tokens in [[3, 4], [5, 6]] {
        let expected = host.forward_batch(&mut many_a, &tokens).unwrap().to_vec();
        let found = engine.forward_batch(&mut many_b, &tokens).unwrap();
        close(found, &expected, tolerance, "side by side");
    }
    assert!(engine.forward(&mut many_b[1], &[64]).is_err(), "a token outside the vocabulary");
    assert!(engine.forward(&mut many_b[1], &[1; 8]).is_err(), "more than the context");
    assert_eq!(many_b[1].len(), 2);
}

#[test]
fn nm_with_an_exact_cache() {
    same_as_on_the_cpu("nm-1of8", OpenOptions::exact(), None, 1e-4);
}

#[test]
fn stbllm_with_a_cache_of_16_bits() {
    let options = OpenOptions { exact: true, kv: KvKind::F16, ..OpenOptions::default() };
    same_as_on_the_cpu("stbllm-4of8", options, None, 2e-2);
}

/// Writes a model again with other encodings of its embeddings and its lm_head.
fn write_tables(path: &Path, spec: &ModelSpec, encoding: &Encoding) {
    let bytes = fs::read(path).unwrap();
    let file = stb_format::File::open(&bytes).unwrap();
    let is_table = |role| matches!(role, Role::TokenEmbedding | Role::LmHead);
    let tables: Vec<_> = spec.tensors().filter(|t| is_table(t.role)).map(|t| t.name).collect();
    assert!(!tables.is_empty());
    let mut writer = Writer::new(File::create(path).unwrap()).unwrap();
    for tensor in file.tensors() {
        let (name, shape) = (tensor.name(), tensor.shape());
        match tables.iter().any(|table| table == name) {
            true => writer.tensor(name, shape, encoding, &random(shape, encoding)),
            false => writer.tensor(name, shape, tensor.encoding(), tensor.payload()),
        }
        .unwrap();
    }
    let mut meta = Meta::new();
    for (key, value) in file.meta().iter() {
        meta.set(key, value.to_value()).unwrap();
    }
    writer.finish(&meta).unwrap();
}

/// Embeddings and lm_head of mixed rows, in one matrix and in two.
#[test]
fn tables_of_mixed_rows() {
    let fine = IntGroup::new(4, 32).unwrap();
    let nm = CoarseRows::Nm(Nm::new(2, 8, 4, 32, false).unwrap());
    let int = CoarseRows::IntGroup(IntGroup::new(2, 32).unwrap());
    for (tied_embeddings, coarse) in [(true, nm), (false, int)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.stb");
        let spec = ModelSpec { tied_embeddings, ..shape("tiny", Some(1)).unwrap() };
        write(&spec, &Recipe::load("int4").unwrap(), File::create(&path).unwrap()).unwrap();
        let mixed = MixedRows::new(20, fine, coarse).unwrap();
        write_tables(&path, &spec, &Encoding::MixedRows(mixed));
        same_results(&path, OpenOptions::exact(), None, 1e-4);
    }
}

/// CPU and device round activations differently, to 8 bits for a few tokens and to f16 for many. One layer, so that
/// errors do not multiply.
#[test]
fn rounded_activations_of_few_and_many_tokens() {
    let Some(device) = device() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stb");
    let spec = shape("tiny", Some(1)).unwrap();
    write(&spec, &Recipe::load("int4").unwrap(), File::create(&path).unwrap()).unwrap();
    let exact = Engine::open(&path, &OpenOptions::exact()).unwrap();
    let engine = Engine::open(&path, &OpenOptions::default()).unwrap();
    let engine = engine.use_device(&device, None).unwrap();
    let many: Vec<u32> = (0..70).map(|i| i * 5 % 64).collect();
    for (prompt, tolerance) in [(&[3, 4][..], 3e-2), (&many, 2e-2)] {
        let expected = exact.forward(&mut State::new(&exact, 80), prompt).unwrap().to_vec();
        let mut state = State::new(&engine, 80);
        let found = engine.forward(&mut state, prompt).unwrap();
        close(found, &expected, tolerance, "rounded");
        assert!(found != expected);
    }
}

/// The inputs that an observer on the host saw.
#[derive(Default)]
struct Seen(Vec<(LinearInput, Vec<f32>)>);

impl Observer for Seen {
    fn observe(&mut self, input: LinearInput, x: &[f32]) -> ControlFlow<()> {
        self.0.push((input, x.to_vec()));
        ControlFlow::Continue(())
    }
}

/// The sublayers of a decoder layer over several sequences at once, and the inputs of its linear layers, equal
/// those of the CPU for each sequence.
#[test]
fn layers_for_calibration() {
    let Some(device) = device() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stb");
    let spec = shape("tiny", Some(1)).unwrap();
    write(&spec, &Recipe::load("int4").unwrap(), File::create(&path).unwrap()).unwrap();
    let engine = Engine::open(&path, &OpenOptions::exact()).unwrap();
    let (layer, width) = (&engine.model.layers[0], engine.model.norm.len());
    let lengths = [21, 1, 9];
    let embedded = |n: usize| {
        let tokens: Vec<u32> = (0..n as u32).map(|i| (i * 7 + n as u32) % 64).collect();
        let mut hidden = Vec::new();
        engine.embed(&tokens, &mut hidden).unwrap();
        hidden
    };
    let mut host: Vec<Vec<f32>> = lengths.map(embedded).to_vec();
    let mut layers = DeviceLayers::new(&device, &engine.model).unwrap();
    let mut hidden = device.upload("hidden states", &host.concat()).unwrap();
    for sublayer in [Sublayer::Attention, Sublayer::Mlp] {
        let loaded = layers.load(layer, sublayer).unwrap();
        let mut found = Vec::new();
        let mut observe = |which, _: &cuda::LinearAlgebra, x: &cuda::Buffer<f32>| {
            let mut values = vec![0.0; x.len()];
            x.read(&mut values)?;
            found.push((which, values));
            Ok(ControlFlow::Continue(()))
        };
        let flow = layers.run(&loaded, &lengths, &mut hidden, &mut observe).unwrap();
        assert!(flow.is_continue());
        let mut seen: Vec<(LinearInput, Vec<f32>)> = Vec::new();
        for hidden in &mut host {
            let mut observer = Seen::default();
            let _ = engine.run_sublayer(sublayer, layer, hidden, &mut observer);
            seen.resize_with(observer.0.len(), || (observer.0[0].0, Vec::new()));
            for ((which, all), (input, x)) in seen.iter_mut().zip(observer.0) {
                *which = input;
                all.extend(x);
            }
        }
        assert_eq!(found.len(), 2);
        for ((a, found), (b, expected)) in found.iter().zip(&seen) {
            assert_eq!(a, b);
            close(&found[..expected.len()], expected, 1e-5, "input");
        }
        let mut after = vec![0.0; lengths.iter().sum::<usize>() * width];
        hidden.read(&mut after).unwrap();
        close(&after, &host.concat(), 1e-5, "residual stream");
    }
    // A break at the second input leaves the residual stream unchanged.
    let loaded = layers.load(layer, Sublayer::Mlp).unwrap();
    let mut stop = |which, _: &cuda::LinearAlgebra, _: &cuda::Buffer<f32>| {
        Ok(match which {
            LinearInput::Down => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
    };
    let before = host.concat();
    let mut hidden = device.upload("hidden states", &before).unwrap();
    assert!(layers.run(&loaded, &lengths, &mut hidden, &mut stop).unwrap().is_break());
    let mut after = vec![0.0; before.len()];
    hidden.read(&mut after).unwrap();
    assert_eq!(after, before);
}

/// Tokens chosen from the device's top-k equal those chosen from all of its logits.
#[test]
fn tokens_are_chosen_alike() {
    let Some(device) = device() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.stb");
    let spec = shape("tiny", Some(1)).unwrap();
    write(&spec, &Recipe::load("nm-2of4").unwrap(), File::create(&path).unwrap()).unwrap();
    let engine = Engine::open(&path, &OpenOptions::default()).unwrap();
    let engine = engine.use_device(&device, None).unwrap();
    for (temperature, top_k) in [(0.0, 0), (1.0, 20), (0.7, 64), (1.0, 0)] {
        let options = SamplerOptions {
            temperature,
            top_k,
            repeat_penalty: 1.3,
            repeat_last: 6,
            ..SamplerOptions::default()
        };
        let (differ, from_device) = compared(&engine, &options, &[1, 2, 3, 4], &[5, 9], 8).unwrap();
        assert_eq!(differ, 0, "{temperature} {top_k}");
        let is_device = temperature == 0.0 || top_k > 0;
        assert_eq!(from_device, if is_device { 8 } else { 0 }, "{temperature} {top_k}");
    }
}

/// Matrices with a common input that need it in different orders of columns, with their own factors, or not in
/// 8 bits.
#[test]
fn prompts_in_8_bits() {
    let Some(device) = device() else { return };
    let mut gemm = Gemm::new(&device).unwrap().with_precision(PrefillPrecision::Int8);
    let (rows, cols, tokens) = (40, 300, 20);
    let mut rng = Rng(3);
    let x: Vec<f32> = (0..tokens * cols).map(|_| rng.float()).collect();
    let input = device.upload("activations", &x).unwrap();
    let mut matrices = Vec::new();
    let mut expected = Vec::new();
    for (n, m, bits, factors) in [
        (1, 8, 4, false),
        (1, 8, 4, false),
        (1, 4, 4, false),
        (1, 8, 8, false),
        (2, 8, 4, true),
        (2, 8, 4, false),
    ] {
        let encoding = Encoding::Nm(Nm::new(n, m, bits, 32, factors).unwrap());
        let bytes = random(&[rows as u64, cols as u64], &encoding);
        let weights = encoding.view(rows as u64, cols as u64, &bytes).unwrap().decode();
        let product = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
        let rows_of = |x: &[f32]| weights.chunks(cols).map(|w| product(x, w)).collect::<Vec<_>>();
        expected.push(x.chunks(cols).flat_map(rows_of).collect::<Vec<f32>>());
        matrices.push(Matrix::upload(&device, &encoding, rows, cols, &bytes).unwrap());
    }
    let zeros = || device.zeros("results", tokens * rows).unwrap();
    let mut out: Vec<_> = matrices.iter().map(|_| zeros()).collect();
    let mut to: Vec<_> = out.iter_mut().collect();
    let matrices: Vec<_> = matrices.iter().collect();
    gemm.queue(&matrices, ActivationInput::Plain(&input), &mut to, false, tokens).unwrap();
    for (out, expected) in out.iter().zip(&expected) {
        let mut found = vec![0.0; tokens * rows];
        out.read(&mut found).unwrap();
        close(&found, expected, 0.01, "a product in 8 bits");
    }
}
