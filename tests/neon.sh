#!/bin/sh
# The tests of the kernels and of the programs on aarch64, with NEON, under emulation: tests/neon.sh
#
# Needs qemu's user-mode emulator, a C cross compiler and the standard library of Rust for aarch64.
# As root on Debian it installs missing packages; elsewhere it prints their names.
#
# The standard library has to come from the same release as the compiler. If the toolchain in use
# has none for aarch64, both are taken from Debian's packages (of the first release that has Rust
# 1.95 or later), unpacked under target/neon. The machine's own toolchain is not changed.
set -eu
cd "$(dirname "$0")/.."
triple=aarch64-unknown-linux-gnu
here=$PWD/target/neon
suite=trixie

say() { echo "tests/neon.sh: $*" >&2; }
can_install() { [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; }

if [ "$(uname -m)" = aarch64 ]; then
    say "this machine has NEON: cargo test is enough"
    exit 0
fi

tools() {
    command -v aarch64-linux-gnu-gcc > /dev/null && command -v qemu-aarch64 > /dev/null &&
        [ -e /usr/aarch64-linux-gnu/lib/libc.so.6 ]
}
if ! tools; then
    packages="gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
    if ! can_install; then
        say "install $packages (the names of Debian's packages)"
        exit 1
    fi
    apt-get -q update
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $packages
fi

# Unpacks Debian's compiler with the standard library for both architectures and the libraries that the
# compiler loads into $here/toolchain, with separate package lists and a separate cache.
fetch_toolchain() {
    rm -rf "$here/toolchain" "$here/apt"
    mkdir -p "$here/apt/lists/partial" "$here/apt/cache/archives/partial" "$here/toolchain"
    # The mirror that this machine uses for Debian's own packages.
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' |
        grep -v security | head -n 1)
    key=/usr/share/keyrings/debian-archive-keyring.gpg
    for name in $suite $suite-backports; do
        echo "deb [signed-by=$key] $mirror $name main"
    done > "$here/apt/sources.list"
    : > "$here/apt/status"
    cat > "$here/apt/conf" << END
APT::Architecture "amd64";
APT::Architectures { "amd64"; "arm64"; };
APT::Default-Release "$suite-backports";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Dir::State "$here/apt";
Dir::State::status "$here/apt/status";
Dir::Cache "$here/apt/cache";
Dir::Etc::sourcelist "$here/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
END
    (
        export APT_CONFIG="$here/apt/conf"
        apt-get -q update
        # With its dependencies; the two others depend on packages that are not used here.
        apt-get -q -y --download-only install libstd-rust-dev:amd64
        cd "$here/apt/cache/archives"
        apt-get -q download rustc:amd64 libstd-rust-dev:arm64
        for package in *.deb; do
            dpkg-deb --extract "$package" "$here/toolchain"
        done
    )
    rm -rf "$here/apt"
    # The toolchain needs a newer C library than the machine's, so its own loader is called by name.
    cat > "$here/rustc" << END
#!/bin/sh
root=$here/toolchain/usr
exec "\$root/lib64/ld-linux-x86-64.so.2" --library-path "\$root/lib/x86_64-linux-gnu" \\
    "\$root/bin/rustc" --sysroot "\$root" "\$@"
END
    chmod +x "$here/rustc"
}
if ! [ -d "$(rustc --print sysroot)/lib/rustlib/$triple/lib" ]; then
    if ! { [ -x "$here/rustc" ] && "$here/rustc" -vV > /dev/null; }; then
        if ! can_install || [ "$(uname -m)" != x86_64 ]; then
            say "install Rust's standard library for aarch64: rustup target add $triple"
            exit 1
        fi
        fetch_toolchain
    fi
    export RUSTC="$here/rustc"
fi

export CARGO_BUILD_TARGET=$triple CARGO_TARGET_DIR="$here/build"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu"

say "the programs build for aarch64; without the server, whose crates take longest and have nothing to do with NEON"
cargo build -p stb-runtime -p stb-convert --bins --no-default-features \
    --features stb-runtime/cli,stb-convert/cli
say "format and kernels, with dot products of bytes and without"
cargo test -p stb-format --tests
# Without the tests of CUDA kernels, which do not depend on the architecture.
kernels() { cargo test -p stb-kernels --lib --test oracle --test kv; }
kernels
QEMU_CPU=cortex-a53 kernels

# The programs write the same bytes and the same text as on this machine.
unset RUSTC CARGO_BUILD_TARGET CARGO_TARGET_DIR
say "conversion and generation as on this machine"
cargo build --quiet -p stb-runtime -p stb-convert --bins
native() { program=$1 && shift && "target/debug/$program" "$@"; }
emulated() {
    program=$1 && shift
    qemu-aarch64 -L /usr/aarch64-linux-gnu "$here/build/$triple/debug/$program" "$@"
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=tests/models/quill-4m
# The figures of the check come from the exponentials of the C library, which may round differently there.
quick="--quiet --force --no-check --calib-samples 2 --calib-len 64"
# shellcheck disable=SC2086
for side in native emulated; do
    # A recipe without fits to the output, which take minutes under emulation.
    $side stb-convert $model "$work/$side.stb" --recipe gptq-4bit $quick
done
cmp "$work/native.stb" "$work/emulated.stb"
for recipe in int4 int3 nm-1of8 nm-2of4 stbllm-4of8; do
    # shellcheck disable=SC2086
    native stb-convert $model "$work/model.stb" --recipe $recipe $quick
    set -- "$work/model.stb" --no-template --temp 0 --prompt "Once upon a time"
    native stb-run "$@" -n 200 > "$work/native.txt" 2> "$work/log" || { cat "$work/log"; exit 1; }
    for isa in neon neon-dotprod; do
        STB_ISA=$isa emulated stb-run "$@" -n 200 > "$work/emulated.txt" 2> "$work/log" ||
            { cat "$work/log"; exit 1; }
        cmp "$work/native.txt" "$work/emulated.txt"
    done
    say "$recipe: $(wc -c < "$work/native.txt") bytes of text, the same on both"
done
say "passed"
