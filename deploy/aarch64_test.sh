#!/usr/bin/env bash
# Cross-builds the C++ kernels for aarch64 Linux and runs their test program in an emulator: with
# OpenMP and with threads of their own, which have to give the same results to the bit; and, where
# clang is installed, as clang compiles them, which is what macOS has.
#
#   deploy/aarch64_test.sh      (Debian: cmake g++-aarch64-linux-gnu qemu-user, and perhaps clang)
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
target=aarch64-linux-gnu
system=/usr/$target

fail() {
    echo "aarch64 test: $*" >&2
    exit 1
}

command -v cmake >/dev/null || fail "cmake is not installed"
command -v "$target-g++" >/dev/null || fail "$target-g++ is not installed (apt-get install g++-$target)"
command -v qemu-aarch64 >/dev/null || fail "qemu-aarch64 is not installed (apt-get install qemu-user)"

work=$(mktemp -d /tmp/headstart-aarch64.XXXXXX)
trap 'rm -rf "$work"' EXIT

# build_and_run NAME OPTION...
build_and_run() {
    local build=$work/$1
    echo "== $1"
    cmake -S "$repository" -B "$build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
        -DHEADSTART_MODULE=OFF -DHEADSTART_KERNEL_TEST=ON "${@:2}" >"$build.log"
    cmake --build "$build" --parallel "$(getconf _NPROCESSORS_ONLN)" >>"$build.log" || { cat "$build.log"; exit 1; }
    qemu-aarch64 -L "$system" "$build/kernel_test" | tee "$build.results"
}

build_and_run openmp -DCMAKE_CXX_COMPILER="$target-g++"
build_and_run threads -DCMAKE_CXX_COMPILER="$target-g++" -DHEADSTART_OPENMP=OFF
cmp "$work/openmp.results" "$work/threads.results" || fail "results depend on where threads come from"
if command -v clang++ >/dev/null; then
    # Other roundings than GCC's: its results are held to the loops alone.
    build_and_run clang -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_COMPILER_TARGET="$target" -DHEADSTART_OPENMP=OFF
fi
echo "== passed in $SECONDS s"
