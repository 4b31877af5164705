#!/bin/sh
# Builds the wheel of the Python package, installs it into a virtual environment, and runs pytest and mypy:
# python/check.sh
#
# It needs a Rust toolchain, Python 3.9 or newer with venv (Debian: apt-get install python3-venv), and the Python package
# registry for maturin, numpy, pytest and mypy. The crates are compiled with the profile of the tests into the target
# folder of the repository, where most of what they depend on lies already after `cargo test --workspace`. STB_PROFILE=release
# uses the other profile, and STB_PROGRAMS names a folder with stb-run and stb-convert, which are built otherwise.
set -eu
cd "$(dirname "$0")/.."
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
export CARGO_TARGET_DIR
here=$CARGO_TARGET_DIR/python-package
profile=${STB_PROFILE:-dev}
python=$here/venv/bin/python

say() { echo "python/check.sh: $*" >&2; }

# Cargo knows no profiles and no version of another workspace.
python3 - << 'END'
import sys

if sys.version_info >= (3, 11):
    import tomllib

    def read(name):
        with open(name, "rb") as stream:
            return tomllib.load(stream)

    root, own = read("Cargo.toml"), read("python/Cargo.toml")
    shared = {name: root["profile"][name] for name in ("dev", "release")}
    if own["profile"] != shared:
        sys.exit("python/check.sh: the profiles of python/Cargo.toml differ from those of Cargo.toml")
    for name in ("version", "edition", "rust-version", "license", "authors"):
        if own["package"][name] != root["workspace"]["package"][name]:
            sys.exit(f"python/check.sh: {name} in python/Cargo.toml differs from that in Cargo.toml")
END

if ! [ -x "$python" ]; then
    mkdir -p "$here"
    if ! python3 -m venv "$here/venv"; then
        rm -rf "$here/venv"
        say "python3 has no venv: install it (Debian: apt-get install python3-venv)"
        exit 1
    fi
fi
"$python" -m pip install --quiet --disable-pip-version-check \
    "maturin>=1.9.4,<2" "numpy>=1.22" "mypy>=1.13" "pytest>=8"

rm -rf "$here/wheels"
# maturin names the wheel after the oldest system that it runs on, which does not matter here.
"$here/venv/bin/maturin" build --quiet --profile "$profile" --compatibility linux --interpreter "$python" \
    --manifest-path python/Cargo.toml --out "$here/wheels"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall "$here"/wheels/*.whl

# The programs to compare with.
if [ -z "${STB_PROGRAMS:-}" ]; then
    cargo build --quiet --profile "$profile" -p stb-runtime -p stb-convert --bins
    case $profile in
        dev) STB_PROGRAMS=$CARGO_TARGET_DIR/debug ;;
        *) STB_PROGRAMS=$CARGO_TARGET_DIR/$profile ;;
    esac
    export STB_PROGRAMS
fi
cd python/tests
"$python" -m pytest -q -p no:cacheprovider --rootdir .. .
mypy="$python -m mypy --config-file ../pyproject.toml --cache-dir $here/mypy"
$mypy -p stb
$mypy ./*.py
say "passed"
