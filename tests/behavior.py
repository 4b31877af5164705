#!/usr/bin/env python3
"""Record what the programs compute, and compare two builds: contents of converted files, greedy texts, perplexities.

    python3 tests/behavior.py --convert target/release/stb-convert --run target/release/stb-run \\
        --out NEW.json [--compare OLD.json] [--quick] tests/models/quill-4m [MODEL ...]
    python3 tests/behavior.py --out NEW.json --compare OLD.json         # compares only

On the best instruction set of the machine, each model is converted with every recipe that is not only for comparison, and with
the options of EXTRAS. Conversions use the calibration of the recipe; with --quick only the recipes of FAMILIES do, and the others
16 windows. On each other instruction set, models are converted with the recipes of FAMILIES and few calibration windows. The
record has for each file the SHA-256 of the file and that of its content (name, shape, encoding, parameters and payload of every
tensor, and all metadata but the recipe and the converter's version). Every file of the best instruction set also runs on every
instruction set: the record has TOKENS greedy tokens after PROMPT and the perplexity of a short text to the last digit.

A comparison lists results that differ or are missing from NEW, and the exit code is 1 if there are any. Files with equal content
but a different SHA-256 are only counted: the text of their recipe or the converter's version has changed.

Needs only the Python standard library. After an interruption, the same command continues with the next conversion.
"""

import argparse
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "spec/reader"))

from metadata import read_metadata  # noqa: E402

SMALL = ["--calib-samples", "8", "--calib-len", "64"]
# Old names of --distill-layers and --distill, which builds before and after the renaming accept.
EXTRAS = {
    "bits-2": ["--bits", "2"],
    "bits-3": ["--bits", "3"],
    "stbllm-tuned": ["-r", "stbllm-4of8", "--tuning", "1", "--calib-samples", "16"],
    "nm-tuned": ["-r", "nm-2of8", "--tuning", "1", "--calib-samples", "16"],
    "stbllm-fine-tuned": ["-r", "stbllm-4of8", "--fine-tuning", "1", "--calib-samples", "16"],
    "nm-fine-tuned": ["-r", "nm-2of8", "--fine-tuning", "1", "--calib-samples", "16"],
    "int2-fine-tuned": ["-r", "int2", "--fine-tuning", "1", "--calib-samples", "16"],
}
# One recipe of each family of encodings.
FAMILIES = ["stbllm-4of8", "nm-2of4", "sign", "int3", "int4", "int8", "source"]
PROMPT = "Once upon a time there was a little girl who lived with her mother in a small house. One day she went out and"
TEXT = (PROMPT + " met a big dog. The dog was sad. ") * 8
TOKENS = 64
# And "quality.*", which builds before the check do not write.
LEFT_OUT = {"provenance.recipe", "provenance.converter"}

# The tensor table (spec/container.md, 3.3): header, and an entry of 96 bytes.
TABLE = struct.Struct("<IIQ")
ENTRY = struct.Struct("<IHBBII16s4QQQQQ")
SECTION = struct.Struct("<IIQQQ16s")


def content(data: bytes) -> str:
    """The SHA-256 of tensors and metadata of a valid file, without the keys of LEFT_OUT."""
    (count,) = struct.unpack_from("<I", data, 24)
    sections = {}
    for number in range(count):
        kind, _, offset, length, _, _ = SECTION.unpack_from(data, 64 + number * SECTION.size)
        sections[kind] = memoryview(data)[offset : offset + length]
    payloads, table, metadata = sections[1], sections[2], read_metadata(sections[3])
    tensors, _, _ = TABLE.unpack_from(table)
    names = table[TABLE.size + tensors * ENTRY.size :]
    digest = hashlib.sha256()
    for number in range(tensors):
        name_at, name_length, ndim, _, encoding, _, params, *rest = ENTRY.unpack_from(
            table, TABLE.size + number * ENTRY.size
        )
        shape, (offset, length) = rest[:ndim], rest[4:6]
        name = bytes(names[name_at : name_at + name_length]).decode()
        digest.update(repr((name, shape, encoding, params.hex(), length)).encode())
        digest.update(payloads[offset : offset + length])
    for key, value in sorted(metadata.items()):
        if key not in LEFT_OUT and not key.startswith("quality."):
            digest.update(repr((key, value)).encode())
    return digest.hexdigest()


