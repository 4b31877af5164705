#!/usr/bin/env python3
"""Read .stb files, versions 1 and 2: show, verify, hash all decoded weights, run the test vectors.

Errors go to standard error as one line. The exit status is 0 if all went well, 1 if a test vector
failed, 2 for wrong usage, 3 for a file that was refused, 4 for a file that could not be read.
"""

import argparse
import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np

from container import CRITICAL, SECTION_NAMES, StbFile
from decoder import Decoder
from errors import StbError, memory_guard
from weights import ENCODING_NAMES

FAILED, REFUSED, UNREADABLE = 1, 3, 4
# Metadata §2.8, quality.verdict
WARNINGS = {
    "broken": "the file is broken: its predictions are far from those of the original model",
    "unchecked": "the file has not been compared with the original model",
}
SHOWN = 60                      # characters or elements of a metadata value that `inspect` shows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function, about in (
        ("inspect", inspect, "show sections, tensors and metadata"),
        ("verify", verify, "check everything that the format asks for"),
        ("hashes", hashes, "print the hashes of all decoded tensors, and the metadata, as JSON"),
        ("losses", losses, "print the loss of each of the given tokens after the first, as JSON"),
        ("test", test, "run all vectors of a manifest"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("file", type=Path, metavar="MANIFEST" if name == "test" else "FILE")
        if name == "losses":
            command.add_argument("ids", type=int, nargs="+", metavar="ID")
        command.set_defaults(function=function)
    arguments = parser.parse_args()
    try:
        with memory_guard():
            extra = [arguments.ids] if "ids" in arguments else []
            return arguments.function(arguments.file, *extra)
    except StbError as error:
        print(f"{arguments.file}: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        print(f"{error.filename or arguments.file}: {error.strerror or error}", file=sys.stderr)
        return UNREADABLE
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        print(f"{arguments.file}: {error}", file=sys.stderr)
        return UNREADABLE


def inspect(path: Path) -> int:
    file = StbFile.open(path)
    print(f"version {file.written}, for readers from version {file.min_reader}")
    print(f"{file.size} bytes, {file.parameters} parameters, {file.true_bits:.4f} true bits each")
    for section in file.sections:
        name = SECTION_NAMES.get(section.type, f"type {section.type:#x}")
        critical = ", critical" if section.flags & CRITICAL else ""
        print(f"section {name}: {section.length} bytes at {section.offset}{critical}")
    for tensor in file.tensors.values():
        encoding = ENCODING_NAMES.get(tensor.encoding, f"unknown encoding {tensor.encoding}")
        bits = 8 * tensor.length / tensor.elements
        print(f"tensor {tensor.name}: {list(tensor.shape)}, {encoding}, {bits:.4f} bits per weight")
    for key, value in file.metadata.items():
        print(f"metadata {key} = {shorten(value)}")
    if warning := WARNINGS.get(file.metadata.get("quality.verdict")):
        print(warning)
    return 0


def shorten(value) -> str:
    """A metadata value, with everything escaped that could control a terminal (§9)."""
    if isinstance(value, str | list) and len(value) > SHOWN:
        return f"{value[:SHOWN]!a}... ({len(value)})"
    return ascii(value)


def verify(path: Path) -> int:
    file = StbFile.open(path)
    file.verify()
    kind = "a model file" if file.is_model else "no model file"
    unknown = sum(tensor.codec is None for tensor in file.tensors.values())
    print(f"valid, {kind}, {len(file.tensors)} tensors, {unknown} of unknown encoding")
    return 0


def hashes(path: Path) -> int:
    print(json.dumps(describe(StbFile.open(path)), indent=1))
    return 0


def losses(path: Path, ids: list[int]) -> int:
    """−ln of the probability that the model gives each token after those before it."""
    decoder = Decoder(StbFile.open(path))
    if not all(0 <= id_ < decoder.profile.vocab_size for id_ in ids):
        raise StbError(None, "an id is outside the vocabulary")
    logits = decoder.logits(ids[:-1], context=len(ids))
    logits -= logits.max(axis=-1, keepdims=True)
    found = logits[range(len(ids) - 1), ids[1:]]
    print(json.dumps((np.log(np.exp(logits).sum(axis=-1)) - found).tolist()))
    return 0


def test(path: Path) -> int:
    """Run all vectors; their paths are relative to the manifest."""
    manifest = json.loads(path.read_bytes())
    failures = []
    for vector in manifest["valid"]:
        failures += (f"{vector['file']}: {text}" for text in test_valid(path.parent, vector))
    for vector in manifest["invalid"]:
        rule = refusal(path.parent / vector["file"])
        if rule != vector["rule"]:
            failures.append(f"{vector['file']}: {rule} instead of {vector['rule']}")
    for failure in failures:
        print(failure)
    valid, invalid = len(manifest["valid"]), len(manifest["invalid"])
    print(f"{valid} valid and {invalid} invalid vectors, {len(failures)} failures")
    return FAILED if failures else 0


def test_valid(folder: Path, vector: dict):
    """What differs from the manifest, as texts."""
    try:
        file = StbFile.open(folder / vector["file"])
        file.verify()
    except StbError as error:
        yield f"refused: {error}"
        return
    found = describe(file) | {"model": file.is_model}
    for what in ("parameters", "model", "metadata", "tensors"):
        if found[what] != vector[what]:
            yield f"other {what}"


def refusal(path: Path) -> str | None:
    """The rule by which *verify* refuses a file, None if it does not."""
    try:
        StbFile.open(path).verify()
    except StbError as error:
        return error.rule
    return None


def describe(file: StbFile) -> dict:
    """What the manifest of the vectors states about a valid file, and its size in bits."""
    return {
        "parameters": file.parameters,
        "true_bits": file.true_bits,
        "tensors": [describe_tensor(file, name) for name in file.tensors],
        "metadata": {key: describe_value(value) for key, value in file.metadata.items()},
    }


def describe_tensor(file: StbFile, name: str) -> dict:
    tensor = file.tensors[name]
    description = {"name": name, "shape": list(tensor.shape), "encoding": tensor.encoding}
    try:
        weights = file.weights(name).astype("<f4", copy=False)
        description["sha256_f32_le"] = hashlib.sha256(weights.reshape(-1)).hexdigest()
    except StbError as error:
        if error.rule is None:
            raise
        description["error"] = error.rule
    return description


def describe_value(value) -> dict:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, bool):
        return {"bool": value}
    if isinstance(value, int):
        return {"u64": str(value)}
    if isinstance(value, float):
        return {"f64_bits": struct.pack(">d", value).hex()}
    return {"u64_list": [str(element) for element in value]}


if __name__ == "__main__":
    sys.exit(main())
