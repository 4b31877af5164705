"""stb.transformers, if torch and transformers are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from conftest import PROMPT, QUILL, ROOT

import stb

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from stb.transformers import (  # noqa: E402
    StbEmbedding,
    StbForCausalLM,
    StbLinear,
    tokenizer_from_stb,
)
from transformers import AutoModelForCausalLM  # noqa: E402

SHORT: Any = {"calib_samples": 2, "calib_len": 64, "check": False}
FAMILIES = ROOT / "tests/data/families"
# The shapes of these are those of others.
SAME = {"llama-dynamic", "llama-linear", "llama-yarn", "phi3-longrope-long", "qwen2-window"}
EXPERTS = {"mixtral", "olmoe", "qwen3_moe"}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Converts a model once per recipe."""
    folder = tmp_path_factory.mktemp("converted")

    def convert(recipe: str, source: Path = QUILL) -> Path:
        out = folder / f"{source.name}-{recipe}.stb"
        if not out.exists():
            stb.convert(source, out, recipe=recipe, **SHORT)
        return out

    return convert


def logits(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize(
    "recipe",
    ["source", "int8", "int4", "int3", "int2", "sign", "nm-1of4", "nm-1of8", "nm-2of4", "stbllm-4of8"],
)
def test_logits_are_those_of_the_package(converted: Callable[..., Path], recipe: str) -> None:
    path = converted(recipe)
    with stb.open(path, exact=True) as model:
        ids = model.tokenizer.encode(PROMPT + " lived in a small house in the woods")
        expected = model.logits(ids)
    assert len(ids) >= 16
    found = logits(StbForCausalLM.from_stb(path, exact=True), ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    # Small differences become steps when activations are rounded to 8 bits.
    with stb.open(path) as model:
        expected = model.logits(ids)
    found = logits(StbForCausalLM.from_stb(path), ids)
    assert np.square(found - expected).mean() < 0.03**2 * np.square(expected).mean()


@pytest.mark.parametrize(
    "family", sorted(folder.name for folder in FAMILIES.iterdir() if folder.is_dir())
)
def test_every_family_is_supported_or_refused(
    converted: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    if family in SAME:
        pytest.skip("the same code as another")
    source = tmp_path / family
    source.mkdir()
    for file in (*(FAMILIES / family).iterdir(), FAMILIES / "tokenizer.json"):
        (source / file.name).write_bytes(file.read_bytes())
    path = converted("source", source)
    if family in EXPERTS:
        with pytest.raises(stb.UnsupportedError, match="mixture of experts"):
            StbForCausalLM.from_stb(path)
        return
    ids = json.loads((source / "expected.json").read_text())
    ids = next(value for value in ids.values() if isinstance(value, list) and isinstance(value[0], int))
    with stb.open(path, exact=True) as model:
        expected = model.logits(ids)
    found = logits(StbForCausalLM.from_stb(path, exact=True), ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_generate_gives_the_text_of_the_package(converted: Callable[..., Path]) -> None:
    path = converted("int4")
    tokenizer = tokenizer_from_stb(path)
    with stb.open(path, exact=True) as model:
        expected = model.generate(PROMPT, temperature=0, max_tokens=60).complete()
        assert tokenizer(PROMPT).input_ids == model.tokenizer.encode(PROMPT)
        messages = [{"role": "user", "content": "Hello"}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert prompt == model.tokenizer.apply_chat_template(messages)
    model = StbForCausalLM.from_stb(path, exact=True)
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    out = model.generate(ids, max_new_tokens=60, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == expected


def test_weights_stay_packed(converted: Callable[..., Path]) -> None:
    path = converted("nm-1of8")
    model = StbForCausalLM.from_stb(path)
    kinds = [type(module) for module in model.modules()]
    assert StbLinear in kinds and StbEmbedding in kinds
    assert torch.nn.Linear not in kinds and torch.nn.Embedding not in kinds
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    with stb.open(path) as file:
        packed = sum(tensor.bytes for tensor in file.tensors.values())
    assert packed <= held < 1.02 * packed


def test_packed_weights_are_saved_and_loaded(converted: Callable[..., Path], tmp_path: Path) -> None:
    path = converted("int4")
    model = StbForCausalLM.from_stb(path, exact=True)
    model.save_pretrained(tmp_path)
    saved = (tmp_path / "model.safetensors").stat().st_size
    assert saved < path.stat().st_size
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = list(range(5, 40))
    np.testing.assert_array_equal(logits(again, ids), logits(model, ids))


def test_wrong_payloads_are_refused() -> None:
    from stb import _native

    x = np.zeros((1, 128), np.float32)
    payload = np.zeros(10, np.uint8)
    with pytest.raises(ValueError, match="10 bytes"):
        _native.linear(x, payload, (1, bytes(16)), 4, False)
    with pytest.raises(ValueError, match="not known"):
        _native.linear(x, payload, (999, bytes([255] * 16)), 4, False)
