#!/usr/bin/env bash
# Print the folder that holds prometheus and promtool: the one on PATH, else Debian's package unpacked into the cache.
#
# The package is not installed, since that would start a service. Anything said goes to standard error.
set -Eeuo pipefail

folder=${XDG_CACHE_HOME:-$HOME/.cache}/llama-gguf-inference/prometheus

say() { printf 'prometheus: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

works() { "$1/promtool" --version >/dev/null 2>&1 && "$1/prometheus" --version >/dev/null 2>&1; }

unpack() {
  local scratch
  command -v dpkg-deb >/dev/null || die "not on PATH, and this is not Debian or Ubuntu"
  scratch=$(mktemp -d "$folder.XXXXXX")
  # shellcheck disable=SC2064
  trap "rm -rf '$scratch'" EXIT
  chmod 755 "$scratch"
  if ! (cd "$scratch" && apt-get -qq -o APT::Sandbox::User=root download prometheus >&2); then
    [[ $(id -u) == 0 ]] || die "apt-get download prometheus failed"
    apt-get -qq update >&2
    (cd "$scratch" && apt-get -qq -o APT::Sandbox::User=root download prometheus >&2)
  fi
  dpkg-deb -x "$scratch"/prometheus_*.deb "$scratch/root"
  rm -rf "$folder"
  mv "$scratch/root" "$folder"
}

main() {
  local found
  found=$(dirname "$(command -v promtool || true)")
  if [[ $found == /* ]] && works "$found"; then printf '%s\n' "$found"; return; fi
  if ! works "$folder/usr/bin"; then
    mkdir -p "$(dirname "$folder")"
    unpack
  fi
  works "$folder/usr/bin" || die "$folder/usr/bin/promtool does not run"
  printf '%s\n' "$folder/usr/bin"
}

main "$@"
