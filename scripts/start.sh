#!/usr/bin/env bash
# Start everything: find Python and llama-server, report the GPU, then become the supervisor.
#
#   start.sh                serve; the settings come by environment (docs/CONFIGURATION.md)
#   start.sh --quickstart   the same for a first try on one's own machine: a local data folder, a first key, a curl
#   start.sh --help         this, in short
#
# No setting is judged here but where to find programs: supervisor.py reads them all, and complains about all at once.
set -Eeuo pipefail

readonly EXIT_USAGE=2
readonly EXIT_NO_PYTHON=5
scripts=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
readonly scripts

say() { printf 'start: %s\n' "$*"; }
fail() { printf 'start: %s\n' "$*" >&2; }

usage() {
  printf '%s\n' 'usage: start.sh [-h] [--quickstart]' '' \
    'Start everything; the settings come by environment (docs/CONFIGURATION.md).' '' \
    '  -h, --help    show this and exit' \
    '  --quickstart  a first try on this machine: a local data folder, a first key, a curl that works'
}

# Leave unless the words are ones to start with; a mistyped one must not open a port.
check_arguments() {
  case "$*" in
    '' | --quickstart) ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      fail "unknown arguments: $*"
      exit "$EXIT_USAGE"
      ;;
  esac
}

# Print the first Python that is new enough; one that is on the PATH may still not run (a version manager's shim).
find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.10; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$name"
      return 0
    fi
  done
  return 1
}

# A shell in place of the services, for a container that will not start; without a terminal, the container just stays.
# config.py is asked what the setting's word means, and only where the setting is there.
debug_shell() {
  local python=$1
  [[ -n ${DEBUG_SHELL:-} ]] || return 0
  "$python" "$scripts/supervisor.py" --debug-shell || return 0
  say 'DEBUG_SHELL is on: no service is started'
  if [[ -t 0 ]]; then
    exec bash
  fi
  trap 'kill $(jobs -p) || true; exit 0' TERM INT
  sleep infinity &
  wait $!
}

main() {
  trap 'exit 0' TERM INT
  check_arguments "$@"
  local python
  if ! python=$(find_python); then
    fail 'no Python 3.10 or later found (python3, python3.13 … python3.10)'
    exit "$EXIT_NO_PYTHON"
  fi
  if [[ ${1:-} == --quickstart ]]; then
    exec "$python" "$scripts/quickstart.py"
  fi
  debug_shell "$python"
  # nvidia-smi may take seconds, and the GPU is only reported: nothing waits for it.
  "$python" "$scripts/gpu.py" &
  exec "$python" "$scripts/supervisor.py"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
