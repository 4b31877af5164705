#!/bin/sh
# Builds stb-run and stb-convert and installs them with their man pages and shell completions under PREFIX:
#
#     packaging/install.sh [PREFIX]
#     packaging/install.sh --uninstall [PREFIX]
#
# PREFIX is ~/.local if none is given. CARGO_BUILD_TARGET chooses a target whose programs run on this machine.
set -eu

programs="stb-run stb-convert"

remove=
if [ "${1-}" = --uninstall ]; then
    remove=yes
    shift
fi
case "${1-}" in
-*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
if [ $# -gt 1 ]; then
    echo "install.sh: one folder is enough: $*" >&2
    exit 2
fi
prefix=${1-$HOME/.local}
# cargo runs in the folder of the repository.
case "$prefix" in
/*) ;;
*) prefix=$PWD/$prefix ;;
esac
man=$prefix/share/man/man1
bash=$prefix/share/bash-completion/completions
zsh=$prefix/share/zsh/site-functions
fish=$prefix/share/fish/vendor_completions.d

if [ "$remove" ]; then
    for program in $programs; do
        rm -f "$prefix/bin/$program" "$man/$program.1" "$man/$program"-*.1 "$bash/$program" \
            "$zsh/_$program" "$fish/$program.fish"
    done
    exit
fi

cd "$(dirname "$0")/.."
cargo build --release --locked --package stb-runtime --package stb-convert --bins
target=$(cargo metadata --format-version 1 --no-deps --offline | sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p')
built=$target/${CARGO_BUILD_TARGET:+$CARGO_BUILD_TARGET/}release

mkdir -p "$prefix/bin" "$man" "$bash" "$zsh" "$fish"
for program in $programs; do
    install -m 755 "$built/$program" "$prefix/bin/$program"
    # Pages of commands that an older version had.
    rm -f "$man/$program"-*.1
    "$built/$program" man "$man"
    "$built/$program" completions bash > "$bash/$program"
    "$built/$program" completions zsh > "$zsh/_$program"
    "$built/$program" completions fish > "$fish/$program.fish"
done
echo "installed in $prefix: $programs"
case ":$PATH:" in
*":$prefix/bin:"*) ;;
*) echo "$prefix/bin is not in PATH; add it: export PATH=\"$prefix/bin:\$PATH\"" ;;
esac
