"""Perplexity and conversion: results, progress and interruption."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import PROMPT, QUILL, STORIES

import stb

SEPARATOR = "<|endoftext|>"
# Calibration that takes little time.
SHORT: Any = {"calib_samples": 2, "calib_len": 64}


def test_perplexity_is_that_of_the_program(
    quill: Path, model: stb.Model, run_json: Callable[..., Any]
) -> None:
    printed = run_json(
        "stb-run", "perplexity", quill, "--text", STORIES, "--separator", SEPARATOR,
        "--ctx", 128, "--windows", 4, "--reference", QUILL, "--json",
    )  # fmt: skip
    steps: list[tuple[int, int]] = []
    found = model.perplexity(
        STORIES, separator=SEPARATOR, context=128, windows=4, reference=QUILL,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    for name in ("perplexity", "mean_nll", "standard_error", "tokens", "windows", "context"):
        assert getattr(found, name) == printed[name], name
    assert found.reference is not None
    for name in ("perplexity", "kl", "kl_standard_error", "top1", "nll_difference"):
        assert getattr(found.reference, name) == printed["reference"][name], name
    assert sorted(steps) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # The same text as a text.
    text = STORIES.read_text(encoding="utf-8")
    again = model.perplexity(text, separator=SEPARATOR, context=128, windows=4)
    assert again.perplexity == found.perplexity and again.reference is None
    assert model.perplexity(text, context=64, windows=1).standard_error is None


def test_wrong_evaluations_are_refused(model: stb.Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 512"):
        model.perplexity("Too short.", context=512)
    with pytest.raises(ValueError, match="not both"):
        model.perplexity("x", separator="x", rows=True)
    with pytest.raises(FileNotFoundError):
        model.perplexity(tmp_path / "missing.txt")
    with pytest.raises(TypeError):
        model.perplexity(5)  # type: ignore[arg-type]
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(stb.FormatError, match="UTF-8"):
        model.perplexity(binary)


def test_an_exception_ends_an_evaluation(model: stb.Model) -> None:
    calls = 0

    def fail(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        model.perplexity(STORIES, context=64, progress=fail)
    assert calls == 1


def test_a_conversion_reports_its_progress(tmp_path: Path) -> None:
    out = tmp_path / "out.stb"
    steps: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, text: str) -> None:
        steps.append((done, total, text))

    report = stb.convert(QUILL, out, recipe="nm-1of4", **SHORT, progress=progress, check=False)
    assert any(text.startswith("layer 1 of") for _, _, text in steps)
    assert all(0 <= done <= total for done, total, _ in steps)
    assert report["recipe"] == "nm-1of4" and report["file_bytes"] == out.stat().st_size
    with stb.open(out) as model:
        assert model.true_bits == report["true_bits_per_parameter"]
        assert model.quality is not None and model.quality["verdict"] == "unchecked"
    with pytest.raises(ValueError, match="exists"):
        stb.convert(QUILL, out, recipe="int4")
    stb.convert(QUILL, out, recipe="int8", **SHORT, check=False, force=True)


def test_a_size_is_reached(tmp_path: Path) -> None:
    out = tmp_path / "out.stb"
    report = stb.convert(QUILL, out, bits=3, **SHORT)
    assert report["true_bits_per_parameter"] <= 3
    assert report["quality"]["kl"] > 0


def test_an_exception_ends_a_conversion_that_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out.stb"

    def fail(done: int, total: int, text: str) -> None:
        if text.startswith("layer 2 of"):
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough") as caught:
        stb.convert(QUILL, out, recipe="nm-1of4", **SHORT, progress=fail)
    if sys.version_info >= (3, 11):
        assert "are kept" in caught.value.__notes__[0]
    assert not out.exists()
    # The request to stop is forgotten, and the finished layers are not.
    texts: list[str] = []
    stb.convert(
        QUILL, out, recipe="nm-1of4", **SHORT,
        progress=lambda done, total, text: texts.append(text),
    )  # fmt: skip
    assert out.exists() and not any(text.startswith("layer 1 of") for text in texts)


def test_wrong_conversions_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.stb"
    with pytest.raises(ValueError, match="int4"):
        stb.convert(QUILL, out, recipe="int-4")
    with pytest.raises(ValueError, match="one of recipe, bits and max_kl"):
        stb.convert(QUILL, out, recipe="int4", bits=3)
    with pytest.raises(stb.FormatError, match="above 0"):
        stb.convert(QUILL, out, bits=-1)
    with pytest.raises(ValueError, match="auto, cpu, cuda"):
        stb.convert(QUILL, out, device="tpu")
    with pytest.raises(FileNotFoundError):
        stb.convert(tmp_path / "missing", out)
    with pytest.raises(TypeError, match="did you mean recipe"):
        stb.convert(QUILL, out, recipie="int4")  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []


def test_recipes_have_descriptions() -> None:
    assert stb.recipes()["int4"]


WORK = {
    # One text ends with the context, which a fast machine reaches before the signal.
    "generate": "while True: [print('x', flush=True) for _ in model.generate(sys.argv[2], ignore_eos=True)]",
    "complete": "print('x', flush=True); [model.generate(sys.argv[2], ignore_eos=True).complete() for _ in range(10**6)]",
    "perplexity": "model.perplexity(pathlib.Path(sys.argv[3]), context=64, progress=lambda *_: print('x', flush=True))",
    "convert": "stb.convert(sys.argv[4], sys.argv[5], recipe='nm-1of4', progress=lambda *_: print('x', flush=True))",
}


@pytest.mark.parametrize("work", WORK)
def test_control_c_ends_the_work(work: str, quill: Path, tmp_path: Path) -> None:
    script = f"""
import pathlib, signal, sys, stb
# A program in the background of a script ignores the signal otherwise.
signal.signal(signal.SIGINT, signal.default_int_handler)
model = stb.open(sys.argv[1])
try:
    {WORK[work]}
except KeyboardInterrupt:
    # The model is usable after it.
    model.generate(sys.argv[2], max_tokens=2).complete()
    sys.exit(77)
"""
    args = [quill, PROMPT, STORIES, QUILL, tmp_path / "out.stb"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "x\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait() == 77
    assert not (tmp_path / "out.stb").exists()
