#!/usr/bin/env bash
# Go through a machine with its real model in ten minutes, and print a report (docs/LIVE_TESTING.md).
#
#   MODEL_PATH=/models/m.gguf LLAMA_BIN=/app/llama-server tests/live/run.sh [--report FILE] [--keep]
#
# Starts a worker of its own on free ports with a temporary DATA_DIR, tries it, stops it. Exit status 0 if every step
# passed, 1 if one failed, 2 if the command or the settings are wrong.
set -Eeuo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scripts=$root/scripts
LOAD_S=${LIVE_LOAD_S:-1800} # the longest load, in seconds
REQUEST_S=300               # the longest request
STOP_S=60                   # the longest drain
report='' keep=false failed=0 worker='' folder=''

usage() { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse() {
  while (($#)); do
    case $1 in
      --report) report=${2:?--report needs a file}; shift ;;
      --keep) keep=true ;;
      -h | --help) usage; exit 0 ;;
      *) usage >&2; exit 2 ;;
    esac
    shift
  done
}

# --- The report ---

line() { printf '%s\n' "$*" | tee -a "$folder/report.md"; }
passed() { line "| $1 | passed | ${2//|/\\|} |"; }
failure() { failed=$((failed + 1)); line "| $1 | **failed** | ${2//|/\\|} |"; }
# verdict STEP SEEN COMMAND…: passed if the command succeeds.
verdict() {
  local step=$1 seen=$2
  shift 2
  if "$@"; then passed "$step" "$seen"; else failure "$step" "$seen"; fi
}
now() { python3 -c 'import time; print(time.monotonic())'; }
since() { python3 -c 'import sys, time; print(f"{time.monotonic() - float(sys.argv[1]):.1f}")' "$1"; }

# --- The worker ---

free_ports() {
  python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in sockets))'
}

settings() {
  local ports
  read -ra ports < <(free_ports)
  export HOST=127.0.0.1 PORT=${ports[0]} PORT_HEALTH=${ports[1]} PORT_BACKEND=${ports[2]}
  export DATA_DIR=$folder/data MAX_REQUESTS_PER_MINUTE=${MAX_REQUESTS_PER_MINUTE:-10000}
  export MODELS_DIR=${MODELS_DIR:-$folder/data/models} DRAIN_TIMEOUT=${DRAIN_TIMEOUT:-30}
  unset ACCESS_LOG USAGE_FILE AUTH_KEYS_FILE API_KEYS API_KEYS_FILE AUTH_ENABLED METRICS_AUTH_ENABLED TLS_CERT_FILE TLS_KEY_FILE GATEWAY_PORT IDLE_STOP_SECONDS
  mkdir -p "$DATA_DIR"
  url=http://127.0.0.1:$PORT
}

