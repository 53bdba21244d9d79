#!/usr/bin/env bash
# Runs the kernels of every x86 instruction set, AVX-512's and AVX-VNNI's too, on a CPU that has AVX2
# alone: their instructions are emulated (tests/kernels/cpu/emulated.h). First the C++ test program,
# then the Python tests of kernels and of equal bits (not with the default model: minutes a test),
# with a module built in the same way. Says nothing of speed.
#
#   deploy/x86_test.sh [PYTEST ARGUMENT...]    (Debian: libsimde-dev; an environment made by `make test`)
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
python=$repository/.venv/bin/python
processors=$(getconf _NPROCESSORS_ONLN)

fail() {
    echo "x86 test: $*" >&2
    exit 1
}

grep -qw avx2 /proc/cpuinfo || fail "this CPU has no AVX2"
[ -e /usr/include/simde/x86/avx512.h ] || fail "SIMDe is not installed (apt-get install libsimde-dev)"
"$python" -c "import nanobind, pytest" || fail "no environment with what tests need: make test"
PATH=$repository/.venv/bin:$PATH

work=$(mktemp -d /tmp/headstart-x86.XXXXXX)
trap 'rm -rf "$work"' EXIT

cmake -G Ninja -S "$repository" -B "$work/build" -DHEADSTART_KERNEL_TEST=ON -DHEADSTART_EMULATED=ON \
    -DPython_EXECUTABLE="$python" >"$work/log"
cmake --build "$work/build" --parallel "$processors" >>"$work/log" || { cat "$work/log"; exit 1; }
"$work/build/kernel_test"

# (tests/kernels/test_cpp.py is this program, compiled for the machine as it is.)
# An environment that has this module, and everything else from the one at hand.
cp -rL "$repository/src" "$work/src"
rm -f "$work"/src/headstart/kernels/_cpu*.so
cp "$work"/build/_cpu*.so "$work/src/headstart/kernels/"
"$python" -m venv --without-pip "$work/venv"
packages=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
printf '%s\n' "$work/src" "$packages" >"$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/emulated.pth"
cd "$repository"
export HEADSTART_HOME=$work/home
"$work/venv/bin/python" -m pytest -n "$processors" -m "not interpreter and not model" \
    --ignore=tests/kernels/gpu --ignore=tests/kernels/test_cpp.py \
    tests/kernels tests/engine/test_invariance.py tests/engine/test_formats.py "$@"
