#!/usr/bin/env bash
# Print the folder whose node_modules/ contains the packages that package-lock.json pins, installed into the cache.
#
# Exit status 3: npm is missing and cannot be installed, or a package cannot be fetched. Messages go to standard error.
# No package's script runs: the command-line tools come as binaries inside the packages.
set -Eeuo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llama-gguf-inference
CANNOT=3
NPM_S=900

say() { printf 'clients: %s\n' "$*" >&2; }
cannot() { say "$*"; exit "$CANNOT"; }

require_npm() {
  if command -v npm >/dev/null; then return; fi
  if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then cannot "npm is not installed"; fi
  say "installing npm"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends npm; } >&2 ||
    cannot "apt-get could not install npm"
}

main() {
  local folder scratch
  folder=$cache/clients-$(sha256sum "$here/package-lock.json" | cut -c1-16)
  if [[ ! -d $folder ]]; then
    require_npm
    mkdir -p "$cache"
    scratch=$(mktemp -d "$cache/clients.XXXXXX")
    cp "$here"/package*.json "$scratch"
    say "installing into $folder (once a machine, about 1 GB)"
    if ! timeout "$NPM_S" npm --prefix "$scratch" ci --ignore-scripts --no-audit --no-fund --loglevel=error >&2; then
      rm -rf "$scratch"
      cannot "npm could not install what $here/package-lock.json pins"
    fi
    # Another run may have been faster.
    mv -T "$scratch" "$folder" 2>/dev/null || rm -rf "$scratch"
  fi
  printf '%s\n' "$folder"
}

main "$@"
