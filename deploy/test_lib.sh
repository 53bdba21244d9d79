# What the tests beside it have in common, which source it: a folder of logs, processes that end with
# the script, and a failure that shows the logs. Before: what (the test's name), HEADSTART or not.

work=$(mktemp -d)
read -ra headstart <<<"${HEADSTART:-headstart}"
pids=()

fail() {
    echo "$what: $*" >&2
    tail -n 20 "$work"/*.log >&2
    exit 1
}

clean_up() {
    local status=$?
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" || true
    done
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT

need() { # need TOOL...
    local tool
    for tool in "$@"; do
        command -v "$tool" >/dev/null || { echo "$what: no $tool in PATH" >&2; exit 1; }
    done
}

free_port() {
    python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

await() { # await SECONDS WHAT COMMAND...: until the command succeeds
    local end=$((SECONDS + $1)) awaited=$2
    until "${@:3}" >/dev/null 2>&1; do
        ((SECONDS < end)) || fail "$awaited: not after $1 s"
        sleep 0.5
    done
}
