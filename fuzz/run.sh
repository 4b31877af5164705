#!/bin/sh
# Builds the fuzz targets with the stable compiler and runs one: fuzz/run.sh TARGET [ARGUMENT OF LIBFUZZER…]
#
# libFuzzer's instrumentation is a compiler pass that every toolchain has; RUSTC_BOOTSTRAP only allows the option of the
# sanitizer, which finds accesses outside of buffers. STB_FUZZ_SANITIZER=none does without it: twice as fast, for code
# without `unsafe`.
set -eu
cd "$(dirname "$0")"
target=${1:?which target? see fuzz/README.md}
shift
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters"
flags="$flags -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions"
if [ "${STB_FUZZ_SANITIZER:-address}" != none ]; then
    flags="$flags -Zsanitizer=${STB_FUZZ_SANITIZER:-address}"
fi
host=$(rustc -vV | sed -n 's/^host: //p')
# With a target, flags do not reach build scripts and macros.
RUSTC_BOOTSTRAP=1 RUSTFLAGS="$flags" cargo build --release --target "$host" --bin "$target"
mkdir -p "corpus/$target"
exec "${CARGO_TARGET_DIR:-target}/$host/release/$target" "corpus/$target" "$@"
