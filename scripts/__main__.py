"""Every program under one name: `python3 llama-gguf-inference-VERSION.pyz COMMAND`, or `python3 scripts COMMAND`.

    serve     start everything: health server, gateway, llama-server (settings are environment variables)
    run       a first start on this machine: a local data folder, a first key, a curl command
    check     check the settings and what a start needs, and exit
    gateway   the gateway alone, in front of a llama-server that runs already
    health    the health server alone
    keys      generate, list, change, rotate and remove API keys
    bench     measure a server, and what the gateway adds to it
    top       show in a terminal what a gateway does
    mock      a mock of llama-server
    version   print the version

`COMMAND --help` shows the options of a command.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # `python3 -P` leaves a script's own folder out

from core import signals

if __name__ == "__main__" and sys.argv[1:2] in (["serve"], ["gateway"], ["health"], ["mock"]):
    signals.ignore(*signals.STRAY)

import runpy
from collections.abc import Sequence

from core.installation import COMMANDS, version

EXIT_USAGE = 2


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a program as its own file would run; it ends this process."""
    sys.argv = [name, *arguments]
    runpy.run_module(COMMANDS[name], run_name="__main__", alter_sys=True)


def serve(arguments: Sequence[str]) -> None:
    """Do what start.sh does: become the supervisor."""
    if os.environ.get("DEBUG_SHELL"):
        print("serve: error: DEBUG_SHELL is for start.sh in a container: unset it", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    run("serve", arguments)


def main(argv: Sequence[str]) -> int:
    name, arguments = (argv[0], argv[1:]) if argv else ("", ())
    if name in ("-h", "--help", "help"):
        print(__doc__)
    elif name in ("version", "--version"):
        print(version())
    elif name == "check":
        run("serve", ["--check-config", *arguments])
    elif name == "serve":
        serve(arguments)
    elif name in COMMANDS:
        run(name, arguments)
    else:
        message = f"unknown command: {name}" if name else "a command is needed"
        print(f"{__doc__}\nerror: {message}", file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
