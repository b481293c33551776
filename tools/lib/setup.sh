# Sourced by tools/test and tools/quickstart: makes sure that what the build needs is there.
# Says what it installs, never asks a question, and ends with a hint where it cannot help.

say() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$1" >&2
    shift
    for hint in "$@"; do printf 'help: %s\n' "$hint" >&2; done
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# The oldest Rust that the crate compiles with, as Cargo.toml declares it.
minimum_rust() { sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml; }

# need_rust [COMPONENT...]: cargo and rustc in a version that is new enough, and rustup components such as clippy.
need_rust() {
    if ! have cargo && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    have cargo && have rustc || fail "no Rust toolchain was found: cargo and rustc are not in PATH" \
        "install Rust $(minimum_rust) or newer from https://rustup.rs, open a new shell, and try again"
    local found oldest
    found=$(rustc --version | cut -d' ' -f2)
    oldest=$(printf '%s\n%s\n' "$(minimum_rust)" "${found%%-*}" | sort -V | head -n 1)
    [ "$oldest" = "$(minimum_rust)" ] || fail "rustc is $found, but relora-kit needs $(minimum_rust) or newer" \
        "run 'rustup update stable', or install a newer Rust from https://rustup.rs"
    local component
    for component in "$@"; do
        case $component in
            clippy) cargo clippy --version >/dev/null 2>&1 && continue ;;
            rustfmt) cargo fmt --version >/dev/null 2>&1 && continue ;;
        esac
        have rustup || fail "cargo has no $component" "install it with your Rust toolchain (rustup component add $component)"
        say "adding the Rust component $component: rustup component add $component"
        rustup component add "$component" >&2
    done
}

# Whether a C program that calls CBLAS and LAPACKE links against OpenBLAS: what the build will do.
openblas_links() {
    local dir status
    dir=$(mktemp -d)
    printf 'int cblas_ddot(); int LAPACKE_dgesdd(); int main(void) { return cblas_ddot && LAPACKE_dgesdd ? 0 : 1; }\n' \
        >"$dir/probe.c"
    cc -w "$dir/probe.c" -o "$dir/probe" -lopenblas >/dev/null 2>&1 && status=0 || status=1
    rm -rf "$dir"
    return $status
}

# Whether bindgen finds libclang, with which it reads the headers of MPI. `libclang-cpp.so`, the C++ library that LLVM's runtime
# brings along, is another one.
libclang_is_there() {
    local libraries='libclang(-[0-9.]+)?\.so(\.[0-9.]+)?'
    [ -n "${LIBCLANG_PATH:-}" ] ||
        compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' | grep -Eq "/$libraries\$" ||
        ldconfig -p 2>/dev/null | grep -Eq "^[[:space:]]*$libraries "
}

missing_packages() {
    local command
    for command in "$@"; do
        case $command in
            mpi) { have mpirun && have mpicc; } || printf 'openmpi-bin libopenmpi-dev ' ;;
            libclang) libclang_is_there || printf 'libclang-dev ' ;;
            *) have "$command" || printf '%s ' "$command" ;;
        esac
    done
    have cc || printf 'gcc libc6-dev '
    have pkg-config || printf 'pkg-config '
    { have cc && openblas_links; } || printf 'libopenblas-dev '
}

# need_libraries [COMMAND...]: a C compiler (the linker), pkg-config, OpenBLAS, and commands whose packages have their names;
# `mpi` stands for an MPI to build with and its mpirun, `libclang` for that library.
need_libraries() {
    local packages sudo=()
    packages=$(missing_packages "$@")
    [ -n "$packages" ] || return 0
    if ! have apt-get; then
        fail "missing on this system (by their Debian names): $packages" \
            "Fedora: dnf install gcc pkgconf openblas-devel    Arch: pacman -S gcc pkgconf openblas" \
            "for MPI also: Fedora openmpi-devel clang-devel, Arch openmpi clang, openSUSE openmpi4-devel clang-devel, macOS open-mpi llvm" \
            "openSUSE: zypper install gcc pkg-config openblas-devel    macOS: brew install pkg-config openblas, then" \
            "  export LIBRARY_PATH=\$(brew --prefix openblas)/lib PKG_CONFIG_PATH=\$(brew --prefix openblas)/lib/pkgconfig"
    fi
    if [ "$(id -u)" -ne 0 ]; then
        { have sudo && sudo -n true 2>/dev/null; } || fail "missing: $packages, and installing needs root" \
            "run 'sudo apt-get install -y $packages', then try again"
        sudo=(sudo -n)
    fi
    say "installing what the build needs: apt-get install $packages"
    local install=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends)
    # A fresh image has no package lists, an old one has lists whose packages are gone: both end in an update.
    # shellcheck disable=SC2086
    "${install[@]}" $packages </dev/null >&2 2>/dev/null || {
        say "updating the package lists: apt-get update"
        "${sudo[@]}" apt-get update </dev/null >&2
        "${install[@]}" $packages </dev/null >&2
    }
    [ -z "$(missing_packages "$@")" ] || fail "still missing after apt-get install: $(missing_packages "$@")" \
        "see the messages above; the program links against libopenblas with CBLAS and LAPACKE"
}