keys() { python3 "$scripts/key_mgmt.py" --quiet "$@"; }
ready_status() { curl -s -o /dev/null -m 5 -w '%{http_code}' "http://127.0.0.1:$PORT_HEALTH/ready" || true; }
alive() { kill -0 "$worker" 2>/dev/null; }
health() { curl -s -m 5 "$url/health" | python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

# shellcheck disable=SC2329 # the trap calls it
finish() {
  if [[ -n $worker ]] && alive; then
    kill -TERM "$worker"
    await "$STOP_S" ended || kill -KILL "$worker"
  fi
  if [[ -n $report && -s $folder/report.md ]]; then cp "$folder/report.md" "$report"; fi
  if $keep; then printf 'kept: %s\n' "$folder" >&2; else rm -rf "$folder"; fi
}

ended() { ! alive; }
# await SECONDS COMMAND…: try the command ten times per second; fails if it never succeeds.
await() {
  local tries=$(($1 * 10))
  shift
  while ((tries-- > 0)); do
    if "$@"; then return 0; fi
    sleep 0.1
  done
  return 1
}

# --- Requests ---

# ask KEY BODY [PATH]: print the status on the last line, after the body.
ask() {
  curl -s -m "$REQUEST_S" -w '\n%{http_code}\n' "$url${3:-/v1/chat/completions}" -H "Authorization: Bearer $1" \
    -H 'Content-Type: application/json' -d "$2" || true
}
body() { printf '{"messages": [{"role": "user", "content": "%s"}], "max_tokens": %s, "stream": %s%s}' "$1" "$2" "$3" "${4:-}"; }
status_of() { ask "$@" | tail -n 1; }
endless=', "ignore_eos": true'

# --- Steps ---

step_machine() {
  verdict "Python" "$(python3 --version)" python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'
  passed "machine" "$(uname -srm), $(nproc) cores, $(free -h 2>/dev/null | awk '/^Mem:/ {print $2}') memory"
  passed "GPU" "$(gpu)"
}

gpu() {
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv,noheader | paste -sd ';'
  elif command -v rocm-smi >/dev/null; then
    rocm-smi --showproductname --showmeminfo vram --csv | paste -sd ';'
  else
    printf 'none found (neither nvidia-smi nor rocm-smi)'
  fi
}

step_settings() {
  local status=0
  "$scripts/start.sh" --check >"$folder/check" 2>&1 || status=$?
  ((status == 0)) || { tail -n 5 "$folder/check" >&2; failure "settings" "exit status $status"; exit 2; }
  passed "settings" "accepted"
}

step_start() {
  local began status seen=''
  began=$(now)
  "$scripts/start.sh" >"$folder/log" 2>&1 &
  worker=$!
  while status=$(ready_status) && [[ $status != 200 ]]; do
    [[ $status != 204 ]] || seen=', 204 while it loaded'
    if ! alive || (($(printf '%.0f' "$(since "$began")") > LOAD_S)); then
      failure "start" "not ready after $(since "$began") s"
      return 1
    fi
    sleep 0.2
  done
  passed "start" "ready after $(since "$began") s$seen"
  passed "GPU after the load" "$(gpu)"
  passed "llama-server" "$(health slots) slots"
}

step_chat() {
  local answer
  answer=$(ask "$key" "$(body 'Say hello.' 32 false)")
  verdict "chat" "$(python3 -c '
import json, sys
answer = json.loads(sys.argv[1].rpartition("\n")[0])
usage = answer["usage"]
print(usage["prompt_tokens"], "tokens in,", usage["completion_tokens"], "out")' "$answer" 2>&1 | tail -n 1)" \
    test "${answer##*$'\n'}" = 200
}

step_stream() {
  curl -sN -m "$REQUEST_S" "$url/v1/chat/completions" -H "Authorization: Bearer $key" -H 'Content-Type: application/json' \
    -d "$(body 'Count from one to fifty.' 128 true)" -w '\nfirst byte after %{time_starttransfer} s' >"$folder/stream" || true
  verdict "stream" "$(tail -n 1 "$folder/stream"), $(speed)" grep -q '^data: \[DONE\]' "$folder/stream"
}

# Read llama-server's own timings from the stream's last event.
speed() {
  python3 -c '
import re, sys
found = dict(re.findall(r"\"(prompt_per_second|predicted_per_second)\":([0-9.]+)", open(sys.argv[1]).read()))
print(*(f"{float(value):.0f} tokens/s {name}" for name, value in zip(("prompt", "generation"), found.values())), sep=", ")
' "$folder/stream"
}

step_messages() {
  local answer
  answer=$(ask "$key" '{"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}]}' /v1/messages)
  verdict "/v1/messages" "status ${answer##*$'\n'}" test "${answer##*$'\n'}" = 200
}

step_keys() {
  local statuses='' limited n
  verdict "wrong key" "401" test "$(status_of sk-wrong-0123456789abcdef '{}')" = 401
  limited=$(keys generate --name limited --rate-limit 2)
  reload
  for n in 1 2 3; do statuses+="$(status_of "$limited" "$(body "Request $n" 1 false)") "; done
  verdict "rate limit of 2" "${statuses% }" test "$statuses" = "200 200 429 "
}

reload() { curl -s -m 30 -o /dev/null -X POST -H "Authorization: Bearer $operator" "$url/reload"; }

step_slots() {
  local slots n statuses
  slots=$(health slots)
  local pids=()
  for ((n = 0; n < 2 * slots; n++)); do
    status_of "$key" "$(body "Request $n" 64 true "$endless")" >"$folder/status-$n" &
    pids+=($!)
  done
  wait "${pids[@]}"
  statuses=$(cat "$folder"/status-* | sort | uniq -c | xargs)
  verdict "$((2 * slots)) requests at once" "count and status: $statuses" test "$statuses" = "$((2 * slots)) 200"
}

step_cancel() {
  local began
  timeout 2 curl -sN "$url/v1/chat/completions" -H "Authorization: Bearer $key" -H 'Content-Type: application/json' \
    -d "$(body 'Write a long story.' 100000 true "$endless")" >/dev/null || true
  began=$(now)
  if await 10 idle; then
    passed "cancel" "the slot was free $(since "$began") s after the client had left"
  else
    failure "cancel" "a slot is still busy after 10 s"
  fi
}

idle() {
  curl -s -m 5 -H "Authorization: Bearer $operator" "$url/slots" |
    python3 -c 'import json, sys; sys.exit(any(slot["is_processing"] for slot in json.load(sys.stdin)))'
}

step_accounts() {
  local counted
  counted=$(curl -s -m 30 -H "Authorization: Bearer $key" "$url/metrics" | grep -c '^gateway_requests_total{' || true)
  verdict "metrics" "$counted series of gateway_requests_total" test "$counted" -gt 2
  counted=$(curl -s -m 30 -H "Authorization: Bearer $operator" "$url/usage" |
    python3 -c 'import json, sys; print(sum(row["completion"] for row in json.load(sys.stdin)["rows"]))')
  verdict "usage" "$counted tokens generated" test "$counted" -gt 0
}

step_drain() {
  local status=0 stream
  : >"$folder/last-stream"
  ask "$key" "$(body 'Count to one hundred.' 256 true "$endless")" >"$folder/last-stream" &
  stream=$!
  await 30 begun || true
  kill -TERM "$worker"
  wait "$stream" || true
  wait "$worker" || status=$?
  worker=''
  verdict "drain" "exit status $status" test "$status" = 0
  verdict "stream during the drain" "$(grep -c '^data: ' "$folder/last-stream") events" \
    grep -q '^data: \[DONE\]' "$folder/last-stream"
}

begun() { grep -q '^data: ' "$folder/last-stream" || ended; }

main() {
  parse "$@"
  folder=$(mktemp -d "${TMPDIR:-/tmp}/live.XXXXXX")
  trap finish EXIT
  settings
  line "# Live test of $(cat "$root/VERSION"), $(date -u '+%Y-%m-%d %H:%M UTC')"
  line ""
  line "| step | result | seen |"
  line "| --- | --- | --- |"
  step_machine
  step_settings
  key=$(keys generate --name live)
  operator=$(keys generate --name operator --role operator)
  if step_start; then
    step_chat
    step_stream
    step_messages
    step_keys
    step_slots
    step_cancel
    step_accounts
    step_drain
  fi
  line ""
  if ((failed)); then
    line "$failed steps failed. The log's last lines:"
    line ""
    sed -n 's/^/    /p' "$folder/log" 2>/dev/null | tail -n 30 | tee -a "$folder/report.md"
    exit 1
  fi
  line "Every step passed."
}

main "$@"
