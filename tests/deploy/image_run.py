#!/usr/bin/env python3
"""Run the files of an image as a container engine would, and check what docs/DEPLOYMENT.md promises.

    image_run.py ROOTFS IMAGE.json DATA KIND

ROOTFS is the mounted image, IMAGE.json its description by buildah, DATA a folder for /data with models/tiny.gguf, and
KIND the kind of its llama-server (real, stand-in). Called by deploy/image-test.sh, as
root. The container: namespaces for mounts and processes, a read-only root, the image's user without any capability.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent.parent
INSTALLED = "opt/llama-gguf-inference"
PATIENCE_S = 60.0
STOP_S = 10.0  # what `docker stop` allows
# Docker's own mounts, then the image's user without a way back to more.
CONTAINER = """
set -e
root=$1 data=$2 uid=$3 gid=$4 workdir=$5
shift 5
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mknod -m 666 "$root/dev/null" c 1 3
mknod -m 666 "$root/dev/zero" c 1 5
mknod -m 666 "$root/dev/urandom" c 1 9
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size=64m tmpfs "$root/dev/shm"
mount --bind "$data" "$root/data"
exec chroot "$root" setpriv --reuid="$uid" --regid="$gid" --clear-groups --no-new-privs --inh-caps=-all \
  --bounding-set=-all -- /bin/sh -c 'cd "$0" && exec "$@"' "$workdir" "$@"
