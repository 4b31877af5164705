#!/bin/sh
# Makes a Debian package of both programs with cargo-deb (cargo install cargo-deb), and prints its path:
#
#     packaging/deb.sh [OPTIONS OF cargo deb]
#
# DEBFULLNAME and DEBEMAIL, as Debian's tools have them, name the maintainer.
set -eu
cd "$(dirname "$0")/.."
target=$(cargo metadata --format-version 1 --no-deps | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
# The folder that the list of files in runtime/Cargo.toml begins with.
stage=$target/${CARGO_BUILD_TARGET:+$CARGO_BUILD_TARGET/}release/stage
rm -rf "$stage"
packaging/install.sh "$stage" >&2
# As Debian wants them.
gzip -9n "$stage/share/man/man1"/*
mkdir -p "$stage/share/doc"
gzip -9nc CHANGELOG.md > "$stage/share/doc/changelog.gz"
if [ "${DEBEMAIL-}" ]; then
    set -- --maintainer "${DEBFULLNAME:-The stb authors} <$DEBEMAIL>" "$@"
fi
cargo deb --package stb-runtime --no-build --no-strip "$@"
