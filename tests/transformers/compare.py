"""Compares the logits of exported models in PyTorch transformers with those of the packed models.

    python3 -m venv target/transformers
    target/transformers/bin/pip install torch transformers
    target/transformers/bin/python tests/transformers/compare.py [--model FOLDER] [--recipe NAME]...

For each recipe the model is converted and exported (`stb-convert export`, f32), the exported folder is
loaded by transformers in f32, and the logits of both after every token of a text are compared. They are
equal if no logit differs by more than 1e-5 of the largest and the most likely token is the same everywhere.
Both compute in f32, in different orders.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy
import torch
import transformers

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
TEXT = "Once upon a time, there was a little dog who lived in a big house. He loved to play with his friends."


def cargo(package: str, kind: str, program: str, *arguments: object) -> bytes:
    command = ["cargo", "run", "--quiet", "--release", "-p", package, kind, program, "--"]
    command += [str(a) for a in arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout


def compare(folder: pathlib.Path, source: pathlib.Path, recipe: str) -> bool:
    packed, dense = folder / f"{recipe}.stb", folder / recipe
    cargo("stb-convert", "--bin", "stb-convert", source, packed, "--recipe", recipe, "--quiet")
    cargo("stb-convert", "--bin", "stb-convert", "export", packed, dense, "--dtype", "f32")

    tokenizer = transformers.AutoTokenizer.from_pretrained(dense)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    # Without special tokens, so that both models get the same ids.
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    return compare_logits(recipe, theirs, packed, ids)


def compare_logits(name: str, theirs: numpy.ndarray, packed: pathlib.Path, ids: list[int]) -> bool:
    """Compares logits [tokens, vocabulary] with those of a packed model after the same tokens."""
    found = cargo("stb-tests", "--example", "logits", packed, ",".join(map(str, ids)))
    ours = numpy.frombuffer(found, "<f4").reshape(len(ids), -1)

    largest, difference = abs(theirs).max(), abs(ours - theirs).max()
    same = bool((ours.argmax(-1) == theirs.argmax(-1)).all())
    equal = same and difference <= TOLERANCE * largest
    print(
        f"{name}: {len(ids)} tokens x {ours.shape[1]} logits, largest {largest:.3f}, "
        f"largest difference {difference:.2e}, most likely tokens "
        f"{'the same' if same else 'NOT the same'}: {'equal' if equal else 'NOT EQUAL'}"
    )
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "tests/models/quill-4m")
    parser.add_argument("--recipe", action="append", help="default: one of each encoding")
    options = parser.parse_args()
    recipes = options.recipe or ["stbllm-4of8", "nm-1of8", "nm-2of4", "int4", "int8", "source"]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.model.name}")
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(pathlib.Path(folder), options.model.resolve(), r) for r in recipes]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