"""


def say(text: str) -> None:
    print(f"image-test: {text}", flush=True)


def check(holds: bool, failure: str) -> None:
    if not holds:
        raise SystemExit(f"image-test: FAILED: {failure}")


@dataclass(frozen=True)
class Image:
    root: Path
    user: str
    entrypoint: list[str]
    workdir: str
    env: dict[str, str]
    healthcheck: list[str]
    labels: dict[str, str]
    ports: set[str]

    @classmethod
    def load(cls, root: Path, description: Path) -> "Image":
        config = json.loads(description.read_text())["Docker"]["config"]
        return cls(
            root,
            config["User"],
            config["Entrypoint"],
            config["WorkingDir"],
            dict(pair.split("=", 1) for pair in config["Env"]),
            (config.get("Healthcheck") or {}).get("Test", []),
            config.get("Labels") or {},
            set(config.get("ExposedPorts") or {}),
        )


# The contents of the image


def check_description(image: Image) -> None:
    check(re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", image.user) is not None, f"the user is {image.user!r}")
    check({"8000/tcp", "8001/tcp"} <= image.ports, f"ports: {image.ports}")
    check(image.entrypoint == [f"/{INSTALLED}/scripts/start.sh"], f"entrypoint: {image.entrypoint}")
    check("DATA_DIR" not in image.env, "the image sets DATA_DIR")
    check(not image.env.get("LLAMA_ARG_HOST"), "the base's LLAMA_ARG_HOST shows through")
    check(image.healthcheck[:1] == ["CMD"], f"health check: {image.healthcheck}")
    for name in ("title", "description", "licenses", "source", "version", "revision", "base.name"):
        check(bool(image.labels.get(f"org.opencontainers.image.{name}")), f"no label {name}")


def check_files(image: Image) -> None:
    """The image contains scripts/ and VERSION only, unchanged, with bytecode, and only root may write them."""
    folder = image.root / INSTALLED
    wanted = {"VERSION": CHECKOUT / "VERSION"}
    for pattern in ("*.py", "*.html"):
        wanted |= {str(path.relative_to(CHECKOUT)): path for path in (CHECKOUT / "scripts").rglob(pattern)}
    wanted["scripts/start.sh"] = CHECKOUT / "scripts" / "start.sh"
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    source = {name: path for name, path in found.items() if not name.endswith(".pyc")}
    check(source.keys() == wanted.keys(), f"not as in the checkout: {sorted(source.keys() ^ wanted.keys())}")
    check(all(source[name].read_bytes() == wanted[name].read_bytes() for name in wanted), "a file differs")
    check(len(found) - len(source) == sum(name.endswith(".py") for name in wanted), "bytecode is missing")
    check(all(path.stat().st_uid == 0 and not path.stat().st_mode & 0o022 for path in found.values()), "is writable")
    check(not list((image.root / "usr/bin").glob("pip*")), "there is a pip")


# The running container


class Container:
    def __init__(self, image: Image, data: Path) -> None:
        self.image, self.data = image, data
        self.uid, self.gid = image.user.split(":")
        port, port_health, port_backend = map(str, free_ports(3))
        self.port, self.port_health = int(port), int(port_health)
        # Only the addresses differ from the image's defaults, since the container shares the machine's network.
        addresses = {"HOST": "127.0.0.1", "PORT": port, "PORT_HEALTH": port_health, "PORT_BACKEND": port_backend}
        settings = {"MODEL_NAME": "tiny.gguf", "EXTRA_ARGS": "--context-shift", "KEYS_WATCH_SECONDS": "0"}
        self.env = image.env | addresses | settings

    def command(self, argv: list[str]) -> list[str]:
        unshare = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        arguments = [str(self.image.root), str(self.data), self.uid, self.gid, self.image.workdir]
        return [*unshare, "sh", "-c", CONTAINER, "sh", *arguments, *argv]

    def make_key(self, name: str) -> str:
        """Generate a key with the image, as docs/DEPLOYMENT.md describes."""
        program = f"/{INSTALLED}/scripts/key_mgmt.py"
        argv = self.command(["python3", program, "--quiet", "generate", "--name", name])
        made = subprocess.run(argv, env=self.image.env, capture_output=True, text=True, check=False)
        check(made.returncode == 0, f"no key can be made: {made.stderr}")
        return made.stdout.strip()

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        argv = self.command(self.image.entrypoint)
        with (self.data.parent / "output.log").open("wb") as output:
            process = subprocess.Popen(argv, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()  # with --kill-child, this also kills all processes in it
            process.wait()

    def output(self) -> str:
        return (self.data.parent / "output.log").read_text(errors="replace")

    def healthy(self) -> bool:
        """Run the image's health check as the image's user."""
        argv = ["chroot", f"--userspec={self.image.user}", str(self.image.root), *self.image.healthcheck[1:]]
        return subprocess.run(argv, env=self.env, stderr=subprocess.DEVNULL, check=False).returncode == 0

    def status(self, path: str, port: int | None = None, key: str = "") -> int:
        """GET a path; return the status, or 0 without a response."""
        connection = HTTPConnection("127.0.0.1", port or self.port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
            return connection.getresponse().status
        except (OSError, HTTPException):
            return 0
        finally:
            connection.close()

    def chat(self, key: str, tokens: int = 8, *, stream: bool = False) -> "Response":
        return Response(self.port, key, {"max_tokens": tokens, "stream": stream})


class Response:
    """A response whose head has arrived."""

    def __init__(self, port: int, key: str, options: dict[str, object]) -> None:
        body = json.dumps({"messages": [{"role": "user", "content": "the cat"}], **options})
        self._connection = HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        fields = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self._connection.request("POST", "/v1/chat/completions", body, fields)
        self._response = self._connection.getresponse()
        self.status = self._response.status

    def read(self) -> bytes:
        """Read the rest. If it was cut, return what arrived."""
        try:
            return self._response.read()
        except HTTPException as cut:
            return bytes(getattr(cut, "partial", b""))
        finally:
            self._connection.close()

    def json(self) -> Any:
        return json.loads(self.read())


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def eventually(holds: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> float:
    """Wait until it holds; return the seconds that this took."""
    began_s = time.monotonic()
    while not holds():
        check(process.poll() is None, f"it ended with {process.returncode} before: {what}")
        check(time.monotonic() - began_s < PATIENCE_S, f"never: {what}")
        time.sleep(0.01)
    return time.monotonic() - began_s


def first_process(unshare: subprocess.Popen[bytes]) -> int:
    """Return the pid, outside of the container, of its process 1."""
    pid = unshare.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in descendants(int(child)))]


def check_privileges(first: int, uid: str) -> None:
    """No process is root or could become root, and no secret is on a command line."""
    check(len(descendants(first)) >= 4, "not all four processes run")
    (key_file,) = Path(f"/proc/{first}/root/dev/shm").glob("*/backend.key")
    check(key_file.stat().st_mode & 0o777 == 0o600, "the backend's key can be read by others")
    secret = key_file.read_text().strip()
    for pid in descendants(first):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        check(set(status["Uid"].split()) == {uid}, f"process {pid} is of user {status['Uid']}")
        check(int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, f"process {pid} has capabilities")
        check(status["NoNewPrivs"] == "1", f"process {pid} may gain privileges")
        check(secret not in Path(f"/proc/{pid}/cmdline").read_text(), "the backend's key is on a command line")


def try_serving(container: Container, key: str, process: subprocess.Popen[bytes]) -> None:
    health = container.port_health
    up_s = eventually(lambda: container.status("/", health) == 200, "the health port answers", process)
    up_s += eventually(lambda: container.status("/ping") == 200, "the gateway answers", process)
    eventually(lambda: container.status("/ready", health) == 200, "the model is loaded", process)
    say(f"both ports answered {up_s:.2f} s after the start")
    check(container.healthy(), "the health check fails while it serves")
    check(container.chat("sk-nobody-0123456789").status == 401, "a request without a valid key is served")
    answer = container.chat(key)
    check(answer.status == 200 and bool(answer.json()["choices"]), "no chat")
    check(container.chat(key, stream=True).read().rstrip().endswith(b"data: [DONE]"), "a stream has no end")


def try_hang_up(container: Container, first: int, process: subprocess.Popen[bytes]) -> None:
    key = container.make_key("bob")
    check(container.chat(key).status == 401, "a key is in force before the keys are read")
    os.kill(first, signal.SIGHUP)
    eventually(lambda: container.chat(key).status == 200, "SIGHUP to process 1 reloads the keys", process)


def try_stop(container: Container, key: str, first: int, process: subprocess.Popen[bytes]) -> None:
    """Stop during a stream that would go on for longer than the stop may take."""
    stream = container.chat(key, tokens=1_000_000, stream=True)
    began_s = time.monotonic()
    os.kill(first, signal.SIGTERM)
    try:
        status = process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        check(False, f"it does not stop within {STOP_S:g} s")
    say(f"stopped during a stream after {time.monotonic() - began_s:.2f} s, exit status {status}")
    check(status == 0, f"exit status {status}")
    check(not stream.read().rstrip().endswith(b"[DONE]"), "the stream that was cut looks finished")


def change_owner(folder: Path, uid: int, gid: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, uid, gid)


def main() -> int:
    root, description, data, kind = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    image = Image.load(root, description)
    check_description(image)
    check_files(image)
    container = Container(image, data)
    change_owner(data, int(container.uid), int(container.gid))
    key = container.make_key("alice")
    check(not container.healthy(), "the health check passes while nothing runs")
    try:
        with container.running() as process:
            try_serving(container, key, process)
            first = first_process(process)
            check_privileges(first, container.uid)
            try_hang_up(container, first, process)
            try_stop(container, key, first, process)
    except SystemExit:
        print(container.output()[-8000:], file=sys.stderr)
        raise
    check(bool(list((data / "logs").rglob("*_server_*.log"))), "no boot log on the volume")
    check("Traceback" not in container.output(), container.output()[-8000:])
    check("LLAMA_ARG_" not in container.output(), "a warning about a setting of the image itself")
    say(f"served, reloaded and stopped as user {image.user} with a read-only root ({kind} llama-server)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
