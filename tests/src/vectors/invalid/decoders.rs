//! Files that break rules for `decoder` models.

use stb_format::{Rule, Value};

use crate::vectors::decoders::changed_decoder;
use crate::vectors::vector::VectorList;

type Changes<'a> = &'a [(&'a str, Option<Value>)];

fn text(value: &str) -> Option<Value> {
    Some(Value::Text(value.to_owned()))
}

fn number(value: u64) -> Option<Value> {
    Some(Value::U64(value))
}

fn float(value: f64) -> Option<Value> {
    Some(Value::F64(value))
}

fn layers(value: &[u64]) -> Option<Value> {
    Some(Value::U64List(value.to_vec()))
}

pub(super) fn decoders(list: &mut VectorList) {
    let mut with = |rule, name: &str, about, changes: Changes<'_>| {
        list.add(rule, &format!("decoder-{name}"), about, changed_decoder(changes));
    };
    keys(&mut with);
    choices(&mut with);
    sizes(&mut with);
    numbers(&mut with);
    sets(&mut with);
    tensors(&mut with);
}

fn keys(with: &mut impl FnMut(Rule, &str, &'static str, Changes<'_>)) {
    let rule = Rule::ModelKey;
    with(
        rule,
        "placement",
        "a norm placement that is a number",
        &[("model.norm_placement", number(1))],
    );
    with(rule, "window", "a window that is a text", &[("model.attention.window", text("16"))]);
    with(rule, "bias", "a bias that is a number", &[("model.bias.qkv", number(1))]);
    with(rule, "layers", "layers that are a number", &[("model.rope.layers", number(1))]);
    with(rule, "active", "experts, but not how many are active", &[("model.experts.active", None)]);
    with(
        rule,
        "normalize",
        "experts, but not how they are weighed",
        &[("model.experts.normalize", None)],
    );
    let factors = "model.rope.short_factors";
    with(rule, "no-factors", "longrope without short factors", &[(factors, None)]);
    for (name, about, value) in [
        ("factor-word", "a word among the factors", "1 two 3"),
        ("factor-sign", "a factor with a sign", "1 +2 3"),
        ("factor-dot", "a factor without a digit before the point", "1 .5 3"),
        ("factor-inf", "an infinite factor, spelled out", "1 inf 3"),
        ("factor-spaces", "two spaces between factors", "1 2  3"),
        ("factor-none", "no factor at all", ""),
    ] {
        with(rule, name, about, &[(factors, text(value))]);
    }
    with(
        rule,
        "size-and-choice",
        "no hidden size, and an unknown norm placement",
        &[("model.hidden_size", None), ("model.norm_placement", text("above"))],
    );
}

fn choices(with: &mut impl FnMut(Rule, &str, &'static str, Changes<'_>)) {
    let rule = Rule::ModelArchitecture;
    with(rule, "norm", "an unknown norm", &[("model.norm", text("batchnorm"))]);
    with(rule, "activation", "an unknown activation", &[("model.activation", text("mish"))]);
    with(rule, "scaling", "an unknown rotary scaling", &[("model.rope.scaling", text("spiral"))]);
    with(
        rule,
        "placement",
        "an unknown norm placement",
        &[("model.norm_placement", text("above"))],
    );
    with(rule, "mlp", "an unknown feed-forward network", &[("model.mlp", text("double"))]);
    with(
        rule,
        "qk-norm",
        "an unknown norm of queries",
        &[("model.attention.qk_norm", text("some"))],
    );
    with(rule, "position", "unknown positions", &[("model.position", text("sine"))]);
    with(
        rule,
        "position-and-window",
        "unknown positions, and a window that is a text",
        &[("model.position", text("sine")), ("model.attention.window", text("16"))],
    );
    with(
        rule,
        "in-llama",
        "a llama model with the norm of decoders",
        &[("model.architecture", text("llama"))],
    );
}

fn sizes(with: &mut impl FnMut(Rule, &str, &'static str, Changes<'_>)) {
    let rule = Rule::ModelValue;
    for (name, about, key, value) in [
        ("embedding-0", "embeddings of no width", "model.embedding_size", 0),
        ("embedding-huge", "embeddings of width 2^40", "model.embedding_size", 1 << 40),
        ("window-0", "a window of no token", "model.attention.window", 0),
        ("window-huge", "a window above 2^32", "model.attention.window", (1 << 32) + 1),
        ("rope-dim-0", "no element rotates", "model.rope.dim", 0),
        ("rope-dim-5", "5 elements rotate", "model.rope.dim", 5),
        ("rope-dim-10", "10 elements of 8 rotate", "model.rope.dim", 10),
        ("experts-0", "no experts", "model.experts.count", 0),
        ("experts-4097", "more experts than the limit", "model.experts.count", 4097),
        ("active-0", "no active expert", "model.experts.active", 0),
        ("active-5", "5 active experts of 4", "model.experts.active", 5),
        ("expert-0", "experts of no width", "model.experts.intermediate_size", 0),
        ("original-0", "longrope of no context", "model.rope.original_context", 0),
    ] {
        with(rule, name, about, &[(key, number(value))]);
    }
    with(rule, "plain-experts", "experts without gates", &[("model.mlp", text("plain"))]);
}

fn numbers(with: &mut impl FnMut(Rule, &str, &'static str, Changes<'_>)) {
    let rule = Rule::ModelValue;
    for (name, about, key, value) in [
        ("scale", "scores times 0", "model.attention.scale", 0.0),
        ("soft-cap", "a negative soft cap", "model.attention.soft_cap", -50.0),
        ("local-theta", "a local base of zero", "model.rope.local_theta", 0.0),
        ("embedding-scale", "embeddings times 0", "model.embedding_scale", 0.0),
        ("logit-cap", "a negative soft cap of logits", "model.logit_soft_cap", -1.0),
        ("attention-factor", "cosines times 0", "model.rope.attention_factor", 0.0),
    ] {
        with(rule, name, about, &[(key, float(value))]);
    }
    let factors = "model.rope.long_factors";
    for (name, about, value) in [
        ("factor-count", "4 factors for 3 pairs", "1 2 3 4"),
        ("factor-0", "a factor of zero", "1 0 3"),
        ("factor-large", "a factor above the largest number", "1 2 1e999"),
    ] {
        with(rule, name, about, &[(factors, text(value))]);
    }
    with(
        rule,
        "dynamic",
        "dynamic scaling with a factor below 1",
        &[("model.rope.scaling", text("dynamic")), ("model.rope.factor", float(0.5))],
    );
    let yarn = |theta, fast| {
        [
            ("model.rope.scaling", text("yarn")),
            ("model.rope.factor", float(4.0)),
            ("model.rope.beta_slow", float(1.0)),
            ("model.rope.beta_fast", float(fast)),
            ("model.rope.truncate", Some(Value::Bool(true))),
            ("model.rope.theta", float(theta)),
        ]
    };
    with(rule, "yarn-base", "yarn with a base of 1", &yarn(1.0, 32.0));
    with(rule, "yarn-range", "an empty yarn range", &yarn(1e4, 1.0));
}

fn sets(with: &mut impl FnMut(Rule, &str, &'static str, Changes<'_>)) {
    let rule = Rule::ModelValue;
    let rope = "model.rope.layers";
    with(rule, "layers-order", "layers that descend", &[(rope, layers(&[1, 0]))]);
    with(rule, "layers-twice", "a layer twice", &[(rope, layers(&[1, 1]))]);
    with(rule, "layers-beyond", "layer 3 of 3", &[("model.experts.layers", layers(&[1, 3]))]);
    with(
        rule,
        "window-layers",
        "a window in layer 3 of 3",
        &[("model.attention.window_layers", layers(&[3]))],
    );
}

fn tensors(with: &mut impl FnMut(Rule, &str, &'static str, Changes<'_>)) {
    let rule = Rule::ModelTensor;
    let off = Some(Value::Bool(false));
    with(rule, "biases", "biases that the keys deny", &[("model.bias.qkv", off.clone())]);
    with(rule, "final-norm", "a final norm that the keys deny", &[("model.final_norm", off)]);
    with(rule, "learned", "no position embeddings", &[("model.position", text("learned"))]);
    with(
        rule,
        "qk-norm",
        "norms of heads, not of all",
        &[("model.attention.qk_norm", text("full"))],
    );
    with(rule, "placement", "norms of outputs too many", &[("model.norm_placement", text("pre"))]);
    with(rule, "layernorm", "LayerNorm without biases", &[("model.norm", text("layernorm"))]);
    with(rule, "fewer-experts", "an expert too many", &[("model.experts.count", number(3))]);
    with(rule, "more-experts", "4096 experts, 4 there", &[("model.experts.count", number(4096))]);
    with(rule, "expert-layers", "experts in no layer", &[("model.experts.layers", layers(&[]))]);
}
