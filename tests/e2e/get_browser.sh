#!/usr/bin/env bash
# Print two paths, one a line: a Chromium, and the folder whose node_modules/ holds the packages that browser/ pins.
#
# Chromium is the one on PATH, else Debian's; the packages go into the cache. Exit status 3: npm or Chromium cannot be
# had here. Anything said goes to standard error.
set -Eeuo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llama-gguf-inference
CANNOT=3

say() { printf 'browser: %s\n' "$*" >&2; }
cannot() { say "$*"; exit "$CANNOT"; }

found() { command -v "$1" 2>/dev/null; }

# wanted PACKAGE: install it with apt-get where that is possible.
wanted() {
  if [[ $(id -u) != 0 ]] || ! found apt-get >/dev/null; then cannot "$1 is not installed"; fi
  say "installing $1"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$1"; } >&2 ||
    cannot "apt-get could not install $1"
}

find_chromium() {
  local name
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if found "$name"; then return; fi
  done
  return 1
}

# packages: the folder for exactly this lock file, filled whole or not at all.
packages() {
  local folder scratch
  folder=$cache/browser-$(sha256sum "$here/browser/package-lock.json" | cut -c1-16)
  if [[ ! -d $folder ]]; then
    found npm >/dev/null || wanted npm
    mkdir -p "$cache"
    scratch=$(mktemp -d "$cache/browser.XXXXXX")
    cp "$here"/browser/package*.json "$scratch"
    if ! timeout 300 npm --prefix "$scratch" ci --ignore-scripts --no-audit --no-fund --omit=optional >&2; then
      rm -rf "$scratch"
      cannot "npm could not install what $here/browser/package.json names"
    fi
    # Another run may have been quicker.
    mv -T "$scratch" "$folder" 2>/dev/null || rm -rf "$scratch"
  fi
  printf '%s\n' "$folder"
}

main() {
  find_chromium >/dev/null || wanted chromium
  find_chromium || cannot "there is no Chromium"
  packages
}

main "$@"
