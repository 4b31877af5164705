#!/bin/sh
# Checks that all CUDA kernels compile for every supported generation of GPUs: tests/cuda.sh
#
# The compiler (NVRTC) comes from the Python package registry; no toolkit and no GPU is needed. If it is not
# available, the script says so and passes, unless STB_REQUIRE_NVRTC is set.
set -eu
cd "$(dirname "$0")/.."
here=$PWD/target/cuda
version=13.0.88

say() { echo "tests/cuda.sh: $*" >&2; }
skip() {
    say "$*"
    [ -z "${STB_REQUIRE_NVRTC:-}" ] && exit 0
    exit 1
}
if [ "$(uname -s)" != Linux ]; then
    skip "skipped: the packages are for Linux"
fi
command -v python3 > /dev/null || skip "skipped: no python3"
if ! [ -e "$here/$version" ]; then
    rm -rf "$here/venv"
    mkdir -p "$here"
    python3 -m venv "$here/venv" || skip "skipped: python3 has no venv"
    "$here/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "nvidia-cuda-nvrtc==$version" || skip "skipped: no NVRTC from the package registry"
    touch "$here/$version"
fi
library=$(find "$here/venv" -name 'libnvrtc.so.*' | head -n 1)
[ -n "$library" ] || skip "skipped: the package has no library"
# NVRTC searches its second library in the loader's path.
LD_LIBRARY_PATH=$(dirname "$library")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH STB_NVRTC="$library" STB_REQUIRE_NVRTC=1
cargo test --quiet -p stb-kernels --test cuda_compile -- --nocapture
say "passed"
