"""Tiny random models of every family, made by PyTorch transformers, with what transformers computes with them.

    python3 -m venv target/transformers
    target/transformers/bin/pip install torch transformers
    target/transformers/bin/python tests/transformers/families.py [NAME]...
    target/transformers/bin/python tests/transformers/families.py --check-exports [NAME]...

The first form writes tests/data/families: a checkpoint per model in f16, and expected.json with losses, logits
and a greedy continuation that transformers computes from its weights in f32. The second form converts each
model to 8 bits, exports it, loads the export in transformers, and compares its logits with those of the packed
model.
"""

import argparse
import copy
import json
import pathlib
import shutil
import sys
import tempfile
import warnings

import torch
import transformers
from compare import ROOT, cargo, compare_logits

FAMILIES = ROOT / "tests/data/families"
VOCAB, BOS, EOS = 258, 256, 257         # a token per byte, then the begin and the end token
TEXT = "In spring the small river behind our house carries cold, clear w"
GREEDY, ROBUST = 40, 20                 # tokens of a continuation; those that 8-bit weights do not change
CANDIDATES, FINALISTS, SEEDS = 384, 16, 40      # prompts to choose from, those to look into, random models
NOISES = 8                              # 8-bit models with which a continuation has to be the same

LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None, "tie_word_embeddings": True,
}
# Heads of hidden_size / heads, for families that know no others.
USUAL_HEADS = {k: v for k, v in LLAMA.items() if k != "head_dim"} | {
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
}
OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "word_embed_proj_dim": 32, "bos_token_id": BOS, "eos_token_id": EOS,
}
GEMMA = LLAMA | {"num_hidden_layers": 4, "query_pre_attn_scalar": 24, "sliding_window": 16}


def scaled(**fields: object) -> dict:
    return LLAMA | {"num_hidden_layers": 2, "rope_scaling": fields}


def longrope(original: int) -> dict:
    pairs = 6                           # half of three quarters of a head of 16
    return USUAL_HEADS | {
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": original,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [1.5 + 0.7 * i for i in range(pairs)],
        },
    }


