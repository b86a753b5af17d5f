#!/usr/bin/env bash
# Find Python, then exec the supervisor.
#
#   start.sh                serve; settings are environment variables (docs/CONFIGURATION.md)
#   start.sh --quickstart   a first start on this machine: a local data folder, a first key, a curl command
#   start.sh --check        print the settings, and all for which a start would end, with which status; start nothing
#   start.sh --help         a summary of this
#   start.sh --version      the version
#
# The only setting that is read here is DEBUG_SHELL. supervisor.py checks all settings and reports every wrong one at once.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  trap '' HUP USR1 USR2 # first of all: log rotation or a reload must not end the start; what is execed ignores them, too
  trap 'exit 0' TERM INT
fi
set -Eeuo pipefail

readonly EXIT_USAGE=2
readonly EXIT_NO_PYTHON=5
scripts=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
readonly scripts

say() { printf 'start: %s\n' "$*"; }
fail() { printf 'start: error: %s\n' "$*" >&2; }

usage() {
  printf '%s\n' 'usage: start.sh [-h] [--version] [--check] [--quickstart]' '' \
    'Start everything. Settings are environment variables (docs/CONFIGURATION.md).' '' \
    '  -h, --help    show this help message and exit' \
    '  --version     show the version and exit' \
    '  --check       check the settings and what a start needs, and exit' \
    '  --quickstart  a first start on this machine: a local data folder, a first key, a curl command that works'
}

# Exit with an error for unknown arguments: a mistyped one must not start a server.
check_arguments() {
  case "$*" in
    '' | --quickstart | --check) ;;
    -h | --help)
      usage
      exit 0
      ;;
    --version)
      printf 'start.sh (llama-gguf-inference) %s\n' "$(cat "$scripts/../VERSION" || printf unknown)"
      exit 0
      ;;
    *)
      usage >&2
      fail "unknown arguments: $*"
      exit "$EXIT_USAGE"
      ;;
  esac
}

# Print the first Python that is new enough. A command on the PATH may still not run (a version manager's shim).
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

# If DEBUG_SHELL is on, run a shell in place of the services, for a container that does not start. Without a terminal,
# wait for a signal. supervisor.py parses the setting, and only if it is set, since Python takes time to start.
debug_shell() {
  local python=$1
  [[ -n ${DEBUG_SHELL:-} ]] || return 0
  "$python" "$scripts/supervisor.py" --debug-shell || return 0
  say 'DEBUG_SHELL is on: no service is started'
  if [[ -t 0 ]]; then
    trap - HUP USR1 USR2
    exec bash
  fi
  trap 'kill $(jobs -p) || true; exit 0' TERM INT
  sleep infinity &
  wait $!
}

main() {
  check_arguments "$@"
  local python
  if ! python=$(find_python); then
    fail 'no Python 3.10 or later found (python3, python3.13 … python3.10)'
    exit "$EXIT_NO_PYTHON"
  fi
  if [[ ${1:-} == --quickstart ]]; then
    exec "$python" "$scripts/quickstart.py"
  fi
  if [[ ${1:-} == --check ]]; then
    exec "$python" "$scripts/supervisor.py" --check-config
  fi
  debug_shell "$python"
  exec "$python" "$scripts/supervisor.py"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  main "$@"
fi
