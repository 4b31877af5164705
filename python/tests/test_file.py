"""Opening files: metadata, tensors, quality, and what happens to broken ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from conftest import QUILL
from container import StbFile

import stb


def test_a_model_says_what_it_is(quill: Path, run_json: Callable[..., Any]) -> None:
    shown = run_json("stb-convert", "inspect", quill, "--json")
    with stb.open(quill) as model:
        assert model.architecture == "llama"
        assert model.recipe == "int4"
        assert model.path == quill
        assert model.file_bytes == quill.stat().st_size
        assert model.parameters == shown["parameters"]
        assert model.true_bits == pytest.approx(8 * model.file_bytes / model.parameters)
        quality = model.quality
        assert quality == shown["quality"]
        assert quality is not None and quality["verdict"] == "close"
        assert model.threads >= 1
        assert f"{model.true_bits:.3f}" in repr(model)
    assert model.closed and "closed" in repr(model)


def test_metadata_and_tensors_are_those_of_the_reader_of_the_specification(quill: Path) -> None:
    reader = StbFile.open(quill)
    with stb.open(quill) as model:
        assert model.metadata == reader.metadata
        assert list(model.tensors) == list(reader.tensors)
        for name, tensor in model.tensors.items():
            expected = reader.weights(name)
            weights = tensor.dequantize()
            assert weights.dtype == np.float32
            assert tensor.name == name
            assert tensor.shape == weights.shape == expected.shape
            np.testing.assert_array_equal(weights, expected)
            assert tensor.bytes == reader.tensors[name].length == tensor.packed().nbytes
            assert tensor.bits_per_weight == pytest.approx(8 * tensor.bytes / weights.size)
            assert tensor.encoding_id == reader.tensors[name].encoding
            assert tensor.encoding in repr(tensor)


def test_tensors_cannot_be_replaced_and_outlive_the_model(quill: Path) -> None:
    model = stb.open(quill)
    tensors = model.tensors
    with pytest.raises(TypeError):
        tensors["x"] = tensors["model.norm.weight"]  # type: ignore[index]
    before = tensors["model.norm.weight"].dequantize()
    model.close()
    model.close()
    np.testing.assert_array_equal(tensors["model.norm.weight"].dequantize(), before)
    with pytest.raises(ValueError, match="closed"):
        model.tensors
    with pytest.raises(ValueError, match="closed"):
        model.generate("x")


def test_missing_files_are_not_found(tmp_path: Path) -> None:
    missing = tmp_path / "missing.stb"
    for call in (stb.open, stb.verify):
        with pytest.raises(FileNotFoundError) as caught:
            call(missing)
        assert caught.value.filename == str(missing)
    with pytest.raises(FileNotFoundError):
        stb.convert(QUILL, tmp_path / "nowhere" / "out.stb", recipe="int4")


def test_broken_files_name_the_rule(quill: Path, tmp_path: Path) -> None:
    content = quill.read_bytes()
    cut = tmp_path / "cut.stb"
    cut.write_bytes(content[: len(content) - 100])
    with pytest.raises(stb.FormatError, match="download or copy it again") as caught:
        stb.open(cut)
    assert caught.value.rule == "STB-R-008"
    assert isinstance(caught.value, stb.Error)
    damaged = tmp_path / "damaged.stb"
    middle = bytearray(content)
    middle[len(content) // 2] ^= 1
    damaged.write_bytes(middle)
    with pytest.raises(stb.FormatError) as caught:
        stb.open(damaged)
    assert caught.value.rule == "STB-R-040"
    assert caught.value.tensor is not None and caught.value.offset is not None
    with pytest.raises(stb.FormatError):
        stb.verify(damaged)
    # Who asks for no check gets none.
    stb.open(damaged, verify="off").close()


def test_newer_versions_are_unsupported(quill: Path, tmp_path: Path) -> None:
    newer = bytearray(quill.read_bytes())
    newer[8] = 0xFF
    path = tmp_path / "newer.stb"
    path.write_bytes(newer)
    with pytest.raises(stb.UnsupportedError) as caught:
        stb.open(path)
    assert caught.value.rule is not None


def test_other_kinds_of_files_are_recognized(tmp_path: Path) -> None:
    gguf = tmp_path / "model.stb"
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(5000))
    with pytest.raises(stb.FormatError, match="is a GGUF file") as caught:
        stb.open(gguf)
    assert caught.value.rule is None
    with pytest.raises(stb.UnsupportedError, match=r"stb\.convert\(\)"):
        stb.open(QUILL)


def test_wrong_arguments_are_refused(quill: Path) -> None:
    with pytest.raises(TypeError):
        stb.open(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="did you mean threads"):
        stb.open(quill, thread=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="auto, full or off"):
        stb.open(quill, verify="some")
    with pytest.raises(TypeError, match="threads"):
        stb.open(quill, threads="many")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads"):
        stb.open(quill, threads=-1)


def test_a_valid_file_is_verified(quill: Path) -> None:
    with stb.open(quill, verify="full", mmap=False) as model:
        count = len(model.tensors)
    assert stb.verify(quill) == {
        "valid": True, "model": True, "tensors": count, "unknown_encodings": 0,
    }  # fmt: skip
