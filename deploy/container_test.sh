#!/usr/bin/env bash
# Builds the Dockerfile's cpu target and runs it, without a container engine's daemon:
# debootstrap makes the base image, buildah builds and runs with chroot isolation.
#
#   sudo deploy/container_test.sh          (needs root, buildah, debootstrap, curl; network)
#
# Checked: the image runs as a user that is not root; the first start fetches the model into an empty
# volume; the HEALTHCHECK command passes; a chat request is answered with the right text; SIGTERM
# lets a running answer end and exits with status 0; started again on the same volume, where it can
# download nothing, it answers the same.
#
# The host's own pip configuration and CA certificates are lent to the build and the run as
# read-only mounts, so that it also works behind a mirror; nothing of them enters the image.
#
# CONTAINER_TEST_DIR   work folder (default: a new one under /var/tmp, removed at the end). A folder
#                      given here is kept: the next run reuses its base image.
# CONTAINER_TEST_PORT  loopback port of the server (default: a free one)
# TORCH_INDEX          passed to the build (see Dockerfile)
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
suite=bookworm
base=localhost/headstart-test-base
image=localhost/headstart-test
first_start_limit=900 # seconds; downloads and converts the model
second_start_limit=60

fail() {
    echo "container test: $*" >&2
    exit 1
}

for tool in buildah debootstrap curl python3; do
    command -v "$tool" >/dev/null || fail "$tool is not installed (apt-get install $tool)"
done
[ "$(id -u)" = 0 ] || fail "debootstrap and chroot isolation need root"

