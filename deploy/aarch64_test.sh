#!/usr/bin/env bash
# Cross-builds the C++ kernels for aarch64 Linux and runs their test program in an emulator: with
# OpenMP, with threads of their own, and, where clang is installed, as clang compiles them, which is
# what macOS has. All have to give the same results to the bit, and so has every instruction set of
# this machine (kResults in the program).
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

build() { # build FOLDER OPTION...
    cmake -S "$repository" -B "$1" -DHEADSTART_MODULE=OFF -DHEADSTART_KERNEL_TEST=ON "${@:2}" >"$1.log"
    cmake --build "$1" --parallel "$(getconf _NPROCESSORS_ONLN)" >>"$1.log" || { cat "$1.log"; exit 1; }
}

build_and_run() { # build_and_run NAME OPTION...
    local folder=$work/$1
    echo "== $1"
    build "$folder" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 "${@:2}"
    qemu-aarch64 -L "$system" "$folder/kernel_test" | tee "$folder.results"
}

echo "== this machine"
build "$work/here"
"$work/here/kernel_test"

build_and_run openmp -DCMAKE_CXX_COMPILER="$target-g++"
build_and_run threads -DCMAKE_CXX_COMPILER="$target-g++" -DHEADSTART_OPENMP=OFF
if command -v clang++ >/dev/null; then
    build_and_run clang -DCMAKE_CXX_COMPILER=clang++ -DCMAKE_CXX_COMPILER_TARGET="$target" -DHEADSTART_OPENMP=OFF
fi
for results in "$work"/*.results; do
    cmp "$work/openmp.results" "$results" || fail "$results are not those of openmp"
done
echo "== passed in $SECONDS s"