# model_type and fields of config.json.
MODELS = {
    "llama": ("llama", LLAMA | {"tie_word_embeddings": False}),
    "llama-biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3": ("llama", scaled(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32)),
    "llama-linear": ("llama", scaled(rope_type="linear", factor=2.5)),
    "llama-dynamic": ("llama", scaled(rope_type="dynamic", factor=2.0) | {"max_position_embeddings": 24}),
    "llama-yarn": ("llama", scaled(
        rope_type="yarn", factor=4.0, beta_fast=8.0, beta_slow=0.5, original_max_position_embeddings=32)),
    "mistral": ("mistral", LLAMA | {"sliding_window": 16}),
    "opt": ("opt", OPT),
    "opt-post": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "gpt2": ("gpt2", {
        "vocab_size": VOCAB, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 128,
        "bos_token_id": BOS, "eos_token_id": EOS}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": ("qwen2", LLAMA | {
        "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", LLAMA),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 6.0}),
    "gemma3": ("gemma3_text", GEMMA | {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        }}),
    "phi3": ("phi3", USUAL_HEADS | {"sliding_window": 16}),
    "phi3-longrope-short": ("phi3", longrope(96)),
    "phi3-longrope-long": ("phi3", longrope(32)),
    "smollm3": ("smollm3", LLAMA | {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "mixtral": ("mixtral", LLAMA | {
        "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 20}),
    "qwen3_moe": ("qwen3_moe", LLAMA | {
        "num_hidden_layers": 3, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "mlp_only_layers": [1], "norm_topk_prob": True}),
    "olmoe": ("olmoe", USUAL_HEADS | {
        "num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24, "norm_topk_prob": False}),
}


def random_model(config: transformers.PretrainedConfig, seed: int) -> torch.nn.Module:
    """A model whose weights are random numbers that f16 holds: also norms and biases, so that each matters."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    is_gemma = config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = parameter.ndim == 1 and not name.endswith("bias")
            if parameter.ndim > 1:
                is_table = any(part in name for part in ("embed", "wte", "wpe", "lm_head", "router", ".gate."))
                values *= 0.15 if is_table and is_gemma else 0.6 if is_table else 0.3
            elif is_norm_weight and is_gemma:
                # Gemma stores w of 1 + w. Layers have to outweigh the embedding, or each token repeats itself.
                is_output = ".post_" in name or name == "model.norm.weight"
                values = 0.3 * values + (2.0 if is_output else 0.0)
            elif is_norm_weight:
                values = 1.0 + 0.3 * values
            else:
                values *= 0.3
            parameter.copy_(values.half().float())
    return model.eval()


def with_8_bits(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with noise in each row of each matrix: 1.5 times that of rounding to 8 bits, because quantizers
    that make up for errors in other weights change more than rounding does."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in noisy.named_parameters():
            if parameter.ndim > 1:
                # GPT-2 stores [in, out].
                inputs = parameter.ndim - 2 if ".c_" in name else parameter.ndim - 1
                step = parameter.abs().amax(inputs, keepdim=True) / 127.0
                parameter += step * 1.5 * (torch.rand(parameter.shape, generator=generator) - 0.5)
    return noisy


def is_stepwise(model: torch.nn.Module) -> bool:
    """Whether each token has to be computed on its own. With dynamic scaling, transformers rotates all tokens of
    a call with the base of the last one."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    return parameters.get("rope_type") == "dynamic"


def logits_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """The logits after each token, [tokens, vocabulary]."""
    with torch.no_grad():
        if not is_stepwise(model):
            return model(torch.tensor([ids])).logits[0]
        cache, rows = None, []
        for token in ids:
            step = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            rows.append(step.logits[0, -1])
        return torch.stack(rows)


def losses_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    logits = logits_of(model, ids)[:-1].double()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def continue_greedily(model: torch.nn.Module, prompts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Continuations [prompts, count], and the lead of each of their tokens over the second best."""
    tokens, margins = [], []
    inputs, cache = prompts, None
    with torch.no_grad():
        for _ in range(count):
            step = model(inputs, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            best = step.logits[:, -1].topk(2)
            margins.append(best.values[:, 0] - best.values[:, 1])
            inputs = best.indices[:, :1]
            tokens.append(inputs)
    return torch.cat(tokens, dim=1), torch.stack(margins, dim=1)


def choose_prompt(model: torch.nn.Module, length: int, seed: int) -> tuple[list[int], float] | None:
    """A prompt whose continuation has no narrow decision, does not repeat itself and does not end, with the
    narrowest lead of a token; None if there is none."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(97, 123, (CANDIDATES, length), generator=generator)
    tokens, margins = continue_greedily(model, prompts, GREEDY)
    is_varied = torch.tensor([len(set(row[:ROBUST].tolist())) >= 8 and max(row) < BOS for row in tokens])
    is_varied &= margins.amin(dim=1) > 0.01
    order = (margins[:, :ROBUST].amin(dim=1) * is_varied).argsort(descending=True)[:FINALISTS]
    order = order[is_varied[order]]
    is_same = torch.ones(len(order), dtype=torch.bool)
    for noise in range(NOISES if len(order) else 0):
        noisy, _ = continue_greedily(with_8_bits(model, noise), prompts[order], ROBUST)
        is_same &= (tokens[order, :ROBUST] == noisy).all(dim=1)
    for index in order[is_same]:
        return prompts[index].tolist(), margins[index].min().item()
    return None


def make(name: str, folder: pathlib.Path) -> None:
    """Writes the model of this name into the folder."""
    model_type, fields = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, attn_implementation="eager", **copy.deepcopy(fields))
    # The long factors of longrope are for contexts above 32 tokens, of which the prompt is a part.
    ids, prompt_length = list(TEXT.encode()), 40 if name.endswith("-long") else 20
    for seed in range(SEEDS):
        model = random_model(config, seed)
        change = (losses_of(with_8_bits(model, 0), ids).mean() - losses_of(model, ids).mean()).abs()
        chosen = choose_prompt(model, prompt_length, seed) if change < 0.03 else None
        if chosen:
            break
    else:
        raise SystemExit(f"{name}: no seed below {SEEDS} gives a prompt")
    prompt, margin = chosen

    if folder.exists():
        shutil.rmtree(folder)
    copy.deepcopy(model).half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = load(folder)
    losses = losses_of(model, ids)
    greedy = model.generate(
        torch.tensor([prompt]), max_new_tokens=GREEDY, do_sample=False, use_cache=True,
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long), pad_token_id=EOS,
    )[0, len(prompt):].tolist()
    assert greedy == continue_greedily(model, torch.tensor([prompt]), GREEDY)[0][0].tolist(), name
    expected = {
        "made_with": f"transformers {transformers.__version__}, torch {torch.__version__}, seed {seed}",
        "text": TEXT,
        "ids": ids,
        "mean_loss": losses.mean().item(),
        "losses": [round(loss, 6) for loss in losses.tolist()],
        "last_logits": [round(logit, 5) for logit in logits_of(model, ids)[-1].tolist()],
        "prompt": prompt,
        "greedy": greedy,
        "smallest_margin": round(margin, 5),
    }
    text = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in expected.items())
    (folder / "expected.json").write_text(f"{{\n{text}\n}}\n")
    print(f"{name}: seed {seed}, mean loss {losses.mean():.4f}, 8 bits {change:+.4f}, margin {margin:.4f}, "
          f"{len(set(greedy))} distinct tokens")


def load(folder: pathlib.Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def tokenizer() -> str:
    """A byte-level BPE without merges. Bytes that are no printable characters of Latin-1 stand for themselves
    from U+0100 on, as in GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte if byte in printable else 256 + others.index(byte)): byte for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [
        {"id": id_, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for id_, content in ((BOS, "<s>"), (EOS, "</s>"))
    ]
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": vocabulary | {"<s>": BOS, "</s>": EOS}, "merges": [],
        },
    }, ensure_ascii=False) + "\n"


def check_export(name: str, folder: pathlib.Path) -> bool:
    """Whether transformers computes with the export of the packed model what the packed model computes."""
    source, packed, dense = folder / "source", folder / "packed.stb", folder / "dense"
    shutil.copytree(FAMILIES / name, source)
    shutil.copy(FAMILIES / "tokenizer.json", source)
    options = ("--recipe", "int8", "--quiet")
    cargo("stb-convert", "--bin", "stb-convert", source, packed, *options)
    cargo("stb-convert", "--bin", "stb-convert", "export", packed, dense, "--dtype", "f32")
    ids = list(TEXT.encode())
    return compare_logits(name, logits_of(load(dense), ids).numpy(), packed, ids)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all models")
    parser.add_argument("--check-exports", action="store_true", help="check exports of the models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # The name of the argument for the cache has changed; the old one works everywhere.
    warnings.filterwarnings("ignore", message=".*past_key_values.*", category=FutureWarning)
    results = []
    for name in options.names or MODELS:
        if options.check_exports:
            with tempfile.TemporaryDirectory() as folder:
                results.append(check_export(name, pathlib.Path(folder)))
        else:
            make(name, FAMILIES / name)
    if not options.check_exports:
        (FAMILIES / "tokenizer.json").write_text(tokenizer())
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