work=${CONTAINER_TEST_DIR:-$(mktemp -d /var/tmp/headstart-container.XXXXXX)}
mkdir -p "$work"
port=${CONTAINER_TEST_PORT:-$(python3 -c \
    'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

# A store of its own: images of the user are neither seen nor touched.
build=(buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs)
container=
runner=

clean_up() {
    local status=$?
    if [ -n "$runner" ] && kill -0 "$runner" 2>/dev/null; then
        end_server KILL || true
        wait "$runner" 2>/dev/null || true
    fi
    if [ -n "$container" ]; then
        "${build[@]}" rm "$container" >/dev/null 2>&1 || true
    fi
    if [ -z "${CONTAINER_TEST_DIR:-}" ]; then
        rm -rf --one-file-system "$work"
    fi
    exit "$status"
}
trap clean_up EXIT

# The entry point's process: the descendant of the runner that runs it, not a wrapper of buildah
# that carries its command line (a signal there would kill the server instead of ending it).
server_pid() {
    python3 - "$runner" <<'PYTHON'
import pathlib, sys

children = {}
for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
        pid, rest = stat.parent.name, stat.read_text().rsplit(")", 1)[1].split()
    except OSError:
        continue
    children.setdefault(rest[1], []).append(pid)
queue = [sys.argv[1]]
while queue:
    pid = queue.pop(0)
    try:
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    if b"/opt/headstart/bin/headstart" in words[:2] and not words[0].startswith(b"buildah"):
        print(pid)
        break
    queue += children.get(pid, [])
PYTHON
}

end_server() {
    local pid
    pid=$(server_pid)
    [ -n "$pid" ] || return 1
    kill -s "$1" "$pid"
}

# What the host lends: pip's configuration as one file, the folders it names, certificates.
lend=()
python3 -m pip config list | python3 -c '
import ast, sys

settings = {}
for line in sys.stdin:
    name, _, value = line.strip().partition("=")
    key = name.rsplit(".", 1)[-1]
    if key in ("cert", "index-url", "extra-index-url", "find-links", "constraint", "default-timeout"):
        settings.setdefault(key, ast.literal_eval(value))
print("[global]")
for key, value in settings.items():
    print(f"{key} =", value.replace("\n", " "))
' >"$work/pip.conf"
lend+=(--volume "$work/pip.conf:/etc/pip.conf:ro")
# A local index refers to files beside it: lend the folder that holds it.
for path in $(sed -nE 's/^[a-z-]+ = //p' "$work/pip.conf" | tr ' ' '\n' \
    | sed -E 's|^file://(.*)/[^/]+/?$|\1|' | grep '^/' | sort -u); do
    if [ -e "$path" ] && [ "$path" != /etc/ssl/certs/ca-certificates.crt ]; then
        lend+=(--volume "$path:$path:ro")
    fi
done
if [ -e /etc/ssl/certs/ca-certificates.crt ]; then
    lend+=(--volume /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:ro)
fi

make_base() {
    echo "== base: debootstrap $suite"
    rm -rf --one-file-system "$work/root"
    debootstrap --variant=minbase \
        --include=ca-certificates,python3,python3-dev,python3-venv "$suite" "$work/root" \
        >"$work/debootstrap.log" || fail "debootstrap failed, see $work/debootstrap.log"
    # The image names its interpreter python, as the python images do.
    ln -s python3 "$work/root/usr/local/bin/python"
    local scratch
    scratch=$("${build[@]}" from scratch)
    "${build[@]}" add --quiet "$scratch" "$work/root" / >/dev/null
    "${build[@]}" commit --quiet --rm "$scratch" "$base" >/dev/null
    rm -rf --one-file-system "$work/root"
}

inspect() {
    "${build[@]}" inspect --type image "$image" | python3 -c "
import json, sys
config = json.load(sys.stdin)['Docker']['config']
$1"
}

"${build[@]}" images --quiet "$base" >/dev/null 2>&1 || make_base

echo "== build: target cpu"
build_from=$SECONDS
"${build[@]}" bud --isolation chroot --format docker --layers=false --target cpu \
    --build-arg "BASE=$base" --build-arg "TORCH_INDEX=${TORCH_INDEX:-}" \
    "${lend[@]}" --tag "$image" "$repository"

user=$(inspect 'print(config["User"])')
[ -n "$user" ] && [ "$user" != root ] && [ "$user" != 0 ] || fail "the image runs as root"
mapfile -t command < <(inspect 'print(*config["Entrypoint"], *config["Cmd"], sep="\n")')
mapfile -t health < <(inspect 'print(*config["Healthcheck"]["Test"][1:], sep="\n")')

echo "   image of $("${build[@]}" images --format '{{.Size}}' "$image")," \
    "built in $((SECONDS - build_from)) s"

# The image's volume lives as long as this container. (A volume of the host mounted at its place
# would be hidden by it under chroot isolation.)
container=$("${build[@]}" from --quiet "$image")

# start NAME LIMIT OPTION...: the image's command, up to /health.
start() {
    local name=$1 limit=$2 from=$SECONDS
    log=$work/serve-$name.log
    inside=("${build[@]}" run --isolation chroot "${@:3}" "$container" --)
    echo "== $name start: ${command[*]} --port $port"
    "${inside[@]}" "${command[@]}" --port "$port" >"$log" 2>&1 &
    runner=$!
    until curl -fsS --max-time 5 "$url/health" >/dev/null 2>&1; do
        kill -0 "$runner" 2>/dev/null || fail_with_log "the server ended"
        ((SECONDS - from < limit)) || fail_with_log "not ready after $limit s"
        sleep 1
    done
    echo "   healthy after about $((SECONDS - from)) s"
}

fail_with_log() {
    tail -n 30 "$log" >&2
    fail "$1"
}

chat() { # chat QUESTION MAX_TOKENS STREAM
    curl -fsSN --max-time 120 "$url/v1/chat/completions" -H 'Content-Type: application/json' \
        -d '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "'"$1"'"}],
             "temperature": 0, "max_tokens": '"$2"', "stream": '"$3"'}'
}

check_answer() {
    local answer
    answer=$(chat "What is the capital of France? Answer in one sentence." 24 false | python3 -c \
        'import json, sys; print(json.load(sys.stdin)["choices"][0]["message"]["content"])')
    echo "   answer: $answer"
    [[ $answer == *Paris* ]] || fail_with_log "the answer does not name Paris"
}

# SIGTERM while an answer streams: it must come to its end, then the exit status must be 0.
stop_while_answering() {
    local server request status=0
    server=$(server_pid)
    [ -n "$server" ] || fail_with_log "the server's process was not found"
    rm -f "$work/stream"
    chat "Tell a story about a mountain village." 100 true >"$work/stream" &
    request=$!
    for ((poll = 0; poll < 1000; poll++)); do
        [ -s "$work/stream" ] && break
        sleep 0.02
    done
    kill -s TERM "$server"
    grep -q '\[DONE\]' "$work/stream" && fail "the answer ended too early to check draining"
    wait "$request" || fail_with_log "SIGTERM cut off a running answer"
    grep -q '"finish_reason":"\(length\|stop\)"' "$work/stream" && grep -q '\[DONE\]' "$work/stream" \
        || fail_with_log "SIGTERM cut off a running answer"
    wait "$runner" || status=$?
    runner=
    [ "$status" = 0 ] || fail_with_log "SIGTERM ended with $status"
    echo "   SIGTERM: the running answer came to its end, exit status 0"
}

url=http://127.0.0.1:$port
uid=$("${build[@]}" run --isolation chroot "$container" -- id -u)
[ "$uid" != 0 ] || fail "processes in the container run as root"
"${build[@]}" run --isolation chroot "$container" -- sh -c 'test -w "$HEADSTART_HOME"' \
    || fail "the model cache is not writable"

start first "$first_start_limit" "${lend[@]}"
owner=$(stat -c %u "/proc/$(server_pid)")
[ "$owner" = "$uid" ] || fail "the server runs as uid $owner, not $uid"
# The port of the test is not the one in HEALTHCHECK: put it in.
"${inside[@]}" "${health[@]//:8000/:$port}" || fail_with_log "the HEALTHCHECK command fails"
check_answer
stop_while_answering
! "${inside[@]}" "${health[@]//:8000/:$port}" 2>/dev/null \
    || fail "the HEALTHCHECK command passes without a server"

start second "$second_start_limit" --env PIP_NO_INDEX=1 --env HF_HUB_OFFLINE=1
check_answer
stop_while_answering
echo "== passed in $SECONDS s"
