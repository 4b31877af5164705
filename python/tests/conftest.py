"""The bundled model, converted once, and the programs to compare with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

import stb

ROOT = Path(__file__).resolve().parents[2]
QUILL = ROOT / "tests/models/quill-4m"
STORIES = ROOT / "tests/data/stories.txt"
PROMPT = "Once upon a time, there was a little dog who"

# The reader of the specification, which shares no code with the package.
sys.path.insert(0, str(ROOT / "spec/reader"))


@pytest.fixture(scope="session")
def quill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with several encodings: 4-bit integers, dense norms."""
    out = tmp_path_factory.mktemp("models") / "quill.stb"
    stb.convert(QUILL, out, recipe="int4", calib_samples=8)
    return out


@pytest.fixture
def model(quill: Path) -> Iterator[stb.Model]:
    with stb.open(quill) as model:
        yield model


@pytest.fixture(scope="session")
def programs() -> Path:
    """The folder with stb-run and stb-convert, from check.sh."""
    return Path(os.environ["STB_PROGRAMS"])


@pytest.fixture(scope="session")
def run(programs: Path) -> Callable[..., str]:
    """Runs a program and returns its standard output."""

    def call(program: str, *args: object) -> str:
        command = [str(programs / program), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.fixture(scope="session")
def run_json(run: Callable[..., str]) -> Callable[..., Any]:
    return lambda *args: json.loads(run(*args))
