#!/usr/bin/env bash
# A real Prometheus scrapes a real headstart, by deploy/prometheus.yml with its target replaced.
#
#   deploy/prometheus_test.sh          (needs prometheus and promtool in PATH, curl, python3)
#
# Checked: promtool accepts the configuration and the metrics; the target is up; every series of
# /metrics is in Prometheus; its counters say what a request used. All on loopback.
#
# HEADSTART   the command to start (default: headstart)
set -euo pipefail

folder=$(cd "$(dirname "$0")" && pwd)
what="prometheus test"
. "$folder/test_lib.sh"
need prometheus promtool curl python3 "${headstart[0]}"

server=127.0.0.1:$(free_port)
prometheus=127.0.0.1:$(free_port)

sed -e "s/headstart:8000/$server/" -e 's/scrape_interval: 5s/scrape_interval: 1s/' \
    "$folder/prometheus.yml" >"$work/prometheus.yml"
grep -q "$server" "$work/prometheus.yml" || fail "prometheus.yml has no target headstart:8000"
promtool check config "$work/prometheus.yml" >"$work/promtool.log" || fail "the configuration"

"${headstart[@]}" serve smollm2-135m --port "${server#*:}" --kv-memory 512MiB \
    >"$work/headstart.log" 2>&1 &
pids+=($!)
prometheus --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/data" \
    --web.listen-address="$prometheus" >"$work/prometheus.log" 2>&1 &
pids+=($!)
await 900 "headstart ready" curl -fsS --max-time 5 "http://$server/health"

curl -fsS --max-time 60 "http://$server/v1/completions" -H 'Content-Type: application/json' \
    -d '{"model": "smollm2-135m", "prompt": "Once upon a time", "max_tokens": 7,
         "ignore_eos": true}' >"$work/answer.json"
curl -fsS "http://$server/metrics" >"$work/metrics"
promtool check metrics <"$work/metrics" >"$work/promtool.log" 2>&1 || true
[ "$(grep -vc "should not contain ':'" "$work/promtool.log")" = 0 ] || fail "promtool check metrics"

query() { # query PROMQL: its values, one a line
    curl -fsS --max-time 10 "http://$prometheus/api/v1/query" --data-urlencode "query=$1" | python3 -c '
import json, sys
for series in json.load(sys.stdin)["data"]["result"]:
    print(series["value"][1])'
}
equals() { [ "$(query "$1")" = "$2" ]; }

await 30 "generation_tokens_total is 7" equals headstart:generation_tokens_total 7
await 30 "the target is up" equals 'up{job="headstart"}' 1
equals headstart:engine_up 1 || fail "headstart:engine_up is not 1"
equals headstart:e2e_request_latency_seconds_count 1 || fail "the latency histogram is not counted"
[ "$(query 'histogram_quantile(0.5, headstart:time_to_first_token_seconds_bucket) > 0' | wc -l)" = 1 ] \
    || fail "no quantile of the time to first token"

series=0
for name in $(sed -nE 's/^([a-z:_0-9]+)[ {].*/\1/p' "$work/metrics" | sort -u); do
    [ -n "$(query "$name")" ] || fail "$name is not in Prometheus"
    series=$((series + 1))
done
((series > 20)) || fail "/metrics has only $series names"
echo "passed: $series metric names scraped"