class Programs:
    """The two programs of a build."""

    def __init__(self, convert: str, run: str, quick: bool):
        self.convert, self.run, self.quick = convert, run, quick
        # The user's settings must not change the results.
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("STB_")}
        self.isas = re.search(r"here: ([^)]*)\)", self.call([run, "--version"])).group(1).split(", ")
        recipes = [line.split(None, 1) for line in self.call([convert, "recipes"]).splitlines()]
        self.recipes = [name for name, about in recipes if "for comparison" not in about]

    def call(self, command: list, isa: str | None = None) -> str:
        environment = self.environment | ({"STB_ISA": isa} if isa else {})
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            sys.exit(f"{' '.join(map(str, command))} (STB_ISA={isa}):\n{result.stderr}")
        return result.stdout

    def conversions(self):
        """Instruction set, name and options of every conversion."""
        best, *others = self.isas
        for recipe in self.recipes:
            if self.quick and recipe not in FAMILIES:
                yield best, f"{recipe}-16", ["-r", recipe, "--calib-samples", "16"]
            else:
                yield best, recipe, ["-r", recipe]
        for name, options in EXTRAS.items():
            yield best, name, options
        for isa in others:
            for recipe in FAMILIES:
                yield isa, f"{recipe}-small", ["-r", recipe, *SMALL]


def record(programs: Programs, model: Path, found: dict, save) -> None:
    """Adds the results of a model to `found` and calls `save` after each conversion."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(TEXT)
        for isa, name, options in programs.conversions():
            key = f"{model.name} {isa} {name}"
            if key in found:
                continue
            started, file = time.monotonic(), Path(folder, "model.stb")
            programs.call([programs.convert, "-q", "-f", *options, model, file], isa)
            data = file.read_bytes()
            result = {"sha256": hashlib.sha256(data).hexdigest(), "content": content(data), "bytes": len(data)}
            seconds = time.monotonic() - started
            best = isa == programs.isas[0]
            for other in programs.isas if best else [isa]:
                result[f"text {other}"] = greedy(programs, file, other)
                result[f"perplexity {other}"] = perplexity(programs, file, text, other)
            for option in (["--exact"], ["--kv", "q8"], ["--kv", "f32"]) if best else ():
                result[" ".join(["text", *option])] = greedy(programs, file, isa, option)
            found[key] = result
            save()
            print(f"{key}: converted in {seconds:.1f} s, all {time.monotonic() - started:.1f} s", flush=True)


def greedy(programs: Programs, file: Path, isa: str, options=()) -> str:
    return programs.call(
        [programs.run, file, "-q", "--no-template", "--temp", "0", "-n", str(TOKENS), "-p", PROMPT, *options], isa
    )


def perplexity(programs: Programs, file: Path, text: Path, isa: str) -> float:
    options = ["--text", text, "--ctx", "64", "--windows", "2", "--json"]
    return json.loads(programs.call([programs.run, "perplexity", file, *options], isa))["perplexity"]


def differences(old: dict, new: dict):
    """The differences, as lines, and the number of files that only differ in the keys of LEFT_OUT."""
    lines, renamed = [], 0
    for key, before in old.items():
        after = new.get(key)
        if after is None:
            lines.append(f"{key}: missing")
            continue
        renamed += before["sha256"] != after["sha256"] and before["content"] == after["content"]
        for what, value in before.items():
            if what in ("sha256", "bytes"):
                continue
            if after.get(what) != value:
                lines.append(f"{key}: {what}\n    was {value!r}\n    is  {after.get(what)!r}")
    return lines, renamed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", type=Path, nargs="*", help="dense checkpoints")
    parser.add_argument("--convert", help="stb-convert")
    parser.add_argument("--run", help="stb-run")
    parser.add_argument("--quick", action="store_true", help="16 calibration windows, except for FAMILIES")
    parser.add_argument("--out", type=Path, required=True, help="the record, JSON")
    parser.add_argument("--compare", type=Path, help="an earlier record")
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    if arguments.models:
        if not (arguments.convert and arguments.run):
            parser.error("models need --convert and --run")
        programs = Programs(arguments.convert, arguments.run, arguments.quick)
        for model in arguments.models:
            record(programs, model, found, lambda: arguments.out.write_text(json.dumps(found, indent=1)))
    if not arguments.compare:
        return 0
    old = json.loads(arguments.compare.read_text())
    lines, renamed = differences(old, found)
    print("\n".join(lines))
    print(f"{len(old)} files compared, {len(lines)} differences, {renamed} equal except for recipe or converter")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
