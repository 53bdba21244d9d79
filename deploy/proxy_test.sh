#!/usr/bin/env bash
# A prompt that takes longer than a minute to compute, asked for by curl through an nginx with its
# default times (60 s without a byte end a request there), streamed.
#
#   deploy/proxy_test.sh          (needs nginx and curl; Debian: nginx-light)
#
# Checked: the head comes within 2 s; pings fill the silence; the answer is whole; a GET through the
# proxy still works beside it; the request is one line of log with its times. All on loopback.
#
# HEADSTART   the command to start (default: headstart)
# WORDS       of the prompt (default 11000: 7,400 tokens, on one thread)
set -euo pipefail

words=${WORDS:-11000}
PATH=$PATH:/usr/sbin
what="proxy test"
. "$(dirname "$0")/test_lib.sh"
need nginx curl python3 "${headstart[0]}"

server=127.0.0.1:$(free_port)
proxy=127.0.0.1:$(free_port)
cat >"$work/nginx.conf" <<END
daemon off;
user $(id -un) $(id -gn);
pid $work/pid;
error_log $work/nginx.log;
events {}
http {
    access_log off;
    client_body_temp_path $work/body;
    proxy_temp_path $work/proxy;
    fastcgi_temp_path $work/fastcgi;
    uwsgi_temp_path $work/uwsgi;
    scgi_temp_path $work/scgi;
    server {
        listen $proxy;
        location / { proxy_pass http://$server; }
    }
}
END
# One thread, and no cache of the prompt: it takes as long as it can.
"${headstart[@]}" serve smollm2-135m --port "${server#*:}" --kv-memory 512MiB --threads 1 --no-prefix-caching \
    >"$work/headstart.log" 2>&1 &
pids+=($!)
nginx -c "$work/nginx.conf" -e "$work/nginx.log" >"$work/nginx.out.log" 2>&1 &
pids+=($!)
await 900 "headstart ready behind nginx" curl -fsS --max-time 5 "http://$proxy/health"

python3 -c "
import json
text = ' '.join(f'word{i % 7}' if i % 3 == 0 else 'stone' for i in range($words // 2))
body = {'model': 'smollm2-135m', 'stream': True, 'max_tokens': 8, 'ignore_eos': True,
        'messages': [{'role': 'user', 'content': text}]}
print(json.dumps(body))" >"$work/body.json"
curl -sN -D "$work/head" -o "$work/answer" -w '%{time_starttransfer} %{time_total} %{http_code}\n' \
    -H 'Content-Type: application/json' -d "@$work/body.json" "http://$proxy/v1/chat/completions" >"$work/times" &
asked=$!
sleep 5
curl -fsS --max-time 5 "http://$proxy/v1/models" >/dev/null || fail "no answer beside the long prompt"
wait "$asked" || fail "curl ended with $?: $(cat "$work/times")"
read -r head total status <"$work/times"
[ "$status" = 200 ] || fail "status $status: $(cat "$work/answer")"
python3 - "$head" "$total" "$work/answer" <<'END' || fail "the stream"
import json, sys
head, total, lines = float(sys.argv[1]), float(sys.argv[2]), open(sys.argv[3]).read().splitlines()
pings = sum(line.startswith(":") for line in lines)
events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
assert total > 60, f"the prompt took {total:.0f} s only: set WORDS"
assert head < 2.5, f"the head came after {head:.1f} s"
assert pings >= total // 10 - 2, f"{pings} pings in {total:.0f} s"
assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]", lines[-2:]
assert events[-1]["choices"][0]["finish_reason"] == "length", events[-1]
print(f"head after {head:.2f} s, {pings} pings, answer after {total:.0f} s")
END
sleep 0.5
[ "$(grep -c 'POST /v1/chat/completions' "$work/headstart.log")" = 1 ] || fail "not one line of log"
grep 'POST /v1/chat/completions' "$work/headstart.log"
echo "passed"
