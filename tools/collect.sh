#!/usr/bin/env bash
# Gather what a bug report needs into one text file: versions, settings, state, the last log lines. Secrets are left out.
#
#   tools/collect.sh                              settings from the environment
#   tools/collect.sh --env /etc/llama-gateway/env settings from a file of NAME=value lines
#   tools/collect.sh --container NAME             from a running container, by docker or podman
#   tools/collect.sh --out FILE                   default: llama-gateway-report.txt
#
# It reads and connects to this machine's own ports, and changes nothing. Read the file before you send it.
set -Euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
readonly LINES_OF_LOG=200 INSIDE=/opt/llama-gguf-inference/scripts
out=llama-gateway-report.txt
container=
python=${PYTHON:-python3}

die() {
  printf 'collect: error: %s\n' "$*" >&2
  exit 2
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

# Export the variables of a file of NAME=value lines, with or without quotes around the value; other lines are comments.
read_env_file() {
  local line name value
  [[ -r $1 ]] || die "--env: $1 cannot be read"
  while IFS= read -r line || [[ -n $line ]]; do
    [[ $line =~ ^[[:space:]]*([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || continue
    name=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    [[ ! $value =~ ^\'(.*)\'$ && ! $value =~ ^\"(.*)\"$ ]] || value=${BASH_REMATCH[1]}
    export "$name=$value"
  done <"$1"
}

# Replace what may be a secret: keys of all kinds, hashes, Authorization, passwords and queries in URLs, and the values of
# variables whose names say so.
without_secrets() {
  sed -E \
    -e 's/((sk|hf|pk|rk|ghp|gho|glpat|xox[a-z])[-_])[A-Za-z0-9_-]{8,}/\1***/g' \
    -e 's/(sha256\$)[0-9A-Fa-f]{8,}/\1***/g' \
    -e 's/([Bb]earer|[Bb]asic) +[A-Za-z0-9._~+\/=-]+/\1 ***/g' \
    -e 's#([A-Za-z][A-Za-z0-9+.-]*://)[^/@[:space:]]+@#\1***@#g' \
    -e 's#([A-Za-z][A-Za-z0-9+.-]*://[^?[:space:]"]+)\?[^[:space:]"]+#\1?***#g' \
    -e 's/(([A-Za-z0-9_]*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?)[[:space:]]*[=:][[:space:]]*)[^[:space:](][^[:space:]]*/\1***/g' \
    -e 's/((api[-_]key|x-api-key|token|password|secret)"?[[:space:]]*[=:][[:space:]]*"?)[^[:space:]",}]+/\1***/Ig' \
    -e 's/-----BEGIN [A-Z ]*PRIVATE KEY-----.*/***/'
}

section() {
  printf '\n=== %s\n' "$1"
  shift
  timeout --kill-after=2 20 "$@" </dev/null 2>&1 || printf '(exit status %s)\n' "$?"
}

# setting NAME: its value, as the gateway reads it.
setting() { sed -n "s/^$1 = \(.*\)  \[.*\]\$/\1/p" <<<"$settings"; }

# get URL: the status and the body.
readonly GET='
import ssl, sys, urllib.request as u
https = u.HTTPSHandler(context=ssl._create_unverified_context())
keep = type("Keep", (u.HTTPErrorProcessor,), {"http_response": lambda _, request, response: response})
try:
    answer = u.build_opener(u.ProxyHandler({}), https, keep).open(sys.argv[1], timeout=5)
    print(answer.status, answer.read(200000).decode("utf-8", "replace"))
except OSError as error:
    print(error)
'
# shellcheck disable=SC2016 # expanded by the shell that runs it
readonly LAST_LINES='test -r "$1" && tail -n "$2" "$1" || echo "cannot be read: $1"'

machine() {
  uname -srm
  grep -h '^PRETTY_NAME=' /etc/os-release
  grep -E '^(MemTotal|MemAvailable):' /proc/meminfo
  nproc
  df -h "$(setting DATA_DIR)"
}

report() {
  local host port scheme=http programs=$root/scripts inside=()
  if [[ -n $container ]]; then inside=("$engine" exec "$container") programs=$INSIDE; fi
  settings=$("${inside[@]}" "$python" "$programs/gateway.py" --check-config 2>&1)
  host=$(setting HOST) port=$(setting PORT)
  [[ $host != 0.0.0.0 && $host != :: ]] || host=127.0.0.1
  [[ $(setting TLS_CERT_FILE) == '(none)' ]] || scheme=https
  printf 'Report of llama-gguf-inference, %s. Secrets are left out; read it before you send it.\n' "$(date -u +%FT%TZ)"
  section version "${inside[@]}" "$python" "$programs/gateway.py" --version
  section Python "${inside[@]}" "$python" --version
  section settings echo "$settings"
  if [[ -n $container ]]; then
    section container "$engine" inspect --format '{{.Config.Image}} {{.State.Status}} {{.State.ExitCode}} {{.RestartCount}}' "$container"
    section output "$engine" logs --tail "$LINES_OF_LOG" "$container"
  fi
  section machine echo "$(machine 2>&1)"
  section GPU sh -c '{ nvidia-smi || rocm-smi; } 2>/dev/null || echo none found'
  section health "${inside[@]}" "$python" -Sc "$GET" "$scheme://$host:$port/health"
  section 'health port' "${inside[@]}" "$python" -Sc "$GET" "http://$host:$(setting PORT_HEALTH)/ready"
  section metrics "${inside[@]}" "$python" -Sc "$GET" "$scheme://$host:$port/metrics"
  section 'the last boot log' "${inside[@]}" sh -c "$LAST_LINES" sh "$(setting LOG_DIR)/$(setting LOG_NAME)/latest" "$LINES_OF_LOG"
}

main() {
  while (($#)); do
    case $1 in
      --env) read_env_file "${2:?--env needs a file}"; shift ;;
      --container) container=${2:?--container needs a name}; shift ;;
      --out) out=${2:?--out needs a file}; shift ;;
      -h | --help) usage; exit 0 ;;
      *) usage >&2; die "unknown argument: $1" ;;
    esac
    shift
  done
  engine=
  if [[ -n $container ]]; then
    engine=$(command -v docker || command -v podman) || die '--container: neither docker nor podman is installed'
  else
    command -v "$python" >/dev/null || die "$python is not installed"
  fi
  umask 077
  report | without_secrets >"$out" || die "$out cannot be written"
  printf 'collect: %s: read it, then attach it to the report\n' "$out" >&2
}

main "$@"
